"""The slow-fast run over the blocks, and its state for the length of one forward pass.

A patched host runs its *own* forward, so nothing of the host is copied. Where a host passes keyword arguments on to its
blocks, the state travels in them. Elsewhere the forward runs on a view of the host whose block container yields this
forward's steps (`walk`). Either way it lives in a local variable: threads, nested forwards, and several forwards before
one backward don't share any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, doesn't import the compiler

from ..algorithm.importance import accumulate, accumulate_compact, coarsen
from ..algorithm.partition import Partition, distribute, merge, merge_positions
from ..algorithm.selection import num_slow, select_matched, select_top
from ..config import EvoConfig
from ..errors import BypassError, ConfigError, UnsupportedInputError
from ..plan import BlockPlan, plan_blocks
from ..rewrite import graph
from ..rewrite.classes import Swapped, host_class
from .spec import Block, HostSpec
from .tap import AttentionTap

Run = Callable[[Tensor, dict[str, Any], AttentionTap | None], Tensor]
"""Runs one block on `(B, M, C)` tokens with its other inputs; without a tap as unpatched."""

ORIGINAL = object()
"""Given to a block in place of a tap: run as unpatched, also in a recomputation after the settings changed."""


class HostState:
    """What a patched host and its blocks share. Plain values: deepcopy and pickle carry it along."""

    def __init__(self, name: str, spec: HostSpec, stages: tuple[tuple[Block, ...], ...], config: EvoConfig) -> None:
        self.name = name
        self.spec = spec
        self.depths = tuple(map(len, stages))
        self.depth = sum(self.depths)
        self.blocks: tuple[Block, ...] = tuple(block for stage in stages for block in stage)
        self.index_of = {block[0]: index for index, block in enumerate(self.blocks)}
        self.stage_of = tuple(number for number, depth in enumerate(self.depths) for _ in range(depth))
        self.passes: list[TokenPass] | None = None
        """Where a caller who wants to look at the state of every forward collects it."""
        self.set_config(config)

    def set_config(self, config: EvoConfig) -> None:
        """Take another configuration.

        Raises:
            ConfigError: If it doesn't fit the model; the old one stays then.
        """
        self.plans: tuple[BlockPlan, ...] = self.resolve(config)
        self.config = config
        self.active = any(plan.keep_ratio < 1.0 for plan in self.plans)

    def resolve(self, config: EvoConfig) -> tuple[BlockPlan, ...]:
        """One plan per block.

        Raises:
            ConfigError: If the configuration doesn't fit the depth, or leaves no slow token on a pyramid's grid.
        """
        plans = plan_blocks(config, *self.depths, taper=self.spec.taper)
        if self.spec.pyramid is not None:
            for plan, stage in zip(plans, self.stage_of, strict=True):
                _check_keeps_any(plan.keep_ratio, stage, self.spec.pyramid.grids[stage])
        return plans

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
    if keep_ratio < 1.0 and (tokens < 2 or int(tokens * keep_ratio + 0.5) < 1):
        raise ConfigError(
            f"keep_ratio {keep_ratio:g} leaves no slow token beside fast ones among the {tokens} of stage {stage + 1} "
            f"({grid[0]}x{grid[1]}): expected "
            + ("1.0 there" if tokens < 2 else f"at least {0.5 / tokens:.3g}")
            + ". Give one keep ratio per stage"
        )


class SlowFastBlock(Swapped):
    """Mixin of a patched block."""

    _evo_state: HostState
    _evo_name: str
    _evo_code: graph.BlockCode | None
    training: bool

    def forward(self, x: Tensor, *args: Any, evo: AttentionTap | object | None = None, **kwargs: Any) -> Tensor:
        """The generated forward (see `graph.py`) with an attention tap, else the host's own."""
        if not isinstance(evo, AttentionTap):
            if evo is not ORIGINAL:
                self._evo_state.refuse_bypass(self._evo_name)
            out: Tensor = self._evo_host_class.forward(self, x, *args, **kwargs)
            return out
        inputs = tuple(kwargs[name] for name in self._evo_state.spec.trace.inputs)
        assert self._evo_code is not None
        out = self._evo_code.forward[self.training](self, x, inputs, evo)
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self._evo_code is None:  # from a pickle
            self._evo_code = graph.generate(self, self._evo_name, self._evo_state.spec.trace)  # type: ignore[arg-type]


