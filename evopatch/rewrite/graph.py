"""The only user of torch.fx: find a block's attention core, tap it, and generate the block's forward anew.

A block is traced through itself and the modules on the way to its attention core; everything below stays a leaf. The
generated code is bound to the *original* module: same parameters, same submodules (also ones that are replaced later,
such as by LoRA layers), same hooks on the leaves. No residual structure is copied, so pre-norm, post-norm, parallel
and LayerScale blocks all come out of their own graph.
"""

from __future__ import annotations

import linecache
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..errors import AttentionNotFoundError
from .classes import host_class

_SDPA = F.scaled_dot_product_attention
_SOFTMAX_FUNCTIONS = {torch.softmax, F.softmax}
_MATMULS = {torch.matmul, operator.matmul, torch.bmm, torch.einsum}
_SCALINGS = {operator.mul, operator.truediv, torch.mul, torch.div}


@dataclass(frozen=True)
class TraceSpec:
    """How an adapter wants its blocks traced."""

    inputs: tuple[str, ...] = ()
    """Names of the tensors that the block takes beside the tokens, such as a rotary table."""
    absent: tuple[str, ...] = ()
    """Names of arguments without a default that are always None."""
    leaf_functions: tuple[Callable[..., Any], ...] = ()
    """Functions whose control flow depends on tensors' shapes: called, not traced."""
    leaf_methods: tuple[str, ...] = ()
    """Methods, other than `forward`, of submodules that are called, not traced."""
    sized_functions: tuple[str, ...] = ()
    """Names of functions of torch that are given sizes only, such as `rand`, which torch.fx doesn't see by itself."""
    position_biases: tuple[str, ...] = ()
    """Such methods whose result is added to the attention logits, one entry per head and pair of tokens."""
    core_names: frozenset[str] = frozenset({"scaled_dot_product_attention", "softmax"})
    """A module whose forward's code uses one of these names holds an attention core."""
    cores: Mapping[Callable[..., Any], str] = field(default_factory=lambda: {_SDPA: "attend"})
    """Functions that are attention cores, and the method of `evo` that takes the place of a call."""


@dataclass(frozen=True)
class BlockCode:
    """The generated functions of one block, by its training flag."""

    forward: dict[bool, Callable[..., Any]] = field(repr=False)
    """`(block, x, inputs, evo)` to `(B, M, C)`: the block's own forward with its attention core handed to `evo`."""
    metric: dict[bool, Callable[..., Any]] = field(repr=False)
    """`(block, x, inputs, evo)` to `(B, T, C)`: the tokens as the attention core's projection sees them."""

    def __deepcopy__(self, memo: Any) -> BlockCode:
        return self  # stateless; tracing again would disturb forwards in other threads, as fx patches nn.Module

    def __reduce__(self) -> tuple[Any, ...]:
        # Generated functions don't pickle, and needn't: they are traced again, from the block's own class.
        return (_untraced, ())


def _untraced() -> None:
    return None


def generate(block: nn.Module, name: str, spec: TraceSpec) -> BlockCode:
    """Trace a block in both modes, since tracing burns `self.training` in.

    Args:
        block: Left as it is.
        name: Fully qualified, for errors.
        spec: What the adapter knows about the block.

    Raises:
        AttentionNotFoundError: If the block can't be traced or has no attention core of a known form.
    """
    forward, metric = {}, {}
    modes = [(module, module.training) for module in block.modules()]
    try:
        for training in (False, True):
            # Not by `train()`, which LeViT's attention clears a cache in.
            for module, _ in modes:
                module.training = training
            graph = _trace(block, name, spec)
            _tap(graph, block, name, spec)
            forward[training] = _function(graph)
            metric[training] = _function(_metric_graph(graph, block, name, spec))
    finally:
        for module, mode in modes:
            module.training = mode
    return BlockCode(forward, metric)


class _Shim(nn.Module):
    """Gives the block a signature without optional arguments: the tokens, and a tuple with its other inputs."""

    def __init__(self, block: nn.Module, spec: TraceSpec) -> None:
        super().__init__()
        self.block = block
        self._spec = spec

    def forward(self, x: Any, inputs: Any) -> Any:
        named: dict[str, Any] = {name: inputs[i] for i, name in enumerate(self._spec.inputs)}
        named.update(dict.fromkeys(self._spec.absent))
        return host_class(self.block).forward(self.block, x, **named)


