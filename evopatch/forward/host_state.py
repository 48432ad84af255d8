"""What a patched host and its blocks share between forwards."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..algorithm.rows import rounded_share
from ..config import EvoConfig
from ..errors import BypassError, ConfigError
from ..plan import BlockPlan, plan_blocks, runs_of
from ..rewrite.tracing import on_the_way
from .spec import Block, HostSpec

_COMPILED_ALONE = 3 if torch.__version__ >= "2.12" else sys.maxsize
"""So many keep ratios, of the eight times that torch.compile compiles by default: all others share one or two, and
other batch sizes need some. Older versions can't follow sizes that a number decides."""


class Settings(NamedTuple):
    """What the blocks do. Changed all at once, as a forward in another thread may read it meanwhile."""

    config: EvoConfig
    plans: tuple[BlockPlan, ...]
    keep_ratios: Sequence[str] | Sequence[float]
    """As text, which is a constant to torch.compile; or in a list as numbers, which become symbols there, and with them
    all sizes that follow from them."""
    begins: tuple[int, ...]
    """For every block, the one that selects the tokens that go through it; 0 before the first that selects."""
    active: bool
    """Whether any block takes a compact set."""
    reads_out: bool
    """Whether the last block is to do for the prefix tokens alone, where nothing else is read of it."""


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
        self.compiled = False
        """Whether compiled code ran at these settings."""
        self.compiled_alone: list[Sequence[str] | Sequence[float]] = []
        """The first keep ratios at which it ran: what is compiled for one alone is the fastest."""
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
        plans = self.plan(config)
        active = any(plan.keep_ratio < 1.0 for plan in plans)
        reads_out = self.spec.head_reads > 0 and (active if config.readout is None else config.readout)
        self.settings = Settings(config, plans, self._ratios(plans), _begins(plans), active, reads_out)

    def set_plans(self, plans: tuple[BlockPlan, ...]) -> None:
        """Let every block do something else, whatever the configuration says, also where it takes all tokens."""
        ratios, begins = self._ratios(plans), _begins(plans)
        self.settings = self.settings._replace(plans=plans, keep_ratios=ratios, begins=begins, active=True)

    def _ratios(self, plans: tuple[BlockPlan, ...]) -> Sequence[str] | Sequence[float]:
        if self.compiled and isinstance(ratios := self.settings.keep_ratios, tuple):
            self.compiled_alone = list(dict.fromkeys([*self.compiled_alone, ratios]))
        self.compiled = False
        text = tuple(repr(plan.keep_ratio) for plan in plans)
        alone = text in self.compiled_alone or len(self.compiled_alone) < _COMPILED_ALONE
        return text if alone else [plan.keep_ratio for plan in plans]

    @property
    def config(self) -> EvoConfig:
        """See `Settings`."""
        return self.settings.config

    @property
    def plans(self) -> tuple[BlockPlan, ...]:
        """See `Settings`."""
        return self.settings.plans

    @property
    def active(self) -> bool:
        """See `Settings`."""
        return self.settings.active

    @property
    def reads_out(self) -> bool:
        """See `Settings`."""
        return self.settings.reads_out

    @property
    def least(self) -> tuple[float, ...]:
        """The smallest keep ratio of each block with which a pyramid's grid has a slow token; empty of other hosts."""
        if self.spec.pyramid is None:
            return ()
        sizes = [rows * columns for rows, columns in self.spec.pyramid.grids]
        # Rounded up, to the places that a search gives a keep ratio.
        return tuple(1.0 if sizes[stage] < 2 else -(-5000 // sizes[stage]) / 10000 for stage in self.stage_of)

    def plan(self, config: EvoConfig) -> tuple[BlockPlan, ...]:
        """One plan per block.

        Raises:
            ConfigError: If the configuration doesn't fit the depth, or leaves no slow token on a pyramid's grid.
        """
        spec = self.spec
        plans = plan_blocks(config, *self.depths, looks_ahead=spec.looks_ahead, **self._shape)
        if spec.pyramid is not None:
            for plan, stage in zip(plans, self.stage_of, strict=True):
                _check_keeps_any(plan.keep_ratio, stage, spec.pyramid.grids[stage])
        return plans

    @property
    def _shape(self) -> dict[str, Any]:
        """What the host says of how one keep ratio is spread."""
        spec = self.spec
        swin = spec.windowed and spec.coarsens and len(self.depths) > 1 and spec.start is None
        return {"taper": spec.taper, "start": spec.start, "swin": swin}

    def written_out(self) -> EvoConfig:
        """The configuration with the first block of every run, and what each keeps."""
        firsts, ratios = runs_of(self.config, *self.depths, **self._shape)
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


def _begins(plans: tuple[BlockPlan, ...]) -> tuple[int, ...]:
    found = [0]
    for index, plan in enumerate(plans):
        found.append(index if plan.selects else found[-1])
    return tuple(found[1:])


def _check_keeps_any(keep_ratio: float, stage: int, grid: tuple[int, int]) -> None:
    tokens = grid[0] * grid[1]
    if keep_ratio < 1.0 and (tokens < 2 or rounded_share(tokens, keep_ratio) < 1):
        raise ConfigError(
            f"keep_ratio {keep_ratio:g} leaves no slow token beside fast ones among the {tokens} of stage {stage + 1} "
            f"({grid[0]}x{grid[1]}): expected "
            + ("1.0 there" if tokens < 2 else f"at least {0.5 / tokens:.3g}")
            + ". Give one keep ratio per stage"
        )