def walk(
    host: Any, method: str, *args: Any, compact: bool, pass_class: type[TokenPass] | None = None, **kwargs: Any
) -> Any:
    """Run a host's own method that walks over its blocks, with the slow-fast steps in their place.

    Args:
        host: The patched host.
        method: Name of the method, as the host's class has it.
        compact: Pass the compact set from block to block inside a run, which is faster. False: every step takes and
            returns the full grid in raster order, as callers want who look between the blocks.
        pass_class: How the steps go; None: `TokenPass`.
    """
    function = getattr(host_class(host), method)
    state: HostState = host._evo_state
    if not state.active and compact:
        return function(host, *args, **kwargs)
    evo_pass = (pass_class or TokenPass)(state, 0, compact)
    view = viewed(host, "", evo_pass)
    # A zero-argument super() in a subclass looks at the view's class, which torch.compile can't.
    if "__class__" in function.__code__.co_freevars:
        return _run_uncompiled(function, view, *args, **kwargs)
    return function(view, *args, **kwargs)


@_disable_dynamo
def _run_uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def viewed(module: Any, path: str, evo_pass: TokenPass) -> Any:
    """What stands for a module in the host's forward: nothing else than itself where it holds no block.

    Args:
        module: The host, or a module in it.
        path: Of the module, from the host.
        evo_pass: This forward's.
    """
    index = evo_pass.index_of.get(path)
    if index is not None:
        # Pruned models (timm's prune_intermediate_layers) have fewer blocks than were patched.
        evo_pass.depth = max(evo_pass.depth, index + 1)
        return evo_pass.step(index, module)
    inside = f"{path}." if path else ""
    if not any(block.startswith(inside) for block in evo_pass.index_of):
        return module
    children = {name: viewed(child, inside + name, evo_pass) for name, child in module._modules.items()}
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return _Steps(_joined(list(children.values()), evo_pass.blocks), module)
    return View(module, {name: child for name, child in children.items() if child is not module._modules[name]})


def _joined(steps: list[Any], blocks: tuple[Block, ...]) -> list[Any]:
    """A block may be several modules of its container: they run in its step."""
    joined: list[Any] = []
    following = 0
    for step in steps:
        if following:
            joined[-1].followers.append(step)
            following -= 1
            continue
        joined.append(step)
        if isinstance(step, Step):
            following = len(blocks[step.index]) - 1
    return joined


