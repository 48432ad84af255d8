"""What a patched host and its blocks share between forwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..algorithm.rows import rounded_share
from ..config import EvoConfig
from ..errors import BypassError, ConfigError
from ..plan import BlockPlan, plan_blocks, runs_of
from ..rewrite.tracing import on_the_way
from .spec import Block, HostSpec


class HostState:
    """Plain values: deepcopy and pickle carry it along.

    Args:
        name: The host's path in the model that `apply` was given.
        spec: What its adapter says about it.
        stages: Its blocks by stage.
        config: Its settings.
    """

    def __init__(self, name: str, spec: HostSpec, stages: tuple[tuple[Block, ...], ...], config: EvoConfig) -> None:
        self.name = name
        self.spec = spec
        self.foreign = False
        """Whether code that isn't the library's walks over the blocks, and may look at tokens in between."""
        self.depths = tuple(map(len, stages))
        self.depth = sum(self.depths)
        self.blocks: tuple[Block, ...] = tuple(block for stage in stages for block in stage)
        self.index_of = {block[0]: index for index, block in enumerate(self.blocks)}
        self.around_blocks = frozenset(on_the_way(self.index_of)) - self.index_of.keys()
        """Paths of the modules between the host and its blocks."""
        self.known_paths = self.around_blocks.union(*self.blocks)
        """These, and those of everything that blocks are made of."""
        self.stage_of = tuple(number for number, depth in enumerate(self.depths) for _ in range(depth))
        self.full_grid = 0
        """How many `evopatch.full_grid` contexts are open."""
        self.passes: list[Any] | None = None
        """Where the owner of a copy of a model collects the state of every forward, to look at it."""
        self.watch: Callable[[int, Any], None] | None = None
        """Told by every block with windows what its tokens received, in a copy of a model that somebody learns from."""
        self.methods: dict[str, str] = {}
        """By name, which function each method of the host was that walks over the blocks, when it was patched."""
        self.generated: dict[Any, Any] = {}
        """Code by the structure of the block that it is for; empty but while the host is being patched."""
        self.set_config(config)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is made for itself: nobody would close the contexts that are open here, or read what is collected.
        return {**self.__dict__, "full_grid": 0, "passes": None, "watch": None}

    def set_config(self, config: EvoConfig) -> None:
        """Take another configuration.

        Raises:
            ConfigError: If it doesn't fit the model; the old one stays then.
        """
        self.set_plans(self.plan(config))
        self.config = config
        self.reads_out = self.spec.head_reads > 0 and (self.active if config.readout is None else config.readout)
        """Whether the last block is to do for the prefix tokens alone, where nothing else is read of it."""

    def set_plans(self, plans: tuple[BlockPlan, ...]) -> None:
        """Let every block do something else, whatever the configuration says."""
        self.plans = plans
        # As text, which is a constant to torch.compile: a number that has changed becomes a symbol there, and with it
        # all sizes that follow from it.
        self.keep_ratios = tuple(repr(plan.keep_ratio) for plan in plans)
        self.active = any(plan.keep_ratio < 1.0 for plan in plans)

    def plan(self, config: EvoConfig) -> tuple[BlockPlan, ...]:
        """One plan per block.

        Raises:
            ConfigError: If the configuration doesn't fit the depth, or leaves no slow token on a pyramid's grid.
        """
        spec = self.spec
        plans = plan_blocks(config, *self.depths, taper=spec.taper, looks_ahead=spec.looks_ahead, start=spec.start)
        if spec.pyramid is not None:
            for plan, stage in zip(plans, self.stage_of, strict=True):
                _check_keeps_any(plan.keep_ratio, stage, spec.pyramid.grids[stage])
        return plans

    def written_out(self) -> EvoConfig:
        """The configuration with the first block of every run, and what each keeps."""
        firsts, ratios = runs_of(self.config, *self.depths, taper=self.spec.taper, start=self.spec.start)
        return dataclasses.replace(self.config, stages=tuple(firsts), keep_ratio=tuple(ratios), start=None)

    def describe(self, block: str) -> str:
        """What a block does, in a few words.

        Args:
            block: Fully qualified name.
        """
        plan = self.plans[self.index_of[block.removeprefix(f"{self.name}.")]]
        kept = "keeps all tokens" if plan.keep_ratio == 1.0 else f"keeps {plan.keep_ratio:.3g} of the tokens slow"
        return kept + (", selects them" if plan.selects else "")

    def refuse_bypass(self, block: str) -> None:
        """A block was called without the state of a forward.

        Raises:
            BypassError: Unless the settings are to run every block as unpatched.
        """
        if self.active:
            raise BypassError(
                f"{block} was called from outside the patched forward of '{self.name or 'model'}': the slow-fast state "
                "would be missing. Call the model itself (or a timm model's forward_features or "
                "forward_intermediates), or evopatch.remove(model) first"
            )


def _check_keeps_any(keep_ratio: float, stage: int, grid: tuple[int, int]) -> None:
    tokens = grid[0] * grid[1]
    if keep_ratio < 1.0 and (tokens < 2 or rounded_share(tokens, keep_ratio) < 1):
        raise ConfigError(
            f"keep_ratio {keep_ratio:g} leaves no slow token beside fast ones among the {tokens} of stage {stage + 1} "
            f"({grid[0]}x{grid[1]}): expected "
            + ("1.0 there" if tokens < 2 else f"at least {0.5 / tokens:.3g}")
            + ". Give one keep ratio per stage"
        )
