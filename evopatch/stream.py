"""The slow-fast run over the blocks, and its state for the length of one forward pass.

A patched host runs its *own* forward on a view of itself whose block container yields this forward's steps. So nothing
of the host is copied, and the state lives in a local variable: threads, nested forwards, and several forwards before
one backward don't share any.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from . import graph, ops
from .adapter import HostSpec
from .attention import AttentionTap
from .config import BlockPlan, EvoConfig
from .errors import BypassError, UnsupportedInputError
from .swap import Swapped, host_class

_ORIGINAL = object()
"""Given to a block in place of a tap: run as unpatched, also in a recomputation after the settings changed."""


class Patch:
    """What a patched host and its blocks share. Plain values: deepcopy and pickle carry it along."""

    def __init__(self, name: str, spec: HostSpec, depth: int, config: EvoConfig) -> None:
        self.name = name
        self.spec = spec
        self.depth = depth
        self.set_config(config)

    def set_config(self, config: EvoConfig) -> None:
        """Take another configuration.

        Raises:
            ConfigError: If it doesn't fit the depth; the old one stays then.
        """
        self.plans: tuple[BlockPlan, ...] = config.resolve(self.depth)
        self.config = config
        self.active = any(plan.keep_ratio < 1.0 for plan in self.plans)


class SlowFastBlock(Swapped):
    """Mixin of a patched block."""

    _evo_patch: Patch
    _evo_name: str
    _evo_code: graph.BlockCode | None
    training: bool

    def forward(self, x: Tensor, *args: Any, evo: AttentionTap | object | None = None, **kwargs: Any) -> Tensor:
        """The generated forward (see `graph.py`) with an attention tap, else the host's own."""
        if not isinstance(evo, AttentionTap):
            if evo is not _ORIGINAL and self._evo_patch.active:
                raise BypassError(
                    f"{self._evo_name} was called from outside the patched forward of "
                    f"'{self._evo_patch.name or 'model'}': the slow-fast state would be missing. Call the model's "
                    "forward, forward_features or forward_intermediates, or evopatch.remove(model) first"
                )
            out: Tensor = self._evo_host_class.forward(self, x, *args, **kwargs)
            return out
        inputs = tuple(kwargs[name] for name in self._evo_patch.spec.trace.inputs)
        assert self._evo_code is not None
        out = self._evo_code.forward[self.training](self, x, inputs, evo)
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self._evo_code is None:  # from a pickle
            self._evo_code = graph.generate(self, self._evo_name, self._evo_patch.spec.trace)  # type: ignore[arg-type]


def walk(host: Any, method: str, *args: Any, compact: bool, stream: Stream | None = None, **kwargs: Any) -> Any:
    """Run a host's own method that walks over its blocks, with the slow-fast steps in their place.

    Args:
        host: The patched host.
        method: Name of the method, as the host's class has it.
        compact: Pass the compact set from block to block inside a run, which is faster. False: every step takes and
            returns the full grid in raster order, as callers want who look between the blocks.
        stream: The state to use, for callers who read it afterwards.
    """
    function = getattr(host_class(host), method)
    patch: Patch = host._evo_patch
    if not patch.active and compact:
        return function(host, *args, **kwargs)
    if stream is None:
        stream = Stream(host, compact=compact)
    return function(_View(host, patch.spec.blocks, stream), *args, **kwargs)


