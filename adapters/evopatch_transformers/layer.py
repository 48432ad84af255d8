"""Layers of transformers' models: called by their model with its keyword arguments, in which the state travels.

No model's class is swapped: transformers finds by class which hidden states and attentions a model records.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from evopatch.errors import BypassError, UnsupportedModelError
from evopatch.forward.tap import AttentionTap
from evopatch.forward.tokens import HostState, TokenPass
from evopatch.patching.adapter import Change, check_forward, named_blocks
from evopatch.rewrite import graph
from evopatch.rewrite.classes import Swapped

from . import interface


class SlowFastLayer(Swapped):
    """Mixin of a patched layer."""

    _evo_state: HostState
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
        evo_pass: TokenPass | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The layer's own forward, on the compact set where the forward pass has one."""
        own = self._evo_host_class.forward
        if evo_pass is None:
            self._evo_state.refuse_bypass(self._evo_name)
            unpatched: Tensor = own(self, hidden_states, attention_mask, **kwargs)
            return unpatched
        if kwargs.get("is_causal"):
            evo_pass.refuse("is_causal", self._evo_index)
        if kwargs.get("output_hidden_states"):  # also asked for by a pre-hook that ran after ours
            evo_pass.compact = False
        if attention_mask is not None and evo_pass.active:
            if not torch.compiler.is_exporting() and not isinstance(attention_mask, BlockMask):
                evo_pass.refuse("attention_mask", self._evo_index)
            if self._evo_index == 0:
                _assert_nothing_masked(attention_mask)
            attention_mask = None

        def run(x: Tensor, inputs: dict[str, Any], tap: AttentionTap | None) -> Tensor:
            # A tap is passed on to the attention module, as every keyword argument is.
            tapped = {} if tap is None else {"evo": tap}
            out: Tensor = own(self, x, attention_mask, **{**kwargs, **inputs, **tapped})
            return out

        return evo_pass.advance(self._evo_index, self, hidden_states, kwargs, run)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self._evo_code is None:  # from a pickle
            view = interface.traceable(self, self._evo_attention)  # type: ignore[arg-type]
            self._evo_code = graph.generate(view, self._evo_name, self._evo_state.spec.trace)


def _assert_nothing_masked(mask: Tensor | BlockMask) -> None:
    # While exporting, and always for flex attention, transformers makes a mask even where nothing is masked. Whether
    # something is gets checked when the values are there, without waiting for them.
    if isinstance(mask, BlockMask):
        batch, _, queries, keys = mask.shape
        mask = create_mask(mask.mask_mod, batch, None, queries, keys, device=mask.kv_num_blocks.device)
    nothing = mask.all() if mask.dtype == torch.bool else (mask == 0).all()
    torch._assert_async(nothing, "a patched model can't be given an attention mask that masks tokens")


def plan(host: nn.Module, state: HostState) -> list[Change]:
    """Every change to a host, its layers and their attention modules.

    Raises:
        UnsupportedModelError: If a layer can't be patched; names it.
    """
    trace = state.spec.trace
    changes = [Change(host, None, {"_evo_state": state}, pre_hook=start_pass)]
    for index, (name, layer) in enumerate(named_blocks(host, state)):
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
        own = {"_evo_state": state, "_evo_name": name, "_evo_index": index, "_evo_attention": attention_path}
        changes.append(Change(layer, SlowFastLayer, {**own, "_evo_code": code}))
        tapped = {"_evo_name": attention_name, "_evo_trace": trace, "_evo_eager": interface.eager_function(attention)}
        attention_code = interface.generate(attention, attention_name, trace)
        changes.append(Change(attention, interface.TappedAttention, {**tapped, "_evo_code": attention_code}))
    return changes


def start_pass(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a host: a new state for this forward pass, among its keyword arguments.

    Raises:
        BypassError: If the layers aren't those that were patched.
    """
    state: HostState = host._evo_state
    layers = list(host.get_submodule(state.spec.blocks))
    if [getattr(layer, "_evo_index", None) for layer in layers] != list(range(state.depth)):
        raise BypassError(
            f"'{state.name or type(host).__name__}' has other layers in '{state.spec.blocks}' than the {state.depth} "
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
    evo_pass = TokenPass(state, state.depth, compact=not recorded and not checkpointed)
    return args, {**kwargs, "evo_pass": evo_pass}
