"""Swin and Swin V2 of transformers, and every model that holds their encoders: with heads, as backbones, in detectors.

The class of an encoder that records outputs stays: the state travels in its keyword arguments. Swin V2's takes none,
and records nothing: it runs on a view.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.models.swin.modeling_swin import SwinEncoder
from transformers.models.swinv2.modeling_swinv2 import Swinv2Encoder

from evopatch.algorithm.window_bias import continuous_bias, cosine_logits
from evopatch.algorithm.windows import Windows
from evopatch.errors import UnsupportedInputError
from evopatch.forward.host_state import HostState
from evopatch.forward.spec import qualified
from evopatch.forward.walk import viewed
from evopatch.forward.window_blocks import Cut, MaskByHead, SlowFastWindowBlock, WindowedBlocks
from evopatch.forward.windowed import WindowedPass
from evopatch.patching.adapter import Adapter, Change, HostSpec, named_blocks
from evopatch.rewrite.classes import Steered, Swapped
from evopatch.rewrite.view import Call, View


class _Swin(WindowedBlocks):
    attention = "attention"
    single: Mapping[str, Any] = {"window_size": 1, "shift_size": 0}

    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        if not options.get("always_partition"):
            block.set_shift_and_window_size(inputs[0])  # as the block itself does now
        return _cut(block, x, inputs[0])

    def call(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        out, _ = block.forward(x, (x.shape[1], 1), **{**options, "always_partition": True})
        return out, (None,)

    def seen(self, block: Any, x: Tensor) -> Tensor:
        normalised: Tensor = block.layernorm_before.forward(x)  # its hooks are for the block's own run
        return normalised

    def bias(self, attention: Any) -> Tensor:
        bias: Tensor = attention.relative_position_bias()
        return bias.squeeze(0)

    def biased(self, attention: Any, bias: Tensor) -> tuple[View, dict[str, Any]]:
        return View(attention, {"relative_position_bias": lambda: bias}), {}

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        queries = attention.q_proj.forward(query).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        keys = attention.k_proj.forward(key).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        logits: Tensor = queries * attention.scaling @ keys.transpose(2, 3)
        return logits.squeeze(2)


class _Swinv2(_Swin):
    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        return _cut(block, x, inputs[0])

    def call(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        (out,) = block.forward(x, (x.shape[1], 1))
        return out, ()

    def seen(self, block: Any, x: Tensor) -> Tensor:
        return x

    def bias(self, attention: Any) -> Tensor:
        inner = attention.self
        return continuous_bias(
            inner.continuous_position_bias_mlp, inner.relative_coords_table, inner.relative_position_index
        )

    def masked(self, mask: Tensor | None) -> Any:
        return None if mask is None else MaskByHead(mask.unsqueeze(1))

    def biased(self, attention: Any, bias: Tensor) -> tuple[View, dict[str, Any]]:
        # Its own bias is that of a single place then, the same for all: no matter to a softmax.
        inner = attention.self
        alone = {"window_size": (1, 1), "relative_position_index": inner.relative_position_index[:1, :1]}
        seen = Call(inner, View(inner, alone).instead)
        return View(attention, {"self": seen}), {"attention_mask": MaskByHead(bias)}

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        inner = attention.self
        queries = inner.query.forward(query).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
        keys = inner.key.forward(key).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
        return cosine_logits(queries, keys, inner.logit_scale).squeeze(2)


def _cut(layer: Any, x: Tensor, grid: tuple[int, int]) -> Cut:
    windows = Windows((grid[0], grid[1]), (layer.window_size,) * 2, (layer.shift_size,) * 2, pads_first=True)
    if "device" not in inspect.signature(layer.get_attn_mask).parameters:  # Swin V2 before transformers 5.18
        mask = layer.get_attn_mask(*windows.padded_grid, dtype=x.dtype)
        return Cut(windows, None if mask is None else mask.to(x.device))
    return Cut(windows, layer.get_attn_mask(*windows.padded_grid, dtype=x.dtype, device=x.device))


class SlowFastStage(Swapped):
    """Mixin of a patched stage."""

    _evo_state: HostState
    _evo_name: str
    _evo_path: str

    def forward(self, *args: Any, evo_pass: WindowedPass | None = None, **kwargs: Any) -> Any:
        """The stage's own, on the steps of this forward."""
        if evo_pass is None:
            self._evo_state.refuse_bypass(self._evo_name)
            return self._evo_host_class.forward(self, *args, **kwargs)
        return viewed(self, evo_pass, self._evo_path).forward(*args, **kwargs)


class SlowFastEncoder(Swapped):
    """Mixin of a patched Swin V2 encoder."""

    _evo_state: HostState
    layers: nn.ModuleList

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's own, whose stages are given the state of this forward."""
        wanted = kwargs.get("output_attentions", args[2] if len(args) > 2 else False)
        forward_pass = _pass(self._evo_state, bool(wanted))
        stages = [partial(stage, evo_pass=forward_pass) for stage in self.layers]
        return View(self, {"layers": stages}).forward(*args, **kwargs)


def start_pass(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a Swin encoder: a new state for this forward pass, among its keyword arguments."""
    wanted = kwargs.get("output_attentions", getattr(host.config, "output_attentions", False))
    return args, {**kwargs, "evo_pass": _pass(host._evo_state, bool(wanted))}


def _pass(state: HostState, attentions_wanted: bool) -> WindowedPass:
    if attentions_wanted and state.active:
        raise UnsupportedInputError(
            f"output_attentions was asked of '{state.name or 'model'}', whose blocks attend inside windows of chosen "
            "or merged tokens: expected no such output while the model is patched. Leave it out, or use "
            "evopatch.set_keep_ratio(model, 1.0) or evopatch.remove(model) for this call"
        )
    forward_pass = WindowedPass(state)
    forward_pass.depth = state.depth
    return forward_pass


class SwinAdapter(Adapter):
    """The encoders, which loop over the stages."""

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (SwinEncoder, Swinv2Encoder)

    def inspect(self, host: Any, name: str) -> HostSpec:
        blocks = tuple(
            tuple((f"layers.{number}.blocks.{index}",) for index in range(len(stage.blocks)))
            for number, stage in enumerate(host.layers)
        )
        return HostSpec(blocks=blocks, prefix=0, readout=0, taper=0.0)

    def plan(self, host: Any, state: HostState) -> list[Change]:
        second = isinstance(host, Swinv2Encoder)
        kind = _Swinv2() if second else _Swin()
        changes = [
            Change(host, SlowFastEncoder if second else None, {"_evo_state": state}, None if second else start_pass)
        ]
        for number, stage in enumerate(host.layers):
            path = f"layers.{number}"
            name = qualified(state.name, path)
            changes.append(Change(stage, SlowFastStage, {"_evo_state": state, "_evo_name": name, "_evo_path": path}))
        for name, block in named_blocks(host, state):
            own = {"_evo_state": state, "_evo_name": name, "_evo_blocks": kind}
            changes += [Change(block, SlowFastWindowBlock, own), Change(block.get_submodule("attention"), Steered, {})]
            if second:
                changes.append(Change(block.get_submodule("attention.self"), Steered, {}))
        return changes

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        size = host.config.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        return -(-image_size[0] // height), -(-image_size[1] // width)
