"""What a block makes of its tokens before its attention core, found in its graph."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..errors import AttentionNotFoundError
from .asserts import without_asserts
from .contexts import carry
from .quiet import quiet_copy, quietly
from .tracing import TraceSpec


def up_to(node: fx.Node, graph: fx.Graph) -> fx.Graph:
    """A copy of the graph that gives a node of it, and calls its modules quietly."""
    copy = fx.Graph(owning_module=graph.owning_module)
    mapping: dict[fx.Node, fx.Node] = {}
    copy.graph_copy(graph, mapping)
    copy.output(mapping[node])
    without_asserts(copy)
    copy.eliminate_dead_code()
    return _quiet(copy)


def projected_from(graph: fx.Graph, block: nn.Module, name: str, spec: TraceSpec) -> fx.Node:
    """The input of the projection that the first attention core's queries come from."""
    methods = {"softmax", *spec.cores.values()}
    core = next(n for n in graph.nodes if n.op == "call_method" and n.target in methods)
    if core.target == "multi_head":  # projects by itself
        return cast(fx.Node, core.args[1])
    queue, seen = [a for a in core.args[1:2] if isinstance(a, fx.Node)], set()
    while queue:
        node = queue.pop(0)
        if _is_projection(node, block):
            return cast(fx.Node, node.args[0])
        if node not in seen:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    raise AttentionNotFoundError(
        f"{name} ({type(block).__name__}): found no linear projection before the graph node '{core.name}' "
        f"({core.target}); expected one that the queries come from"
    )


def _is_projection(node: fx.Node, block: nn.Module) -> bool:
    if node.op == "call_module":
        # By its attributes: LoRA and quantised layers aren't instances of nn.Linear, and LeViT's hold a norm as well.
        parts = block.get_submodule(str(node.target)).modules()
        return any(hasattr(part, "in_features") or hasattr(part, "in_channels") for part in parts)
    return node.op == "call_function" and node.target in (F.linear, torch._C._nn.linear)


def _quiet(graph: fx.Graph) -> fx.Graph:
    for node in list(graph.nodes):
        if node.op == "call_module":
            with graph.inserting_before(node):
                module = graph.get_attr(str(node.target))
                call = carry(node, graph.call_function(quietly, (module, *node.args), dict(node.kwargs)))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    return graph


def layer_norm(node: fx.Node, block: nn.Module) -> str | None:
    """Path of the layer norm that alone stands between a block's input and a node, if one does."""
    if node.op != "call_module" or not _normalises(block.get_submodule(str(node.target))):
        return None
    tokens = node.args[0]
    if isinstance(tokens, fx.Node) and tokens.target is torch.cat and tokens.kwargs == {"dim": 1}:
        tokens = cast("list[fx.node.Argument]", tokens.args[0])[0]  # others behind them change nothing
    return str(node.target) if isinstance(tokens, fx.Node) and tokens.op == "placeholder" else None


def _normalises(norm: nn.Module) -> bool:
    """Whether a module does what `nn.LayerNorm` does, with its own weights: a subclass may add one to them."""
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return False
    # On weights of its own, as the module's, and tensors by default, may be elsewhere.
    tried, generator = quiet_copy(norm), torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        weight, bias, *rows = torch.rand(4, *norm.normalized_shape, generator=generator, dtype=torch.float32)
        x = torch.stack(rows)
        tried.__dict__["_parameters"] = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
        try:
            out = tried.forward(x)
        except Exception:  # whatever else it may need
            return False
        return torch.allclose(out, F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps), atol=1e-5)
