"""timm Swin and Swin V2: pyramids of windowed blocks; compact sets are of whole windows, or of smaller windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import Tensor, nn

from evopatch.adapter import Adapter, HostSpec, Swap, named_blocks
from evopatch.stream import Patch, walk
from evopatch.swap import Swapped
from evopatch.window_stream import BlockView, Cut, MaskByHead, SlowFastWindowBlock, WindowedBlocks, WindowStream
from evopatch.windows import Windows, continuous_bias, cosine_logits


class _Swin(WindowedBlocks):
    attention = "attn"
    single: Mapping[str, Any] = {
        "window_size": (1, 1),
        "window_area": 1,
        "shift_size": (0, 0),
        "attn_mask": None,
        "dynamic_mask": False,
    }

    def cut(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Cut:
        windows = Windows((x.shape[1], x.shape[2]), tuple(block.window_size), tuple(block.shift_size), pads_first=False)
        if not block.dynamic_mask:
            return Cut(windows, block.attn_mask)
        return Cut(windows, block.get_attn_mask(x.new_zeros(1, *windows.padded_grid, 1)))

    def call(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        return block.forward(x.unsqueeze(2)).squeeze(2), None

    def seen(self, block: Any, x: Tensor) -> Tensor:
        normalised: Tensor = block.norm1(x)
        return normalised

    def bias(self, attention: Any) -> Tensor:
        bias: Tensor = attention._get_rel_pos_bias()
        return bias.squeeze(0)

    def biased(self, attention: Any, bias: Tensor) -> Callable[..., Any]:
        return BlockView(attention, {"_get_rel_pos_bias": lambda: bias})

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        queries, keys = _heads(attention, attention.qkv(query))[0], _heads(attention, attention.qkv(key))[1]
        return (queries * attention.scale @ keys.transpose(2, 3)).squeeze(2)


class _SwinV2(_Swin):
    def seen(self, block: Any, x: Tensor) -> Tensor:
        return x

    def bias(self, attention: Any) -> Tensor:
        return continuous_bias(attention.cpb_mlp, attention.relative_coords_table, attention.relative_position_index)

    def biased(self, attention: Any, bias: Tensor) -> Callable[..., Any]:
        # Its own bias is that of a single place then, the same for all: no matter to a softmax.
        alone = {"window_size": (1, 1), "relative_position_index": attention.relative_position_index[:1, :1]}
        return partial(BlockView(attention, alone), mask=MaskByHead(bias))

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        query, key = attention.qkv(query), attention.qkv(key)
        if attention.q_bias is not None:
            query = query + F.pad(attention.q_bias, (0, 2 * attention.dim))
        queries, keys = _heads(attention, query)[0], _heads(attention, key)[1]
        return cosine_logits(queries, keys, attention.logit_scale).squeeze(2)


class _SwinV2Cr(_SwinV2):
    last_norm = "norm3"

    def bias(self, attention: Any) -> Tensor:
        bias: Tensor = attention._relative_positional_encodings()
        return bias.squeeze(0)

    def biased(self, attention: Any, bias: Tensor) -> Callable[..., Any]:
        return BlockView(attention, {"_relative_positional_encodings": lambda: bias})

    def logits(self, attention: Any, query: Tensor, key: Tensor) -> Tensor:
        queries, keys = _heads(attention, attention.qkv(query))[0], _heads(attention, attention.qkv(key))[1]
        return cosine_logits(queries, keys, attention.logit_scale.view(-1, 1, 1)).squeeze(2)


_KINDS = {SwinTransformer: _Swin, SwinTransformerV2: _SwinV2, SwinTransformerV2Cr: _SwinV2Cr}


def _heads(attention: Any, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys `(B, H, T, D)`."""
    q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k


class SlowFastSwin(Swapped):
    """Mixin of a patched timm Swin: the two methods that walk over the stages."""

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks."""
        return walk(self, "forward_features", *args, compact=True, stream_class=WindowStream, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks; intermediate features are those between the stages."""
        return walk(self, "forward_intermediates", *args, compact=True, stream_class=WindowStream, **kwargs)


class SwinAdapter(Adapter):
    """Swin and Swin V2."""

    mixin = SlowFastSwin

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return tuple(_KINDS)

    def inspect(self, host: Any, name: str) -> HostSpec:
        path = "stages" if isinstance(host, SwinTransformerV2Cr) else "layers"
        blocks = tuple(
            tuple((f"{path}.{number}.blocks.{index}",) for index in range(len(stage.blocks)))
            for number, stage in enumerate(getattr(host, path))
        )
        return HostSpec(blocks=blocks, prefix=0, readout=0)

    def plan(self, host: nn.Module, patch: Patch) -> list[Swap]:
        kind = next(kind for cls, kind in _KINDS.items() if isinstance(host, cls))()
        swaps = [Swap(host, self.mixin, {"_evo_patch": patch})]
        for name, block in named_blocks(host, patch):
            swaps.append(Swap(block, SlowFastWindowBlock, {"_evo_patch": patch, "_evo_name": name, "_evo_blocks": kind}))
        return swaps

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = host.patch_embed.patch_size
        return image_size[0] // rows, image_size[1] // columns