class TokenPass:
    """One forward pass: class attention and partition by block index, so that a recomputed block finds its own."""

    def __init__(self, state: HostState, depth: int, compact: bool) -> None:
        # Taken once: a checkpointed block is recomputed in backward, maybe after the settings changed.
        self.name, self.spec, self.plans, self.active = state.name, state.spec, state.plans, state.active
        self.representative, self.importance = state.config.representative, state.config.importance
        self.blocks, self.stage_of = state.blocks, state.stage_of
        self.index_of = state.index_of
        self.depth = depth
        self.compact = compact
        self.g: dict[int, Tensor] = {}
        self.partitions: dict[int, Partition] = {}
        # By the run's first block, as a recomputed block may belong to another run than the last one that began.
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}
        self._first: dict[int, int] = {}
        if state.passes is not None:
            state.passes.append(self)

    def step(self, index: int, block: nn.Module) -> Step:
        """What stands where the host calls the block."""
        return Step(self, index, block)

    def advance(self, index: int, block: Any, x: Tensor, inputs: Mapping[str, Any], run: Run) -> Tensor:
        """One block.

        Args:
            index: Its place, from 0.
            block: The block itself.
            x: `(B, T, C)`, or `(B, M, C)` inside a run in compact mode.
            inputs: The block's other inputs by name.
            run: How to run it.

        Returns:
            The same as `x`.
        """
        if not self.active:
            return run(x, dict(inputs), None)
        self._check_grid(index, x)
        plan = self.plans[index]
        named = {name: inputs.get(name) for name in self.spec.trace.inputs}
        if plan.keep_ratio == 1.0:
            return self._block(index, x, named, None, run)
        if plan.selects:
            self.partitions[index] = self._select(index, block, x, named)
        else:
            self.partitions[index] = self.partitions[index - 1].to(x.device)
        partition = self.partitions[index]
        if not self.compact:
            entry = merge(x, partition)
            return distribute(x, self._block(index, entry, named, partition, run) - entry, partition)
        first = self._first[index] = index if plan.selects else self._first[index - 1]
        if plan.selects:
            compact = merge(x, partition)
            self._entries[index] = (x, compact)
        else:
            compact = x
        compact = self._block(index, compact, named, partition, run)
        # Pruned models (timm's prune_intermediate_layers) end before their last run does.
        if not plan.ends and index + 1 < self.depth:
            return compact
        full, entry = (tokens.to(compact.device) for tokens in self._entries[first])
        return distribute(full, compact - entry, partition)

    def refuse(self, name: str, index: int) -> None:
        """An input that masks tokens.

        Raises:
            UnsupportedInputError: Unless every block runs as unpatched.
        """
        if self.active:
            raise UnsupportedInputError(
                f"{name} was passed to the patched model, at block {index} of '{self.name or 'model'}': slow "
                "and fast tokens are chosen among all tokens, so attention can't be masked. Leave it out, or use "
                "evopatch.set_keep_ratio(model, 1.0) or evopatch.remove(model) for this call"
            )

    def _check_grid(self, index: int, x: Tensor) -> None:
        pyramid, stage = self.spec.pyramid, self.stage_of[index]
        if pyramid is None or (index and self.stage_of[index - 1] == stage):
            return
        rows, columns = pyramid.grids[stage]
        if x.shape[1] != rows * columns:
            raise UnsupportedInputError(
                f"{x.shape[1]} patch tokens reached stage {stage + 1} of '{self.name or 'model'}', whose position "
                f"biases are for {rows * columns} ({rows}x{columns}): give images of the model's own size"
            )

    def _carried(self, index: int, g: Tensor) -> Tensor:
        """`g` after a block, on the grid of the block after it."""
        stage, pyramid = self.stage_of[index], self.spec.pyramid
        if pyramid is None or index + 1 == len(self.stage_of) or self.stage_of[index + 1] == stage:
            return g
        return coarsen(g, pyramid.grids[stage], pyramid.kernel)

    def _select(self, index: int, block: Any, x: Tensor, inputs: dict[str, Any]) -> Partition:
        prefix = self.spec.prefix
        g = self.g[index - 1].to(x.device)  # the first block never selects
        keep = num_slow(g.shape[1], self.plans[index].keep_ratio)
        if self.representative != "matched":
            return select_top(g, keep, prefix, self.representative == "single")
        tokens = self.block_layout(index, x.detach())
        metric = self.token_layout(block._evo_code.metric[block.training](block, tokens, tuple(inputs.values()), None))
        return select_matched(g, metric[:, prefix:], keep, prefix, self.importance)

    def block_layout(self, index: int, x: Tensor) -> Tensor:
        """`(B, M, C)` tokens as the block takes them."""
        if not self.spec.channels_first:
            return x
        assert self.spec.pyramid is not None
        rows, columns = self.spec.pyramid.grids[self.stage_of[index]]
        if x.shape[1] != rows * columns:
            rows, columns = x.shape[1], 1
        channels_first: Tensor = x.transpose(1, 2).unflatten(2, (rows, columns))
        return channels_first

    def token_layout(self, x: Tensor) -> Tensor:
        """The inverse of `block_layout`."""
        if not self.spec.channels_first:
            return x
        return x.flatten(2).transpose(1, 2)

    def _block(self, index: int, x: Tensor, inputs: dict[str, Any], partition: Partition | None, run: Run) -> Tensor:
        plan, spec = self.plans[index], self.spec
        if partition is not None:
            for name in spec.token_inputs:
                inputs[name] = _merge_positions(inputs[name], partition, spec.prefix)
        tap = AttentionTap(spec.prefix, spec.readout, partition, plan.tradeoff is not None, spec.received)
        out = run(x, inputs, tap)
        if not tap.used:
            raise BypassError(
                f"block {index} of '{self.name or 'model'}' ran without its patched attention: it was replaced, or its "
                "forward was. Use evopatch.remove(model) before such changes, and evopatch.apply after them"
            )
        if plan.tradeoff is not None:
            attention = tap.class_attention()
            before = self.g[index - 1].to(x.device) if index else None
            if partition is None or before is None:
                g = accumulate(before, attention[:, spec.prefix :], plan.tradeoff)
            else:
                g = accumulate_compact(before, attention, plan.tradeoff, partition)
            self.g[index] = self._carried(index, g)
        return out