class _Proxy(fx.Proxy):
    def __getattr__(self, name: str) -> Any:
        return _Shape(self, name) if name == "shape" else super().__getattr__(name)


class _Shape(fx.proxy.Attribute):
    def __getitem__(self, key: Any) -> Any:
        # `*x.shape[:-1]`: fx can't tell how many it unpacks. Tokens are (B, M, C), so two.
        if key == slice(None, -1):
            return self[0], self[1]
        return super().__getitem__(key)  # type: ignore[misc]


class _Tracer(fx.Tracer):
    def __init__(self, shim: _Shim, spec: TraceSpec) -> None:
        super().__init__(autowrap_functions=spec.leaf_functions)
        self._through = {f"block.{name}" for name in traced_through(shim.block, spec)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._through

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # Hooks of a module that is traced through, or a forward that accelerate set on it, would run now, on proxies,
        # instead of at every forward.
        if not self.is_leaf_module(m, self.path_of_module(m)):
            forward = MethodType(host_class(m).forward, m)
        return super().call_module(m, forward, args, kwargs)


def traced_through(block: nn.Module, spec: TraceSpec) -> list[str]:
    """Names, relative to the block, of the submodules whose code is generated: their own hooks don't run."""
    cores = [name for name, module in block.named_modules() if name and _holds_core(module, spec)]
    return sorted({".".join(c.split(".")[:i]) for c in cores for i in range(1, c.count(".") + 2)})


def _holds_core(module: nn.Module, spec: TraceSpec) -> bool:
    code = getattr(host_class(module).forward, "__code__", None)
    return code is not None and not spec.core_names.isdisjoint(code.co_names)


def _trace(block: nn.Module, name: str, spec: TraceSpec) -> fx.Graph:
    shim = _Shim(block, spec)
    tracer = _Tracer(shim, spec)
    try:
        leaf_methods = (*spec.leaf_methods, *spec.position_biases)
        with _leaf_methods(shim, tracer, leaf_methods), _sized_functions(tracer, spec.sized_functions):
            graph = tracer.trace(shim)
    except Exception as error:
        last = next(reversed(tracer.graph.nodes), None) if hasattr(tracer, "graph") else None
        raise AttentionNotFoundError(
            f"{name} ({type(block).__name__}) can't be traced by torch.fx"
            + ("" if last is None else f" past the graph node '{last.name}' ({last.op} {last.target})")
            + f": {error}"
        ) from error
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("block.")
    # Dead-code elimination looks submodules up in it.
    graph.owning_module = block  # type: ignore[assignment]
    return graph


@contextmanager
def _leaf_methods(shim: nn.Module, tracer: fx.Tracer, names: tuple[str, ...]) -> Iterator[None]:
    """Record calls of these methods as nodes, so that what they read is read when the block runs."""
    patched: list[tuple[nn.Module, str]] = []

    def recorder(path: str, method: str) -> Callable[[], fx.Proxy]:
        def record(*args: Any) -> fx.Proxy:
            module = tracer.create_proxy("get_attr", path, (), {})
            return tracer.create_proxy("call_method", method, (module, *args), {})

        return record

    try:
        for path, module in shim.named_modules():
            for method in names:
                if hasattr(type(module), method):
                    module.__dict__[method] = recorder(path, method)
                    patched.append((module, method))
        yield
    finally:
        for module, method in patched:
            del module.__dict__[method]


@contextmanager
def _sized_functions(tracer: fx.Tracer, names: tuple[str, ...]) -> Iterator[None]:
    """Record calls of these functions of torch where a size is a node; other threads' calls go through."""
    originals = {name: getattr(torch, name) for name in names}

    def recorder(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(argument, fx.Proxy) for argument in args):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return record

    try:
        for name, function in originals.items():
            setattr(torch, name, recorder(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


def _tap(graph: fx.Graph, block: nn.Module, name: str, spec: TraceSpec) -> None:
    """Hand every attention core to the tap, a new last placeholder `evo`."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]):
        evo = graph.placeholder("evo")
    for node in graph.nodes:
        if node.op == "call_method" and node.target in spec.position_biases:
            with graph.inserting_after(node):
                tapped = graph.call_method("position_bias", (evo, node))
            node.replace_all_uses_with(tapped, delete_user_cb=lambda user, tapped=tapped: user is not tapped)
    cores = [node for node in graph.nodes if _is_core(node, spec) or _is_softmax(node)]
    for node in cores:
        method = spec.cores.get(node.target, "softmax")
        if method == "softmax":
            _check_logits(node, block, name)
        with graph.inserting_before(node):
            tapped = graph.call_method(method, (evo, *node.args), dict(node.kwargs))
        node.replace_all_uses_with(tapped)
        graph.erase_node(node)
    if not cores:
        last = next(node for node in reversed(graph.nodes) if node.op != "output")
        raise AttentionNotFoundError(
            f"{name} ({type(block).__name__}): found no {' and no '.join(sorted(spec.core_names))} among the "
            f"{len(graph.nodes)} nodes of its graph, which ends at '{last.name}' ({last.op} {last.target}); "
            "expected an attention core of one of these forms. Leave the model unpatched, or register an adapter for it"
        )
    graph.eliminate_dead_code()


def _is_core(node: fx.Node, spec: TraceSpec) -> bool:
    return node.op == "call_function" and node.target in spec.cores


def _is_softmax(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "softmax"
    return node.op == "call_function" and node.target in _SOFTMAX_FUNCTIONS


def _check_logits(softmax: fx.Node, block: nn.Module, name: str) -> None:
    """Between the product of queries and keys and the softmax nothing may depend on the tokens' places."""
    node: Any = softmax.args[0]
    while isinstance(node, fx.Node):
        if node.op == "call_function" and node.target in _MATMULS:
            return
        masked = node.op == "call_function" and getattr(node.target, "__name__", "") == "maybe_add_mask"
        scaled = node.op == "call_function" and node.target in _SCALINGS and not isinstance(node.args[1], fx.Node)
        if not masked and not scaled and not _adds_position_bias(node):
            break
        node = node.args[0]
    raise AttentionNotFoundError(
        f"{name} ({type(block).__name__}): the graph node '{node}' "
        f"({getattr(node, 'op', '?')} {getattr(node, 'target', '?')}) stands between the product of queries and keys "
        "and the softmax; expected nothing but a scaling. Create the model with fused attention "
        "(timm.layers.set_fused_attn(True) before), whose position bias evopatch averages for the compact set"
    )


def _adds_position_bias(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in (operator.add, torch.add):
        return False
    return isinstance(node.args[1], fx.Node) and node.args[1].target == "position_bias"


def _metric_graph(graph: fx.Graph, block: nn.Module, name: str, spec: TraceSpec) -> fx.Graph:
    """The graph up to the input of the projection that the first attention core's queries come from."""
    copy = fx.Graph(owning_module=graph.owning_module)
    mapping: dict[fx.Node, fx.Node] = {}
    copy.graph_copy(graph, mapping)
    methods = {"softmax", *spec.cores.values()}
    core = next(n for n in graph.nodes if n.op == "call_method" and n.target in methods)
    queue, seen = [a for a in core.args[1:2] if isinstance(a, fx.Node)], set()
    while queue:
        node = queue.pop(0)
        if _is_projection(node, block):
            copy.output(mapping[node.args[0]])  # type: ignore[index]
            copy.eliminate_dead_code()
            return copy
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


_functions: dict[str, Callable[..., Any]] = {}


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a Python function of the original module, one per distinct code."""
    code = graph.python_code("self")
    key = code.src + repr(sorted((k, id(v)) for k, v in code.globals.items()))
    if key not in _functions:
        filename = f"<evopatch block {len(_functions)}>"
        linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
        namespace = dict(code.globals)
        exec(compile(code.src, filename, "exec"), namespace)
        _functions[key] = namespace["forward"]
    return _functions[key]
