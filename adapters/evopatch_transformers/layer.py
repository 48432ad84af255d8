"""Layers of transformers' models: called by their model with its keyword arguments, in which the state travels.

No model's class is swapped: transformers finds by class which hidden states and attentions a model records.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from evopatch.errors import BypassError, UnsupportedModelError
from evopatch.forward.block import SlowFastBlock, run_tapped
from evopatch.forward.host_state import HostState
from evopatch.forward.spec import qualified
from evopatch.forward.tap import AttentionTap
from evopatch.forward.tokens import TokenPass
from evopatch.forward.walk import refuse_symbolic
from evopatch.patching.adapter import Change, block_changes, named_blocks
from evopatch.rewrite.tracing import attention_cores
from evopatch.rewrite.view import check_steered

from . import heads, interface
from .passing import passes_keywords
from .recording import is_recorded


class SlowFastLayer(SlowFastBlock):
    """Mixin of a patched layer."""

    _evo_index: int

    def forward(self, *args: Any, evo_pass: TokenPass | None = None, **kwargs: Any) -> Any:
        """The layer's own forward, on the compact set where the forward pass has one."""
        own = self._evo_host_class.forward
        if evo_pass is None:
            return SlowFastBlock.forward(self, *args, **kwargs)
        named = dict(zip(("hidden_states", "attention_mask"), args, strict=False)) | kwargs
        hidden_states, attention_mask = named.pop("hidden_states"), named.pop("attention_mask", None)
        if named.get("is_causal"):
            evo_pass.refuse("is_causal", self._evo_index)
        if named.get("output_hidden_states"):  # also asked for by a pre-hook that ran after ours
            evo_pass.compact = False
        if attention_mask is not None and not evo_pass.active:
            evo_pass.reads_prefix = False  # where no tokens are chosen masks are the attention's own business
        elif attention_mask is not None:
            if not torch.compiler.is_exporting() and not isinstance(attention_mask, BlockMask):
                evo_pass.refuse("attention_mask", self._evo_index)
            if self._evo_index == 0:
                _assert_nothing_masked(attention_mask)
            attention_mask = None

        # Not all take one.
        masks = {"attention_mask": attention_mask} if "attention_mask" in self._evo_metric.parameters else {}

        def run(x: Tensor, inputs: dict[str, Any], tap: AttentionTap | None) -> Tensor:
            if tap is None:
                return cast(Tensor, own(self, x, **masks, **inputs))
            return cast(Tensor, run_tapped(self, tap, x, **masks, **inputs))

        return evo_pass.advance(self._evo_index, self, hidden_states, named, run)

    @staticmethod
    def _evo_traceable(block: nn.Module, cores: tuple[str, ...]) -> nn.Module:
        return interface.traceable(block, cores[-1])


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
    check_passes_keywords(host, state.name)
    changes = [Change(host, None, {"_evo_state": state}, pre_hook=start_pass)]
    for index, (name, layer) in enumerate(named_blocks(host, state)):
        cores = attention_cores(layer, state.spec.trace)
        if not cores:
            raise UnsupportedModelError(
                f"{name} ({type(layer).__name__}) holds no attention module that calls transformers' attention "
                "interface: expected one. Leave the model unpatched, or register an adapter for it"
            )
        interface.eager_function(layer.get_submodule(cores[-1]))
        layer_change, *others = block_changes(layer, name, state, SlowFastLayer, interface.TappedInterface)
        own = {**layer_change.attributes, "_evo_index": index}
        changes += [dataclasses.replace(layer_change, attributes=own), *others]
    return changes


def check_passes_keywords(host: nn.Module, name: str) -> None:
    """
    Raises:
        UnsupportedModelError: If the host's forward takes no keyword arguments, or doesn't pass them on to its layers.
    """
    parameters = inspect.signature(type(host).forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise UnsupportedModelError(
            f"the forward of '{name or 'model'}' ({type(host).__module__}.{type(host).__qualname__}) takes no "
            "**kwargs: expected it to take them and pass them on to its layers, as transformers' models do, since the "
            "state of a forward pass travels in them. Add **kwargs to it"
        )
    if not passes_keywords(type(host)):
        raise UnsupportedModelError(
            f"the forward of '{name or 'model'}' ({type(host).__module__}.{type(host).__qualname__}) doesn't pass its "
            f"**kwargs on to its layers in transformers {transformers.__version__}: expected it to, since the state of "
            "a forward pass travels in them. Use a newer version of transformers (5.18 does so for DINOv2)"
        )


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
    # Hidden states are recorded between the layers, and a checkpointed layer may depend on its arguments only: in both
    # cases layers take and return the full grid.
    asked = kwargs.get("output_hidden_states", getattr(host.config, "output_hidden_states", False))
    checkpointed = any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers.values())
    recorded = asked or is_recorded("hidden_states")
    forward_pass = TokenPass(state, compact=not recorded and not checkpointed)
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