def _merge_positions(table: Any, partition: Partition, prefix: int) -> Any:
    if isinstance(table, tuple):
        return tuple(merge_positions(part, partition, prefix) for part in table)
    return merge_positions(table, partition, prefix)


class Step:
    """One block in one forward pass; stands where the host calls the block."""

    def __init__(self, evo_pass: TokenPass, index: int, block: nn.Module) -> None:
        self._pass = evo_pass
        self.index = index
        self._block = block
        self.followers: list[nn.Module] = []

    def __call__(self, x: Tensor, **inputs: Any) -> Tensor:
        evo_pass = self._pass
        for name, value in inputs.items():
            if name not in evo_pass.spec.trace.inputs and value is not None and value is not False:
                evo_pass.refuse(name, self.index)
        out = evo_pass.advance(self.index, self._block, evo_pass.token_layout(x), inputs, self._run)
        return evo_pass.block_layout(self.index, out)

    def _run(self, x: Tensor, inputs: dict[str, Any], tap: AttentionTap | None) -> Tensor:
        # Through the block's __call__, so that its hooks run.
        x = self._pass.block_layout(self.index, x)
        out: Tensor = self._block(x, evo=ORIGINAL if tap is None else tap, **inputs)
        for module in self.followers:
            out = module(out)
        return self._pass.token_layout(out)


class _Steps:
    """Stands where the host uses an `nn.Sequential` or `nn.ModuleList` that holds blocks."""

    def __init__(self, steps: list[Any], container: nn.Module | None = None) -> None:
        self._steps = steps
        self._container = container

    def __call__(self, x: Tensor) -> Tensor:
        if self._container is not None and _has_hooks(self._container):
            raise BypassError(
                f"a {type(self._container).__name__} of blocks has hooks, which would not run: the patched forward "
                "goes through its blocks one by one. Hook the blocks, their stage or the model instead"
            )
        for step in self._steps:
            x = step(x)
        return x

    def __iter__(self) -> Iterator[Any]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int | slice) -> Any:
        return _Steps(self._steps[index]) if isinstance(index, slice) else self._steps[index]


def _has_hooks(module: nn.Module) -> bool:
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks)


class View:
    """Stands for a module, with other attributes in some places: the module in everything else."""

    def __init__(self, host: Any, children: Mapping[str, Any]) -> None:
        self.__dict__.update({"_host": host, **children})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # A zero-argument super() in a subclass of the host's class checks it. torch.compile looks at an instance
        # that was never initialised.
        host = self.__dict__.get("_host")
        return View if host is None else type(host)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        host: Any = self._host
        if _has_hooks(host):
            return nn.Module._call_impl(self, *args, **kwargs)  # type: ignore[arg-type]
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, on this view."""
        return host_class(self._host).forward(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._host, name, value)
