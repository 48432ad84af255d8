"""Flat models that no library's adapter knows: what somebody says of their own, checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.rows import is_fixed
from ..errors import ConfigError, UnsupportedModelError
from ..forward.spec import HostSpec
from ..forward.walk import PatchedHost, refuse_symbolic, walk
from ..rewrite.classes import Steered, host_class
from ..rewrite.fast_paths import forward_of
from ..rewrite.tracing import TraceSpec, attention_cores
from ..rewrite.walking import Manner
from .adapter import Adapter, Change
from .changes import check_forward
from .containers import container_of, walked_by, walkers_of
from .parts import Summed, check_parts, parts
from .patch_tokens import first_convolution, patch_size_of, patch_sizes
from .probe import takes_tokens_first, width_of
from .trying import Tried, try_out


class SlowFastOwn(PatchedHost):
    """Mixin of the patched module: each of its methods that walk over the blocks."""

    _evo_walkers: dict[str, Manner]
    _evo_takes_images: bool

    def __init_subclass__(cls) -> None:
        own: type[nn.Module] | None = cls.__dict__.get("_evo_host_class")
        for name in () if own is None else dir(own):
            method = getattr(own, name)
            theirs = name == "forward" or not (name.startswith("__") or hasattr(nn.Module, name))
            if theirs and inspect.isfunction(method):
                setattr(cls, name, _walking(name, method))


def _walking(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def walking(self: Any, *args: Any, **kwargs: Any) -> Any:
        manner = self._evo_walkers.get(name)
        if manner is None:
            return getattr(host_class(self), name)(self, *args, **kwargs)
        refuse_symbolic(args, kwargs)
        # A checkpointed block may depend on its arguments only, so it takes and returns the full grid.
        compact = manner is Manner.PLAIN or (manner is Manner.CHECKPOINTED and not torch.is_grad_enabled())
        return walk(self, name, *args, compact=compact, grid=_grid_of(self, args), **kwargs)

    return walking


def _grid_of(host: SlowFastOwn, args: tuple[Any, ...]) -> tuple[int, int] | None:
    """Where the host itself takes images: rows and columns of their patches, if these are whole."""
    size = host._evo_state.spec.patch_size if host._evo_takes_images else None
    if size is None or not args or not isinstance(args[0], Tensor) or args[0].dim() != 4:
        return None
    height, width = args[0].shape[2:]
    whole = not is_fixed(height) or not is_fixed(width) or (height % size[0] == 0 and width % size[1] == 0)
    return (height // size[0], width // size[1]) if whole else None


class OwnModel(Adapter):
    """Serves one host as its owner describes it. Other arguments as for `evopatch.apply`.

    Args:
        model: The whole model.
        tried: Whether the number of prefix tokens is compared with what comes to the blocks of an image.

    Raises:
        ConfigError: If there is no such container, or an argument doesn't fit it.
        UnsupportedModelError: If its blocks can't be patched, or nobody walks over them.
    """

    mixin = SlowFastOwn

    def __init__(
        self,
        model: nn.Module,
        blocks: str,
        prefix_tokens: int | None,
        readout: int | None,
        token_inputs: Sequence[str] = (),
        images: Tensor | None = None,
        tried: bool = True,
    ) -> None:
        container = container_of(model, blocks)
        _check_modules(container, blocks)
        prefix, readout = self._numbers(prefix_tokens, readout)
        self.host_name, path = walked_by(model, blocks)
        self.host = model.get_submodule(self.host_name)
        check_forward(self.host, self.host_name or "the model")
        self._walkers = walkers_of(self.host, path)
        names = [f"{blocks}.{name}" for name in container._modules]
        tried_blocks: list[nn.Module] = list(container)
        adds = isinstance(container[0], nn.ModuleList)
        if adds:
            check_parts(self.host, path, dict(zip(names, container, strict=True)))
            names, tried_blocks = [f"{name}.0" for name in names], [Summed(block) for block in container]
        first = model.get_submodule(names[0])
        absent = _other_inputs(first, names[0], token_inputs)
        trace = TraceSpec(tuple(token_inputs), absent=tuple(name for name in absent if name not in token_inputs))
        for name in names:
            _check_attends(model.get_submodule(name), name, trace)
        channels = width_of(first)
        if channels is None:
            raise UnsupportedModelError(
                f"{names[0]} ({type(first).__name__}): no layer says how many channels its tokens have"
            )
        seen = try_out(model, self.host_name, names[0], channels, images) if tried else None
        probed = dict(zip(names, tried_blocks, strict=True))
        tokens_first = _tokens_first(probed, channels, prefix, token_inputs, absent, seen)
        patch_size = patch_size_of(model)
        self._takes_images = self.host is model or first_convolution(model) in [*self.host.modules()]
        if seen is not None:
            sizes = patch_sizes(model)
            seen.check(tokens_first, prefix, sizes)
            patch_size = seen.patch_size(seen.count(tokens_first) - prefix, sizes)
            self._takes_images = seen.to_host
        self._spec = HostSpec(
            blocks=(tuple(parts(path, container)),) if adds else path,
            adds=adds,
            prefix=prefix,
            readout=readout,
            trace=trace,
            token_inputs=tuple(token_inputs),
            tokens_first=tokens_first,
            patch_size=patch_size,
        )

    @staticmethod
    def _numbers(prefix_tokens: int | None, readout: int | None) -> tuple[int, int]:
        if not isinstance(prefix_tokens, int) or prefix_tokens < 0:
            raise ConfigError(
                f"blocks was given, and prefix_tokens={prefix_tokens!r}: expected how many tokens precede the patch "
                "tokens (1 for a class token, 1 more for each register, 0 for none)"
            )
        if readout is not None and not 0 <= readout <= prefix_tokens:
            raise ConfigError(
                f"readout={readout!r}: expected how many of the {prefix_tokens} prefix tokens the head reads, "
                "or 0 where it averages the patch tokens"
            )
        return prefix_tokens, min(prefix_tokens, 1) if readout is None else readout

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (type(self.host),)

    def inspect(self, host: nn.Module, name: str) -> HostSpec:
        return self._spec

    def plan(self, host: nn.Module, state: Any) -> Any:
        first, *others = super().plan(host, state)
        attributes = {**first.attributes, "_evo_walkers": self._walkers, "_evo_takes_images": self._takes_images}
        # Of the parts of a block the first one attends, and has changes of its own.
        later = [Change(host.get_submodule(path), Steered, {}) for _, *paths in state.blocks for path in paths]
        return [Change(first.module, first.mixin, attributes), *others, *later]


def _other_inputs(block: nn.Module, name: str, token_inputs: Sequence[str]) -> list[str]:
    """The inputs of a block beside its tokens that have no default, or that were named."""
    _, *others = list(inspect.signature(forward_of(block)).parameters.values())[1:]
    named = [p for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in others)
    for wanted in token_inputs:
        if not open_ended and wanted not in {p.name for p in named}:
            raise ConfigError(
                f"token_inputs has {wanted!r}, and {name} ({type(block).__name__}) takes "
                f"{', '.join(p.name for p in named) or 'nothing beside the tokens'}"
            )
    return [p.name for p in named if p.default is p.empty or p.name in token_inputs]


def _check_modules(container: Any, path: str) -> None:
    """
    Args:
        container: Of blocks, or of lists of their parts.
        path: Its own.

    Raises:
        UnsupportedModelError: If there is None in the place of one.
    """
    for name, block in container._modules.items():
        if block is None:
            raise UnsupportedModelError(
                f"{path}.{name} is None: expected a module at every place of the container. Leave out those that the "
                "model doesn't call, or leave the model unpatched"
            )
        if isinstance(block, nn.ModuleList):
            _check_modules(block, f"{path}.{name}")


def _check_attends(block: nn.Module, name: str, trace: TraceSpec) -> None:
    if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
        raise UnsupportedModelError(
            f"{name} is a {type(block).__name__}: expected a block that is called, or lists of parts at every place of "
            "the container"
        )
    if not attention_cores(block, trace):
        raise UnsupportedModelError(
            f"{name} ({type(block).__name__}) holds no attention: expected scaled_dot_product_attention, "
            "nn.MultiheadAttention, or a softmax of logits, in the block or in a module that it calls. Give another "
            "container, see evopatch.inspect(model)"
        )


def _tokens_first(
    blocks: Mapping[str, nn.Module],
    channels: int,
    prefix: int,
    token_inputs: Sequence[str],
    absent: Sequence[str],
    seen: Tried | None,
) -> bool:
    """Whether the blocks, by the name of what the model calls, take `(T, B, C)`; each structure of them was probed."""
    name, first = next(iter(blocks.items()))
    inputs = {} if seen is None else seen.inputs
    tables = {given: inputs[given] for given in token_inputs if inputs.get(given) is not None}
    others = [other for other in absent if other not in tables]
    layouts = {
        name: takes_tokens_first(block, name, channels, prefix, others, tables) for name, block in _kinds(blocks)
    }
    if len(set(layouts.values())) > 1:
        raise UnsupportedModelError(f"some blocks take (B, T, C) and some (T, B, C): {', '.join(layouts)}")
    tokens_first = layouts[name]
    if tokens_first and isinstance(first, Summed):
        raise UnsupportedModelError(f"the parts of {name.rpartition('.')[0]} take (T, B, C): expected (B, T, C)")
    return tokens_first


def _kinds(blocks: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """The first block of each structure, by the classes of the modules in it."""
    found: dict[tuple[Any, ...], tuple[str, nn.Module]] = {}
    for name, block in blocks.items():
        found.setdefault(tuple((path, type(inner)) for path, inner in block.named_modules()), (name, block))
    return list(found.values())
