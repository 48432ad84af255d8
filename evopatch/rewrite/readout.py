"""An attention module's code where only a few tokens ask: keys and values of all, everything else of those alone.

What a head doesn't read needn't be computed: in the last block only the tokens that it reads ask, and are updated.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .asserts import asserted, without_asserts
from .contexts import carry

_NO_VALUES = {"shape", "dtype", "device", "ndim", "size", "dim"}


def readout_graph(graph: fx.Graph, methods: Collection[str]) -> fx.Graph | None:
    """`(x, inputs, everything, evo, module)`: a tapped graph where the tokens `x` ask and those of `everything` answer.

    Args:
        graph: Of `(x, inputs, evo, module)`, whose attention cores are calls of `evo`.
        methods: Names of those calls that take query, key and value.

    Returns:
        None where the core takes logits, keys and values depend on what another core gives, or something is asserted of
        what tokens hold.
    """
    if _asserts_values(graph):
        return None
    cores = [node for node in graph.nodes if node.op == "call_method" and node.target in methods]
    materialised = any(node.op == "call_method" and node.target == "softmax" for node in graph.nodes)
    answers = _reached([node for core in cores for node in core.all_input_nodes if node is not core.args[1]], _inputs)
    if not cores or materialised or not answers.isdisjoint(_reached(cores, lambda node: node.users)):
        return None
    x, inputs, *others = (node for node in graph.nodes if node.op == "placeholder")
    found = fx.Graph(owning_module=graph.owning_module)
    asking = {node: found.placeholder(node.name) for node in (x, inputs)}
    everything = found.placeholder("everything")
    asking |= {node: found.placeholder(node.name) for node in others}
    answering = {**asking, x: everything}
    # Inputs have one entry per token: queries that they go into are made for all, before those that ask are taken.
    by_place = {core.args[1] for core in cores if inputs in _reached([core.args[1]], _inputs)}
    answers |= _reached(by_place, _inputs)
    for node in graph.nodes:
        if node.op == "output":
            found.output(fx.node.map_arg(node.args[0], asking.__getitem__))
        elif node.op != "placeholder":
            if node in answers:
                answering[node] = found.node_copy(node, answering.__getitem__)
            asked = dict(asking)
            if node in cores:
                query = node.args[1]
                asked = {**asking, **answering, query: asking[query]}
                if query in by_place:
                    asked[query] = found.call_method("asking", (asking[others[0]], answering[query]))
            asking[node] = found.node_copy(node, asked.__getitem__)
    without_asserts(found)
    found.eliminate_dead_code()
    for linear in [node for node in found.nodes if node.op == "call_module" and node.args == (everything,)]:
        _without_queries(found, linear)
    return found


def _asserts_values(graph: fx.Graph) -> bool:
    """Whether a graph asserts something of what its tensors hold, not of their sizes alone."""
    made_of = _reached([node for node in graph.nodes if node.target is asserted], _values)
    return any(node.op == "placeholder" for node in made_of)


def _values(node: fx.Node) -> Iterable[fx.Node]:
    """Those whose values a node depends on."""
    attribute = node.op == "call_function" and node.target is getattr and node.args[1] in _NO_VALUES
    return () if attribute or (node.op == "call_method" and node.target in _NO_VALUES) else node.all_input_nodes


def _inputs(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _reached(nodes: Iterable[Any], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    queue = list(nodes)
    seen = set(queue)
    while queue:
        for node in step(queue.pop()):
            if node not in seen:
                seen.add(node)
                queue.append(node)
    return seen


def _without_queries(found: fx.Graph, linear: fx.Node) -> None:
    """Of a projection whose first third are queries that nobody asks for, compute the rest.

    Only of the form `linear -> reshape(B, N, 3, H, D) -> permute(2, 0, 3, 1, 4) -> unbind(0)`.
    """
    reshape, permute, unbind = _chain(linear, ("reshape", "permute", "unbind"))
    if unbind is None or reshape.args[3:4] != (3,) or permute.args[1:2] != (2,) or unbind.args[1:] != (0,):
        return
    parts = list(unbind.users)
    if any(part.target is not operator.getitem or part.args[1] == 0 for part in parts):
        return
    with found.inserting_before(linear):
        module = found.get_attr(str(linear.target))
        fewer = found.call_function(last_two_thirds, (module, *linear.args))
        linear.replace_all_uses_with(carry(linear, fewer))
    found.erase_node(linear)
    reshape.update_arg(3, 2)
    for part in parts:
        part.update_arg(1, part.args[1] - 1)


def _chain(node: Any, methods: tuple[str, ...]) -> list[Any]:
    """Calls of these methods, each the only use of the one before; None from where it is another."""
    chain: list[Any] = []
    for method in methods:
        users = [] if node is None else list(node.users)
        node = users[0] if len(users) == 1 and (users[0].op, users[0].target) == ("call_method", method) else None
        chain.append(node)
    return chain


def last_two_thirds(linear: Any, x: Tensor) -> Tensor:
    """Of a projection's outputs."""
    if not is_plain(linear):
        out: Tensor = linear(x)
        return out[..., out.shape[-1] // 3 :]
    first = linear.out_features // 3
    return F.linear(x, linear.weight[first:], None if linear.bias is None else linear.bias[first:])


def is_plain(linear: Any) -> bool:
    """Whether a module is a linear layer that computes by nothing but its weight and bias, and has them whole."""
    # LoRA and quantised layers are no such, nor sharded, offloaded or pruned ones.
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    hooks = linear._forward_pre_hooks, linear._forward_hooks, linear._backward_pre_hooks, linear._backward_hooks
    return not any(hooks) and not is_traceable_wrapper_subclass(linear.weight)