class Stream:
    """One forward pass: class attention and partition by block index, so that a recomputed block finds its own."""

    def __init__(self, host: Any, compact: bool) -> None:
        patch: Patch = host._evo_patch
        # Taken once: a checkpointed block is recomputed in backward, maybe after the settings changed.
        self.name, self.spec, self.plans, self.active = patch.name, patch.spec, patch.plans, patch.active
        self.representative = patch.config.representative
        self.blocks: list[nn.Module] = list(host._modules[self.spec.blocks])
        self.compact = compact
        self.g: dict[int, Tensor] = {}
        self.partitions: dict[int, ops.Partition] = {}
        self._run: tuple[Tensor, Tensor] | None = None

    def advance(self, index: int, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Block `index` on `x`: `(B, T, C)`, or `(B, M, C)` inside a run in compact mode."""
        if not self.active:
            return self.blocks[index](x, evo=_ORIGINAL, **inputs)  # type: ignore[no-any-return]
        plan = self.plans[index]
        self._check_inputs(index, inputs)
        if plan.keep_ratio == 1.0:
            return self._block(index, x, inputs, None)
        if plan.selects:
            self.partitions[index] = self._select(index, x, inputs)
        else:
            self.partitions[index] = self.partitions[index - 1]
        partition = self.partitions[index]
        if not self.compact:
            entry = ops.merge(x, partition)
            return ops.distribute(x, self._block(index, entry, inputs, partition) - entry, partition)
        if plan.selects:
            compact = ops.merge(x, partition)
            self._run = (x, compact)
        else:
            compact = x
        compact = self._block(index, compact, inputs, partition)
        # Pruned models (timm's prune_intermediate_layers) end before their last run does.
        if not plan.ends and index + 1 < len(self.blocks):
            return compact
        assert self._run is not None
        full, entry = self._run
        return ops.distribute(full, compact - entry, partition)

    def _select(self, index: int, x: Tensor, inputs: dict[str, Any]) -> ops.Partition:
        prefix = self.spec.prefix
        g = self.g[index - 1]
        keep = ops.num_slow(g.shape[1], self.plans[index].keep_ratio)
        if self.representative != "matched":
            return ops.select_top(g, keep, prefix, self.representative == "single")
        block: Any = self.blocks[index]
        ordered = tuple(inputs.get(name) for name in self.spec.trace.inputs)
        metric = block._evo_code.metric[block.training](block, x.detach(), ordered, None)
        return ops.select_matched(g, metric[:, prefix:], keep, prefix)

    def _block(self, index: int, x: Tensor, inputs: dict[str, Any], partition: ops.Partition | None) -> Tensor:
        plan, spec = self.plans[index], self.spec
        inputs = {name: inputs.get(name) for name in spec.trace.inputs}
        if partition is not None:
            for name in spec.token_inputs:
                inputs[name] = ops.merge_positions(inputs[name], partition, spec.prefix)
        tap = AttentionTap(spec.prefix, spec.readout, partition, observe=plan.tradeoff is not None)
        out: Tensor = self.blocks[index](x, evo=tap, **inputs)
        if plan.tradeoff is not None:
            attention = tap.class_attention()
            if partition is None:
                self.g[index] = ops.accumulate(self.g.get(index - 1), attention[:, spec.prefix :], plan.tradeoff)
            else:
                self.g[index] = ops.accumulate_compact(self.g[index - 1], attention, plan.tradeoff, partition)
        return out

    def _check_inputs(self, index: int, inputs: dict[str, Any]) -> None:
        for name, value in inputs.items():
            if name not in self.spec.trace.inputs and value is not None and value is not False:
                raise UnsupportedInputError(
                    f"{name} was passed to the patched model, at block {index} of '{self.name or 'model'}': slow "
                    "and fast tokens are chosen among all tokens, so attention can't be masked. Leave it out, or use "
                    "evopatch.set_keep_ratio(model, 1.0) or evopatch.remove(model) for this call"
                )


class _Step:
    """One block in one forward pass; stands where the host calls the block."""

    def __init__(self, stream: Stream, index: int) -> None:
        self._stream = stream
        self._index = index

    def __call__(self, x: Tensor, **inputs: Any) -> Tensor:
        return self._stream.advance(self._index, x, inputs)


class _Steps:
    """Stands where the host uses its `nn.Sequential` or `nn.ModuleList` of blocks."""

    def __init__(self, steps: list[_Step]) -> None:
        self._steps = steps

    def __call__(self, x: Tensor) -> Tensor:
        for step in self._steps:
            x = step(x)
        return x

    def __iter__(self) -> Iterator[_Step]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int | slice) -> _Step | _Steps:
        return _Steps(self._steps[index]) if isinstance(index, slice) else self._steps[index]


class _View:
    """Stands for `self` in one of the host's methods: the host in everything but its blocks."""

    def __init__(self, host: Any, blocks: str, stream: Stream) -> None:
        steps = _Steps([_Step(stream, index) for index in range(len(stream.blocks))])
        self.__dict__.update({"_host": host, blocks: steps})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # A zero-argument super() in a subclass of the host's class checks it. torch.compile looks at an instance
        # that was never initialised.
        host = self.__dict__.get("_host")
        return _View if host is None else type(host)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._host, name, value)
