"""Attention logits in a graph: the product that they come from, and what is done to them before the softmax.

The log size of a group is added to the finished logits, which is exact as long as these are a function of each product
of a query and a key by itself, the same wherever the two tokens are.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import AttentionNotFoundError
from .factors import Sizes, factor_of
from .mixing import mixes_heads
from .products import CASTS, SCALINGS, by_head, nearest_product, product_of
from .replaced import adds_replaced
from .tracing import TraceSpec, softmax_of

_BY_ONE_NUMBER = {operator.add, operator.sub, torch.add, torch.sub, "add", "sub", "add_", "sub_"}
_BY_ELEMENT: set[Any] = {
    torch.tanh, torch.clamp, torch.clip, torch.nan_to_num, operator.neg, "tanh", "clamp", "clamp_", "clip",
    "nan_to_num", "neg",
}  # fmt: skip


def check_logits(softmax: fx.Node, block: nn.Module, name: str, spec: TraceSpec) -> None:
    """Whether a softmax is over the keys, and each of its logits made of one product alone.

    Args:
        softmax: Any call of one.
        block: The module that the graph is of.
        name: Its fully qualified name, for errors.
        spec: What the adapter knows about it.

    Raises:
        AttentionNotFoundError: If not.
    """
    dim, node = _dim(softmax, block), softmax.args[0]
    while isinstance(node, fx.Node):
        if product_of(node) is not None:
            if dim in (-1, 2 if node.target in (torch.bmm, "bmm") else 3):
                return
            raise AttentionNotFoundError(
                f"{name} ({type(block).__name__}): the softmax '{softmax}' is over axis {dim}; expected the last one, "
                "of attention logits (B, H, T, T) or (B * H, T, T). Leave the model unpatched, or write the attention "
                "in that layout"
            )
        before = _before(node, block, spec)
        if before is None:
            break
        node = before
    raise AttentionNotFoundError(
        f"{name} ({type(block).__name__}): the graph node '{node}' "
        f"({getattr(node, 'op', '?')} {getattr(node, 'target', '?')}) stands between the product of queries and keys "
        "and the softmax; expected nothing but factors that are the same for all tokens, and functions of single "
        "logits. If it adds a position bias, let the attention call torch's scaled_dot_product_attention, whose "
        "position bias evopatch averages for the compact set; a model of timm does if it is created with fused "
        "attention (timm.layers.set_fused_attn(True) before)"
    )


def _before(node: fx.Node, block: nn.Module, spec: TraceSpec) -> Any:
    """The logits that a node changes in a way that is the same for all tokens; None where it does anything else."""
    if mixes_heads(node, spec):
        return node.args[0]
    if node.op == "call_method" and node.target == "add_position_bias":
        return node.args[1]
    if adds_replaced(node, spec):
        return node.args[1 if node.op == "call_method" else 0]
    if node.op not in ("call_function", "call_method"):
        return None
    if getattr(node.target, "__name__", "") == "maybe_add_mask":  # masks are refused before the module is called
        return node.args[0]
    if node.op == "call_method" and node.target in CASTS:
        return node.args[0]
    if node.target in (operator.sub, torch.sub, "sub", "sub_") and _is_maximum(node.args[1], node.args[0]):
        return node.args[0]  # changes no softmax
    operands = [value for value in (*node.args[1:], *node.kwargs.values()) if isinstance(value, fx.Node)]
    if node.target in _BY_ELEMENT or node.target in _BY_ONE_NUMBER:
        return None if operands else next(value for value in node.args if isinstance(value, fx.Node))
    if node.target in SCALINGS:
        scaled = scaled_by(node, block, Sizes(by_head(*nearest_product(node) or (None, None))))
        return None if scaled is None else scaled[0]
    return None


def scaled_by(node: fx.Node, module: nn.Module, sizes: Sizes) -> tuple[Any, float | Tensor] | None:
    """What a node multiplies or divides, and by how much, if that is the same for all tokens.

    Args:
        node: Any.
        module: That the graph is of.
        sizes: Those in the graph.

    Returns:
        None where it does anything else.
    """
    if node.op not in ("call_function", "call_method") or node.target not in SCALINGS or node.kwargs:
        return None
    power, (first, second) = SCALINGS[node.target], node.args[:2]
    factor = factor_of(second, module, sizes)
    if factor is not None:
        return first, factor**power
    factor = factor_of(first, module, sizes) if power == 1 else None
    return None if factor is None else (second, factor)


def _is_maximum(node: Any, logits: Any) -> bool:
    """Whether a node is the largest logit of each query."""
    if isinstance(node, fx.Node) and node.op == "call_method" and node.target == "detach":
        node = node.args[0]
    if isinstance(node, fx.Node) and node.op == "call_function" and node.target in (operator.getitem, getattr):
        node = node.args[0] if node.args[1] in (0, "values") else None
    if not isinstance(node, fx.Node) or node.args[:1] != (logits,):
        return False
    if node.target not in ("amax", "max", torch.amax, torch.max):
        return False
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    return given == {"dim": -1, "keepdim": True}


def _dim(softmax: fx.Node, block: nn.Module) -> Any:
    if softmax.target is softmax_of:
        module: Any = softmax.args[1]
        return getattr(block.get_submodule(str(module.target)), "dim", None)
    return softmax.kwargs["dim"] if "dim" in softmax.kwargs else (*softmax.args, None)[1]
