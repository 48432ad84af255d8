"""torch's `multi_head_attention_forward` on slow and fast tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedInputError


def multi_head(
    attend: Callable[..., Tensor],
    block: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """Stands where a block calls `torch.nn.functional.multi_head_attention_forward`, whose arguments it takes.

    Args:
        attend: Stands for fused attention.
        block: Fully qualified name, for errors.
        query: `(M, B, C)`; key and value are the same tensor.

    Returns:
        `(M, B, C)`, and no weights.

    Raises:
        UnsupportedInputError: If it isn't self-attention among all tokens.
    """
    refused = {
        "another key or value than the query": key is not query or value is not query,
        "a mask": key_padding_mask is not None or attn_mask is not None or is_causal,
        "keys of its own": any(given is not None for given in (bias_k, bias_v, static_k, static_v)) or add_zero_attn,
    }
    for what, found in refused.items():
        if found:
            raise UnsupportedInputError(
                f"multi_head_attention_forward in {block} was called with {what}: expected self-attention among all "
                "tokens, which are chosen to ask and to answer. Leave the model unpatched"
            )
    tokens = query.transpose(0, 1)
    if use_separate_proj_weight:
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        projected = [F.linear(tokens, w, b) for w, b in zip(weights, biases, strict=True) if w is not None]
    else:
        assert in_proj_weight is not None
        projected = list(F.linear(tokens, in_proj_weight, in_proj_bias).chunk(3, dim=-1))
    heads = [part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in projected]
    out = attend(*heads, dropout_p=dropout_p if training else 0.0)
    return F.linear(out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias).transpose(0, 1), None
