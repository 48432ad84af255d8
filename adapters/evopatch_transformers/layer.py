"""Layers of transformers' models: called by their model with its keyword arguments, in which the state travels.

No model's class is swapped: transformers finds by class which hidden states and attentions a model records.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from evopatch import graph
from evopatch.adapter import Swap, check_forward, named_blocks
from evopatch.attention import AttentionTap
from evopatch.errors import BypassError, UnsupportedModelError
from evopatch.stream import Patch, Stream
from evopatch.swap import Swapped

from . import interface


class SlowFastLayer(Swapped):
    """Mixin of a patched layer."""

    _evo_patch: Patch
    _evo_name: str
    _evo_index: int
    _evo_attention: str
    _evo_code: graph.BlockCode | None
    training: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | BlockMask | None = None,
        *,
        evo_stream: Stream | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The layer's own forward, on the compact set where the forward pass has one."""
        own = self._evo_host_class.forward
        if evo_stream is None:
            self._evo_patch.refuse_bypass(self._evo_name)
            unpatched: Tensor = own(self, hidden_states, attention_mask, **kwargs)
            return unpatched
        if kwargs.get("is_causal"):
            evo_stream.refuse("is_causal", self._evo_index)
        if kwargs.get("output_hidden_states"):  # also asked for by a pre-hook that ran after ours
            evo_stream.compact = False
        if attention_mask is not None and evo_stream.active:
            if not torch.compiler.is_exporting() and not isinstance(attention_mask, BlockMask):
                evo_stream.refuse("attention_mask", self._evo_index)
            if self._evo_index == 0:
                _assert_nothing_masked(attention_mask)
            attention_mask = None

        def run(x: Tensor, inputs: dict[str, Any], tap: AttentionTap | None) -> Tensor:
            # A tap is passed on to the attention module, as every keyword argument is.
            tapped = {} if tap is None else {"evo": tap}
            out: Tensor = own(self, x, attention_mask, **{**kwargs, **inputs, **tapped})
            return out

        return evo_stream.advance(self._evo_index, self, hidden_states, kwargs, run)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self._evo_code is None:  # from a pickle
            view = interface.traceable(self, self._evo_attention)  # type: ignore[arg-type]
            self._evo_code = graph.generate(view, self._evo_name, self._evo_patch.spec.trace)


def _assert_nothing_masked(mask: Tensor | BlockMask) -> None:
    # While exporting, and always for flex attention, transformers makes a mask even where nothing is masked. Whether
    # something is gets checked when the values are there, without waiting for them.
    if isinstance(mask, BlockMask):
        batch, _, queries, keys = mask.shape
        mask = create_mask(mask.mask_mod, batch, None, queries, keys, device=mask.kv_num_blocks.device)
    nothing = mask.all() if mask.dtype == torch.bool else (mask == 0).all()
    torch._assert_async(nothing, "a patched model can't be given an attention mask that masks tokens")


def plan(host: nn.Module, patch: Patch) -> list[Swap]:
    """Every change to a host, its layers and their attention modules.

    Raises:
        UnsupportedModelError: If a layer can't be patched; names it.
    """
    trace = patch.spec.trace
    swaps = [Swap(host, None, {"_evo_patch": patch}, pre_hook=start_stream)]
    for index, (name, layer) in enumerate(named_blocks(host, patch)):
        inner = graph.traced_through(layer, trace)
        if not inner:
            raise UnsupportedModelError(
                f"{name} ({type(layer).__name__}) holds no attention module that calls transformers' attention "
                "interface: expected one. Leave the model unpatched, or register an adapter for it"
            )
        attention_path = inner[-1]
        attention, attention_name = layer.get_submodule(attention_path), f"{name}.{attention_path}"
        check_forward(attention, attention_name)
        code = graph.generate(interface.traceable(layer, attention_path), name, trace)
        own = {"_evo_patch": patch, "_evo_name": name, "_evo_index": index, "_evo_attention": attention_path}
        swaps.append(Swap(layer, SlowFastLayer, {**own, "_evo_code": code}))
        tapped = {"_evo_name": attention_name, "_evo_trace": trace, "_evo_eager": interface.eager_function(attention)}
        attention_code = interface.generate(attention, attention_name, trace)
        swaps.append(Swap(attention, interface.TappedAttention, {**tapped, "_evo_code": attention_code}))
    return swaps


def start_stream(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a host: a new state for this forward pass, among its keyword arguments.

    Raises:
        BypassError: If the layers aren't those that were patched.
    """
    patch: Patch = host._evo_patch
    layers = list(host.get_submodule(patch.spec.blocks))
    if [getattr(layer, "_evo_index", None) for layer in layers] != list(range(patch.depth)):
        raise BypassError(
            f"'{patch.name or type(host).__name__}' has other layers in '{patch.spec.blocks}' than the {patch.depth} "
            "that were patched, and keep ratios go by depth: use evopatch.remove(model) before changing them, and "
            "evopatch.apply after"
        )
    # Hidden states are recorded between the layers, and a checkpointed layer may depend on its arguments only: in both
    # cases layers take and return the full grid.
    recorded = kwargs.get("output_hidden_states", getattr(host.config, "output_hidden_states", False))
    # A wrapper around a layer, such as torch's checkpoint_wrapper, is taken for a checkpoint.
    checkpointed = any(
        not isinstance(layer, SlowFastLayer) or (layer.training and getattr(layer, "gradient_checkpointing", False))
        for layer in layers
    )
    stream = Stream(patch, patch.depth, compact=not recorded and not checkpointed)
    return args, {**kwargs, "evo_stream": stream}
