"""Layers of transformers' models: called by their model with its keyword arguments, in which the state travels.

No model's class is swapped: transformers finds by class which hidden states and attentions a model records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from evopatch.algorithm.rows import exporting
from evopatch.errors import BypassError, UnsupportedInputError
from evopatch.forward.beside import Beside
from evopatch.forward.block import SlowFastBlock, TappedAttention, run_tapped
from evopatch.forward.host_state import HostState
from evopatch.forward.spec import qualified
from evopatch.forward.tap import AttentionTap
from evopatch.forward.tokens import TokenPass
from evopatch.forward.walk import refuse_symbolic
from evopatch.patching.adapter import Change, block_changes, named_blocks
from evopatch.rewrite.view import check_steered

from . import heads, interface
from .recording import is_looked_between


class SlowFastLayer(SlowFastBlock):
    """Mixin of a patched layer."""

    _evo_index: int

    def forward(self, *args: Any, evo_pass: TokenPass | None = None, **kwargs: Any) -> Any:
        """The layer's own forward, on the compact set where the forward pass has one."""
        own = self._evo_host_class.forward
        if evo_pass is None:
            return SlowFastBlock.forward(self, *args, **kwargs)
        parameters = self._evo_metric.parameters
        named = dict(zip(parameters, args, strict=False)) | kwargs
        hidden_states, attention_mask = named.pop(parameters[0]), named.pop("attention_mask", None)
        if named.get("is_causal"):
            evo_pass.refuse("is_causal", self._evo_index)
        if named.get("output_hidden_states"):  # also asked for by a pre-hook that ran after ours
            evo_pass.compact = False
        if attention_mask is not None and not evo_pass.active:
            evo_pass.reads_prefix = False  # where no tokens are chosen masks are the attention's own business
        elif "attention_mask" in evo_pass.spec.trace.inputs:  # the model's own position bias
            self._evo_check_bias(evo_pass, named)
        elif attention_mask is not None and _is_made_anyway(attention_mask, evo_pass):
            if self._evo_index == 0:
                _assert_nothing_masked(attention_mask)
            attention_mask = None
        elif isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            raise UnsupportedInputError(
                f"{self._evo_name} was given an attention mask by token, as flash attention takes it, and groups of "
                "tokens weigh by their size, which it can't: use model.set_attn_implementation('sdpa')"
            )
        if attention_mask is not None or "attention_mask" in self._evo_metric.parameters:  # not all take one
            named["attention_mask"] = attention_mask
        for name, value in named.items():  # numbers, such as Trainer's num_items_in_batch, say nothing of tokens
            known = name in (*evo_pass.spec.trace.inputs, evo_pass.spec.mask)
            if isinstance(value, Tensor) and value.dim() and not known:
                evo_pass.refuse(name, self._evo_index)

        beside = Beside(self._evo_name)

        def run(x: Tensor, inputs: dict[str, Any], tap: AttentionTap | None) -> Tensor:
            return beside.tokens_of(own(self, x, **inputs) if tap is None else run_tapped(self, tap, x, **inputs))

        tokens = evo_pass.advance(self._evo_index, self, hidden_states, named, run)
        return beside.again(tokens, None)  # the interface gives attention between all tokens

    def _evo_check_bias(self, evo_pass: TokenPass, named: dict[str, Any]) -> None:
        # It is made anew for as many tokens as go through.
        if named.get("interpolate_pos_encoding"):
            evo_pass.refuse("interpolate_pos_encoding, by which a layer resizes its position bias,", self._evo_index)

    @staticmethod
    def _evo_traceable(block: nn.Module, cores: tuple[str, ...]) -> nn.Module:
        return interface.traceable(block, cores[-1])


def _is_made_anyway(mask: Tensor | BlockMask, evo_pass: TokenPass) -> bool:
    # While exporting, and always for flex attention, transformers makes a mask even where nothing is masked.
    return isinstance(mask, BlockMask) or (exporting() and not evo_pass.spec.pads)


def _assert_nothing_masked(mask: Tensor | BlockMask) -> None:
    # Checked when the values are there, without waiting for them.
    if isinstance(mask, BlockMask):
        batch, _, queries, keys = mask.shape
        mask = create_mask(mask.mask_mod, batch, None, queries, keys, device=mask.kv_num_blocks.device)
    nothing = mask.all() if mask.dtype == torch.bool else (mask == 0).all()
    torch._assert_async(nothing, "a patched model can't be given an attention mask that masks tokens")


def plan(
    host: nn.Module,
    state: HostState,
    mixin: type[SlowFastLayer],
    attention_mixin: Callable[[nn.Module], type[TappedAttention]],
) -> list[Change]:
    """Every change to a host, its layers and their attention modules.

    Args:
        host: Passes keyword arguments on to its layers.
        state: Its.
        mixin: For the layers.
        attention_mixin: For the attention modules of one of them.

    Raises:
        UnsupportedModelError: If a layer can't be patched; names it.
    """
    changes = [Change(host, None, {"_evo_state": state}, pre_hook=start_pass)]
    for index, (name, layer) in enumerate(named_blocks(host, state)):
        layer_change, *others = block_changes(layer, name, state, mixin, attention_mixin(layer))
        own = {**layer_change.attributes, "_evo_index": index}
        changes += [dataclasses.replace(layer_change, attributes=own), *others]
    return changes


def start_pass(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a host: a new state for this forward pass, among its keyword arguments.

    Raises:
        BypassError: If the layers aren't those that were patched.
    """
    state: HostState = host._evo_state
    container = str(state.spec.blocks)
    layers = dict(host.get_submodule(container).named_children())
    for number, (name, layer) in enumerate(layers.items()):
        path = qualified(state.name, container, name)
        check_steered(layer, path, SlowFastLayer)
        _check_index(layer, path, number)
    if len(layers) != state.depth:
        raise BypassError(
            f"'{state.name or type(host).__name__}' has {len(layers)} layers in '{container}' and had "
            f"{state.depth} when it was patched, and keep ratios go by depth: {_ADVICE}"
        )
    refuse_symbolic(args, kwargs)
    if state.active and "attention_mask" in state.spec.trace.inputs and kwargs.get("attention_mask") is not None:
        raise UnsupportedInputError(
            f"attention_mask was passed to '{state.name or type(host).__name__}', which adds its position bias to it: "
            "expected none while the model is patched. Leave it out, or use evopatch.set_keep_ratio(model, 1.0)"
        )
    forward_pass = TokenPass(state, compact=not is_looked_between(host, layers.values(), kwargs))
    kwargs = dict(kwargs)
    forward_pass.reads_prefix = heads.nobody_looks(host, kwargs)
    pixels = kwargs.get("pixel_values", args[0] if args else None)
    if isinstance(pixels, Tensor) and pixels.dim() == 4:
        forward_pass.grid = grid_of(host.config, (pixels.shape[-2], pixels.shape[-1]))
    forward_pass.depth = state.depth
    forward_pass.begin(layers.values())
    return args, {**kwargs, "evo_pass": forward_pass}


def grid_of(config: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patch tokens, by a model's configuration."""
    size = config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    return image_size[0] // height, image_size[1] // width


_ADVICE = "use evopatch.remove(model) before changing them, and evopatch.apply after"


def _check_index(layer: nn.Module, path: str, number: int) -> None:
    indices = [inner._evo_index for inner in (layer, *layer.children()) if isinstance(inner, SlowFastLayer)]
    if indices[0] != number:
        raise BypassError(
            f"{path} was layer {indices[0]} when the model was patched, and keep ratios go by depth: other layers were "
            f"added or removed; {_ADVICE}"
        )
