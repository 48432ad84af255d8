"""A patched block: its own forward, with its attention core handed to a tap.

The block runs on a view of itself in which its attention modules are called with the tap. Only an attention module's
code is generated; where the attention core is in the block's own forward (parallel scaling blocks), the block's is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from ..algorithm.importance import detached
from ..errors import UnsupportedInputError
from ..rewrite.classes import Steered
from ..rewrite.fast_paths import forward_of
from ..rewrite.generated import GeneratesCode
from ..rewrite.graph import Code, generate_core, generate_metric
from ..rewrite.tracing import TraceSpec, attention_cores
from ..rewrite.view import Call, ContainerView, check_steered, is_looked_into, on_view, view_of
from .guarded import GuardedBlock
from .protocols import PatchedBlock
from .tap import AttentionTap


class SlowFastBlock(GeneratesCode, GuardedBlock):
    """Mixin of a patched block."""

    _evo_always = "_evo_metric"
    _evo_cores: tuple[str, ...]
    """Paths in it of the modules whose forward holds an attention core; `""` for the block itself."""
    _evo_metric: Code
    """Gives the tokens as the attention sees them."""
    _evo_code: Code | None
    """Its own forward, where that holds the attention core."""
    training: bool

    @staticmethod
    def _evo_traceable(block: nn.Module, cores: tuple[str, ...]) -> nn.Module:
        """What is traced in a block's place."""
        return block

    def _evo_generate(self) -> None:
        module: Any = self
        self.__dict__.update(block_codes(type(self), module, self._evo_name, self._evo_state.spec.trace))


class TappedAttention(GeneratesCode, Steered):
    """Mixin of a patched attention module."""

    _evo_always = "_evo_code"
    _evo_name: str
    _evo_trace: TraceSpec
    _evo_code: Code
    training: bool

    def _evo_run(self, tap: AttentionTap, *args: Any, **kwargs: Any) -> Any:
        """The generated forward, with a tap."""
        self._evo_refresh()
        code = self._evo_code
        named = dict(zip(code.parameters, args, strict=False)) | kwargs
        x = named.pop(code.parameters[0])
        inputs = tuple(named.pop(name, None) for name in code.inputs)
        seen: Any = self
        if tap.full_grid is not None:
            seen = tapped_view(seen, (), tap)
        return run_code(code, seen, x, inputs, tap.everything, self._evo_hand(tap, named))

    def _evo_hand(self, tap: AttentionTap, others: dict[str, Any]) -> Any:
        """What the generated code calls.

        Args:
            tap: This run's.
            others: What the module was called with beside the tokens and the inputs that its adapter names.
        """
        for name, value in others.items():
            if value is not None and value is not False:
                raise UnsupportedInputError(
                    f"{self._evo_name} was called with {name}, which the patched attention can't honour: leave it out, "
                    "or use evopatch.set_keep_ratio(model, 1.0) or evopatch.remove(model) for this call"
                )
        return tap

    @staticmethod
    def _evo_traceable(attention: nn.Module) -> nn.Module:
        """What is traced in an attention module's place."""
        return attention

    def _evo_generate(self) -> None:
        module: Any = self
        self.__dict__["_evo_code"] = generate_core(self._evo_traceable(module), self._evo_name, self._evo_trace)


Patch = TypeVar("Patch", bound=Steered)
_OVER_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def block_codes(mixin: type[SlowFastBlock], block: nn.Module, name: str, trace: TraceSpec) -> dict[str, Any]:
    """What a patched block gets from tracing.

    Raises:
        AttentionNotFoundError: If it can't be traced, or has no attention core of a known form.
    """
    cores = attention_cores(block, trace)
    traced = mixin._evo_traceable(block, cores)
    code = generate_core(traced, name, trace) if "" in cores else None
    return {"_evo_cores": cores, "_evo_metric": generate_metric(traced, name, trace), "_evo_code": code}


def attention_of(block: SlowFastBlock) -> TappedAttention | None:
    """A block's one attention module, its code up to date; None where the block itself or several attend."""
    block._evo_refresh()
    if len(block._evo_cores) != 1 or not block._evo_cores[0]:
        return None
    module: Any = block
    attention = unwrapped(module.get_submodule(block._evo_cores[0]), TappedAttention)
    if attention is not None:
        attention._evo_refresh()
    return attention


def unwrapped(module: nn.Module, mixin: type[Patch]) -> Patch | None:
    """A patched module, or the one that a wrapper holds."""
    if isinstance(module, mixin):
        return module
    inner: Any = next((child for child in module.children() if isinstance(child, mixin)), None)
    found: Patch | None = inner
    return found


