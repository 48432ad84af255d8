"""The linear layers that an attention module makes its queries and keys with, found in its graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .factors import Sizes, factor_of
from .linear_map import can_be_had, linear_map, parameter_can_be_had, parameter_map
from .logits import scaled_by
from .products import CASTS, by_head, nearest_product, product_of


@dataclass(frozen=True)
class Projection:
    """One of the equal parts of a linear layer's outputs."""

    path: str
    """Of the layer in the attention module; `""` for the module itself."""
    part: int
    parts: int
    weight: str = ""
    """Where the attention module has no layer, but weights of its own: their name, such as `"in_proj_weight"`."""
    bias: str = ""

    def of(self, rows: Tensor) -> Tensor:
        """Its rows of the layer's weight or bias."""
        size = rows.shape[0] // self.parts
        return rows.narrow(0, self.part * size, size)

    def linear_map(self, attention: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Of the whole layer, see `linear_map.linear_map`."""
        layer = attention.get_submodule(self.path)
        return parameter_map(layer, self.weight, self.bias, like) if self.weight else linear_map(layer, like)

    def can_be_had(self, attention: nn.Module, way: Collection[nn.Module]) -> bool:
        """Whether `linear_map` will give them, inside `linear_map.at_hand` of the modules `way`."""
        layer = attention.get_submodule(self.path)
        return parameter_can_be_had(layer, self.weight, way) if self.weight else can_be_had(layer, way)


@dataclass(frozen=True)
class Projections:
    """Of queries and keys that meet in the attention core as they are projected: neither normalised nor rotated, and
    without a bias by their places."""

    query: Projection
    key: Projection
    heads: int
    scale: float | None
    """Factor on the logits; None: `D ** -0.5`."""
    passed: frozenset[str] = frozenset()
    """Paths in the attention module of the `nn.Identity` that queries and keys go through, in the place of norms."""

    def weights(self, attention: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor] | None:
        """Weight `(H D, C)` and bias `(H D,)` of the queries, weight of the keys; None where they can't be had, see
        `linear_map.linear_map`.

        Args:
            attention: The module.
            like: `(B, T, C)` tokens of the type and on the device that are wanted.
        """
        if not self._are_linear(attention):
            return None
        asked = self.query.linear_map(attention, like)
        one_layer = (self.key.path, self.key.weight) == (self.query.path, self.query.weight)
        answering = asked if one_layer else self.key.linear_map(attention, like)
        if asked is None or answering is None:
            return None
        weight, bias = asked
        return self.query.of(weight), None if bias is None else self.query.of(bias), self.key.of(answering[0])

    def sizes(self, attention: nn.Module, sizes: Sizes) -> Sizes:
        """Those of a graph of the module, whose numbers nobody knew."""
        layer: Any = attention.get_submodule(self.query.path)
        if self.query.weight:
            features, channels = getattr(layer, self.query.weight).shape
        else:
            features, channels = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
        head = None if features is None else features // self.query.parts // self.heads
        return replace(sizes, head=head, channels=channels)

    def can_be_had(self, attention: nn.Module, way: Collection[nn.Module]) -> bool:
        """Whether `weights` will give them, inside `linear_map.at_hand` of the modules `way`."""
        there = all(each.can_be_had(attention, way) for each in (self.query, self.key))
        return there and self._are_linear(attention)

    def _are_linear(self, attention: nn.Module) -> bool:
        # Somebody may have put a norm there since.
        return all(type(attention.get_submodule(path)) is nn.Identity for path in self.passed)


def find_projections(graph: fx.Graph, module: nn.Module, methods: Collection[str]) -> Projections | None:
    """None unless the module has one core, whose queries and keys come from linear layers by a change of layout alone.

    Args:
        graph: A tapped one.
        module: Its own.
        methods: Names of the calls that take query, key and value.
    """
    cores = [node for node in graph.nodes if _is(node, "call_method", *methods, "softmax")]
    if len(cores) != 1:
        return None
    core = cores[0]
    met = nearest_product(core) if core.target == "softmax" else core.args[1:3]
    if met is None:
        return None
    sizes = Sizes(by_head(*met))
    found = _found(core, module, sizes)
    # Factors may be made of sizes, which are known now.
    return None if found is None else _found(core, module, found.sizes(module, sizes))


def _found(core: fx.Node, module: nn.Module, sizes: Sizes) -> Projections | None:
    met = (_met_in_logits if core.target == "softmax" else _met)(core, module, sizes)
    if met is None:
        return None
    query, key, scale = met
    passed: set[str] = set()
    asked, answering = (_projection(each, module, sizes, passed) for each in (query, key))
    if asked is None or answering is None or asked[1] != answering[1]:
        return None
    scaled = asked[2] * answering[2]
    if scale is None and scaled != 1.0:
        return None
    factor = None if scale is None else scale * scaled
    return Projections(asked[0], answering[0], asked[1], factor, frozenset(passed))


def _met(core: fx.Node, module: nn.Module, sizes: Sizes) -> tuple[Any, Any, float | None] | None:
    """Query, key and scale of a core that takes them; None where it takes a position bias, too."""
    _, query, key, _, *others = core.args
    if any(isinstance(value, fx.Node) for value in (*others, core.kwargs.get("attn_mask"))):
        return None
    given = core.kwargs.get("scale", core.kwargs.get("scaling"))
    scale = None if given is None else factor_of(given, module, sizes)
    return None if isinstance(scale, Tensor) or (scale is None) != (given is None) else (query, key, scale)


def _met_in_logits(softmax: fx.Node, module: nn.Module, sizes: Sizes) -> tuple[Any, Any, float] | None:
    """The same of a core that takes the softmax of a product."""
    logits, scale = _unscaled(softmax.args[1], module, sizes)
    product = product_of(logits)
    if product is None:
        return None
    (query, query_scale), (key, key_scale) = (_unscaled(each, module, sizes) for each in product)
    if logits.target is torch.einsum:
        if not _multiplies_last_axes(logits.args[0]):
            return None
    else:
        axes = ({-2, -1}, {1, 2}) if logits.target is torch.bmm else ({-2, -1}, {2, 3})
        if not _is(key, "call_method", "transpose") or set(key.args[1:]) not in axes:
            return None
        key, before = _unscaled(key.args[0], module, sizes)
        key_scale *= before
    return query, key, scale * query_scale * key_scale


def _multiplies_last_axes(equation: Any) -> bool:
    """Of an `einsum`: whether it is the product `(B, H, T, D), (B, H, S, D) -> (B, H, T, S)`."""
    given, _, made = str(equation).replace(" ", "").partition("->")
    query, _, key = given.partition(",")
    pairs = (query[:2], query[-1:]) == (key[:2], key[-1:]) and made == query[:3] + key[2:3]
    return pairs and len(query) == len(key) == 4 and len({*query, *key}) == 5


def _unscaled(node: Any, module: nn.Module, sizes: Sizes) -> tuple[Any, float]:
    """What a number is multiplied with, and the number."""
    scale = 1.0
    while isinstance(node, fx.Node):
        scaled = scaled_by(node, module, sizes)
        if scaled is not None and not isinstance(scaled[1], Tensor):
            node, scale = scaled[0], scale * scaled[1]
        elif _is(node, "call_method", *CASTS) or getattr(node.target, "__name__", "") == "maybe_add_mask":
            node = node.args[0]  # masks are refused before the module is called
        else:
            break
    return node, scale


def _projection(node: Any, module: nn.Module, sizes: Sizes, passed: set[str]) -> tuple[Projection, int, float] | None:
    """What a query or key comes from, its number of heads, and what it is multiplied with; adds to what it passed.

    By `linear -> view(B, N, H, D) -> transpose(1, 2)`, or
    `linear -> reshape(B, N, 3, H, D) -> permute(2, 0, 3, 1, 4) -> unbind(0)`; or by `unflatten(-1, (3, H, D))`, or by
    `[0]` and `[1]` in the place of `unbind`.
    """
    if _is(node, "call_method", "view", "reshape") and len(node.args) == 4:  # images and heads on one axis
        node = node.args[0]
    while _is(node, "call_method", "contiguous") or (
        _is(node, "call_module") and type(module.get_submodule(node.target)) is nn.Identity
    ):
        if node.op == "call_module":
            passed.add(str(node.target))
        node = node.args[0]
    part, parts, layout = 0, 1, node
    order: tuple[str, tuple[int, ...]] = ("transpose", (1, 2))
    if _is(node, "call_function", operator.getitem) and _is(node.args[0], "call_method", "unbind", "permute"):
        part, parts, layout = node.args[1], 3, node.args[0]
        order = ("permute", (2, 0, 3, 1, 4))
        if layout.target == "unbind":
            if layout.args[1:] not in ((), (0,)):
                return None
            layout = layout.args[0]
        if part not in range(3):
            return None
    if not _is(layout, "call_method", order[0]) or layout.args[1:] != order[1]:
        return None
    shaped = layout.args[0]
    if not _is(shaped, "call_method", "view", "reshape", "unflatten"):
        return None
    shape = shaped.args[1] if isinstance(shaped.args[1], tuple) else shaped.args[1:]
    if shaped.target == "unflatten":
        if shaped.args[1] not in (-1, 2) or len(shaped.args) < 3:
            return None
        shape = (None, None, *shaped.args[2])
    linear: Any
    linear, scale = _unscaled(shaped.args[0], module, sizes)
    heads, channels = shape[-2:]
    if (parts > 1 and shape[2:3] != (parts,)) or len(shape) != (5 if parts > 1 else 4):
        return None
    if not _is(linear, "call_module") and not _is(linear, "call_function", F.linear):
        return None
    if not _is(linear.args[0], "placeholder"):
        return None
    # A division of the number of channels by that of heads is a node.
    if not isinstance(heads, int) or (heads == -1 and not isinstance(channels, int)):
        return None
    if _is(linear, "call_function", F.linear):
        given = dict(zip(("input", "weight", "bias"), linear.args, strict=False)) | dict(linear.kwargs)
        weight: Any = given.get("weight")
        bias: Any = given.get("bias")
        if not _is(weight, "get_attr") or "." in weight.target or not (bias is None or _is(bias, "get_attr")):
            return None
        return Projection("", part, parts, weight.target, "" if bias is None else bias.target), heads, scale
    layer: Any = module.get_submodule(linear.target)
    features = getattr(layer, "out_features", 0) // parts
    return Projection(linear.target, part, parts), heads if heads != -1 else features // channels, scale


def _is(node: Any, op: str, *targets: str | Callable[..., Any]) -> bool:
    return isinstance(node, fx.Node) and node.op == op and (not targets or node.target in targets)
