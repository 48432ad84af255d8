"""torch's own transformer modules have a fast path past their submodules; here are their forwards without it.

These are what is traced, and run, in place of `nn.MultiheadAttention.forward` and `nn.TransformerEncoderLayer.forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .classes import host_class


def forward_of(module: object) -> Callable[..., Any]:
    """A module's own forward, without its fast path where it has one; as a function of the module."""
    own: Callable[..., Any] = host_class(module).forward
    return _WITHOUT.get(own, own)


def is_multihead(module: object) -> bool:
    """Whether a module's forward is that of `nn.MultiheadAttention`."""
    return host_class(module).forward is nn.MultiheadAttention.forward


def _multihead_attention(
    self: Any,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """Self-attention, `(B, M, C)` to the same whatever `batch_first` is, and no weights."""
    if self.in_proj_weight is None or self.bias_k is not None or self.add_zero_attn:
        raise ValueError(
            "nn.MultiheadAttention with keys or values of another size, bias_k, bias_v or add_zero_attn: expected "
            "self-attention of patch tokens alone"
        )
    batch, tokens = query.shape[0], query.shape[1]
    projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
    q, k, v = projected.reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
    out = out.transpose(1, 2).reshape(batch, tokens, self.embed_dim)
    return F.linear(out, self.out_proj.weight, self.out_proj.bias), None


def _encoder_layer(
    self: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    x: Tensor = src
    if self.norm_first:
        x = x + self._sa_block(self.norm1(x), None, None)
        x = x + self._ff_block(self.norm2(x))
    else:
        x = self.norm1(x + self._sa_block(x, None, None))
        x = self.norm2(x + self._ff_block(x))
    return x


_WITHOUT: dict[Callable[..., Any], Callable[..., Any]] = {
    nn.MultiheadAttention.forward: _multihead_attention,
    nn.TransformerEncoderLayer.forward: _encoder_layer,
}