def layer_norm_of(block: Any) -> nn.LayerNorm | None:
    """The layer norm that makes of a block's input what the projection before its attention core sees; None where that
    is anything else, or isn't there."""
    path = block._evo_metric.norm
    norm: Any = None if path is None else block.get_submodule(path)
    if not isinstance(norm, nn.LayerNorm) or "forward" in norm.__dict__:
        return None
    affine: bool = norm.weight is not None and norm.bias is not None
    return norm if affine else None


def can_read_out(block: Any) -> bool:
    """Whether there is code for a block where only the prefix tokens go through, and nothing in it that would make of
    them what it makes of other ones, too."""
    if block.training and any(isinstance(inner, _OVER_BATCH) for inner in block.modules()):
        return False
    if block._evo_code is not None:
        return len(block._evo_cores) == 1 and bool(block._evo_code.readout)
    attention = attention_of(block)
    # A wrapper may look at the tokens.
    if attention is None or attention is not block.get_submodule(block._evo_cores[0]):
        return False
    return bool(block._evo_metric.readout and attention._evo_code.readout)


def seen_tokens(block: PatchedBlock, x: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Tokens as the projection before a block's attention core would see them, without a gradient.

    Args:
        block: Needn't be the one that runs.
        x: In the block's layout.
        inputs: What blocks get beside the tokens.
    """
    code = block._evo_metric
    named = tuple(inputs[name] for name in code.inputs)
    tokens: Tensor = code.functions[block.training](block, x.detach(), named, None, block)
    # Those of several windows may come as one image.
    return detached(tokens).reshape(*x.shape[:-1], tokens.shape[-1])


def answering_tokens(block: PatchedBlock, x: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """`(B, M, C)` tokens as the module with a block's one attention core is given them."""
    if block._evo_code is not None:
        return x
    tokens: Tensor = block._evo_metric.readout[block.training](block, x, inputs, None, block)
    return tokens


def run_tapped(block: PatchedBlock, tap: AttentionTap, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A block's own forward with its attention cores handed to a tap; other arguments as the block takes them."""
    view = tapped_view(block, block._evo_cores, tap)
    code: Code | None = block._evo_code
    if code is None:
        return on_view(forward_of(block), view, x, *args, **kwargs)
    inputs = tuple(kwargs.get(name) for name in code.inputs)
    return run_code(code, view, x, inputs, tap.everything, tap)


def run_code(code: Code, module: Any, x: Tensor, inputs: tuple[Any, ...], everything: Tensor | None, tap: Any) -> Any:
    """Generated code of a module with an attention core.

    Args:
        code: The module's.
        module: It, or a view of it.
        x: `(B, M, C)`; `(B, P, C)` where only the prefix tokens go through.
        inputs: Of the module, those that its adapter names.
        everything: `(B, M, C)` where only the prefix tokens go through.
        tap: What the attention core is handed to.
    """
    if everything is None:
        return code.functions[module.training](module, x, inputs, tap, module)
    return code.readout[module.training](module, x, inputs, everything, tap, module)


def tapped_view(module: Any, cores: tuple[str, ...], tap: AttentionTap, path: str = "") -> Any:
    """A module whose own forward reaches the attention modules at these paths with a tap; itself without any.

    Args:
        module: The block, or a module in it.
        cores: Paths in the module.
        tap: This run's.
        path: Of the module in the block, for errors.
    """
    changed: dict[str, Any] = {}
    for name, child in module._modules.items():
        inner = tuple(core[len(name) + 1 :] for core in cores if core == name or core.startswith(f"{name}."))
        if child is not None and (inner or tap.full_grid is not None):
            seen = _seen(child, inner, tap, f"{path}.{name}")
            if seen is not child:
                changed[name] = seen
    return view_of(module, {**module._modules, **changed}) if changed else module


def _seen(child: nn.Module, cores: tuple[str, ...], tap: AttentionTap, path: str) -> Any:
    """What a module sees in place of a child."""
    if is_looked_into(child):
        return tapped_view(child, cores, tap, path)
    full_grid = tap.full_grid if tap.full_grid is not None and tap.full_grid.wants(child) else None
    if not cores:
        return child if full_grid is None else full_grid.around(child)
    attends = "" in cores
    check_steered(child, f"{tap.block}{path}", TappedAttention if attends else Steered)
    run = partial(_run_attention, tap=tap) if attends else partial(_run_around, cores=cores, tap=tap, path=path)
    return Call(child, run) if full_grid is None else full_grid.around_run(child, run)


def _run_attention(module: Any, *args: Any, tap: AttentionTap, **kwargs: Any) -> Any:
    return module._evo_run(tap, *args, **kwargs)


def _run_around(module: Any, *args: Any, cores: tuple[str, ...], tap: AttentionTap, path: str, **kwargs: Any) -> Any:
    view = tapped_view(module, cores, tap, path)
    if isinstance(view, ContainerView):
        return view.run(module, *args)
    return on_view(forward_of(module), view, *args, **kwargs)
