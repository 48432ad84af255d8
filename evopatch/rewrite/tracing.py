"""Recording a module's forward with torch.fx, down to its attention core.

What a trace burns in is as little as can be: everything below the traced modules stays a leaf, and the values that it
read from modules are read again when the code runs, or the code is made anew when they change (`graph.py`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import AttentionNotFoundError
from .asserts import record
from .classes import host_class
from .constants import Making, keep_constants
from .contexts import ONE_AT_A_TIME, Entered, noticed
from .fast_paths import forward_of
from .leaves import dropout_rates, leaf_functions, leaf_methods
from .proxies import Proxy, Shape, number_of_parts
from .written import Written, filled, take_up, taken_back

SDPA = F.scaled_dot_product_attention
_MULTI_HEAD = F.multi_head_attention_forward
ROOT = "module"
"""What a graph calls the traced module itself."""


@dataclass(frozen=True)
class TraceSpec:
    """How an adapter wants its blocks traced."""

    inputs: tuple[str, ...] = ()
    """Names of the tensors that the block takes beside the tokens, such as a rotary table."""
    absent: tuple[str, ...] = ()
    """Names of arguments without a default that are always None."""
    leaf_functions: tuple[Callable[..., Any], ...] = ()
    """Functions whose control flow depends on tensors' shapes: called, not traced."""
    aside: tuple[str, ...] = ()
    """Names of modules in the block whose attention is between other things than its tokens: called, not traced."""
    leaf_methods: tuple[str, ...] = ()
    """Methods, other than `forward`, of submodules that are called, not traced."""
    position_biases: tuple[str, ...] = ()
    """Such methods whose result is added to the attention logits, one entry per head and pair of tokens."""
    replaced: Mapping[Callable[..., Any] | str, str] = field(default_factory=dict)
    """Functions, and methods of the module by name, that make something of every token, or every two, of which a
    compact set needs its own: the method of `evo` that is called with the same arguments in place of each."""
    mixing: tuple[str, ...] = ()
    """Names of an attention module's layers that mix its heads, key by key, before and after the softmax (talking
    heads, arXiv 2003.02436)."""
    core_names: frozenset[str] = frozenset({"scaled_dot_product_attention", "softmax", "multi_head_attention_forward"})
    """A module whose forward's code uses one of these names holds an attention core."""
    cores: Mapping[Callable[..., Any], str] = field(default_factory=lambda: {SDPA: "attend", _MULTI_HEAD: "multi_head"})
    """Functions that are attention cores, and the method of `evo` that takes the place of a call."""


def leaves_of(spec: TraceSpec) -> tuple[Callable[..., Any], ...]:
    """Functions that are called, not traced."""
    return (*spec.leaf_functions, *(target for target in spec.replaced if not isinstance(target, str)))


class _Shim(nn.Module):
    """Gives a module a signature without optional arguments: the tokens, and a tuple with its other inputs."""

    def __init__(self, module: nn.Module, spec: TraceSpec) -> None:
        super().__init__()
        self.module = module
        self._inputs = inputs_of(module, spec)
        self._absent = set(spec.absent).intersection(parameters_of(module))

    def forward(self, x: Any, inputs: Any) -> Any:
        named: dict[str, Any] = {name: inputs[i] for i, name in enumerate(self._inputs)}
        named.update(dict.fromkeys(self._absent))
        return forward_of(self.module)(self.module, x, **named)


def inputs_of(module: nn.Module, spec: TraceSpec) -> tuple[str, ...]:
    """Those of the spec's inputs that a module takes."""
    return tuple(name for name in spec.inputs if takes(module, name))


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward takes an argument of this name."""
    parameters = inspect.signature(forward_of(module)).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class _Tracer(fx.Tracer):
    def __init__(self, shim: _Shim, spec: TraceSpec, through: Collection[str]) -> None:
        super().__init__(autowrap_functions=leaves_of(spec))
        self._through = {ROOT, *(f"{ROOT}.{name}" for name in through)}
        self.given: dict[str, tuple[str, ...]] = {}
        """By path of a module that is traced through: what it is given beside its first argument."""
        self.first: dict[str, fx.Node] = {}
        """By the same: its first argument."""
        self.entered = Entered()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.entered.note(node)
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._through

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        parts = number_of_parts(obj.node)
        if isinstance(obj, Shape) and (obj.root.node in self.first.values() or obj.root.node.target == "x"):
            parts = 3  # of tokens
        whole: Any = obj
        return super().iter(obj) if parts is None else (whole[index] for index in range(parts))

    def to_bool(self, obj: fx.Proxy) -> bool:
        truth = record(obj, sys._getframe(2))
        return super().to_bool(obj) if truth is None else truth

    def create_arg(self, a: Any) -> Any:
        # The `repr` of a number of numpy, which generated code would hold, is a call.
        return super().create_arg(a.item() if type(a).__module__ == "numpy" and not getattr(a, "shape", 0) else a)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # Hooks of a module that is traced through, or a forward that accelerate set on it, would run now, on proxies,
        # instead of at every forward.
        path = self.path_of_module(m)
        if type(m) is nn.Softmax:
            return self.create_proxy(
                "call_function", softmax_of, (args[0], self.create_proxy("get_attr", path, (), {})), {}
            )
        if not self.is_leaf_module(m, path):
            forward = MethodType(forward_of(m), m)
            named = dict(zip(parameters_of(m), args, strict=False)) | kwargs
            others = list(named)[1:]
            path = path.removeprefix(f"{ROOT}.")
            self.given[path] = tuple(n for n in others if _holds_tensor(named[n]))
            first = next(iter(named.values()), None)
            if isinstance(first, fx.Proxy):
                self.first[path] = first.node
        return super().call_module(m, forward, args, kwargs)


def _holds_tensor(value: Any) -> bool:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(part, (fx.Proxy, Tensor)) for part in parts)


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module's own forward takes, in order."""
    return tuple(inspect.signature(forward_of(module)).parameters)[1:]


def attention_cores(block: nn.Module | None, spec: TraceSpec) -> tuple[str, ...]:
    """Paths in a block of the modules whose forward holds an attention core; `""` for the block itself. Lists of
    modules may have None in a block's place."""
    if block is None:
        return ()
    modules = (each for each in block.named_modules() if each[0] not in spec.aside)
    return tuple(name for name, module in modules if _attends(module, spec))


def _attends(module: nn.Module, spec: TraceSpec) -> bool:
    # A softmax that is a module is part of the one that calls it.
    if type(module) is nn.Softmax:
        return False
    holds_softmax = any(type(child) is nn.Softmax for child in module._modules.values())
    return _holds_core(module, spec) or (holds_softmax and "softmax" in spec.core_names)


def softmax_of(logits: Tensor, module: nn.Module) -> Any:
    """Stands in a graph for the call of an `nn.Softmax`."""
    return module(logits)


def on_the_way(paths: Collection[str]) -> list[str]:
    """All modules that are passed on the way from a module to those at the paths, these included; sorted."""
    return sorted({".".join(path.split(".")[:i]) for path in paths if path for i in range(1, path.count(".") + 2)})


def _holds_core(module: nn.Module, spec: TraceSpec) -> bool:
    return any(not spec.core_names.isdisjoint(code.co_names) for code in _codes(module))


def names_in(module: nn.Module) -> set[str]:
    """Names of attributes in the code of a module's forward, and what may be keys."""
    found: set[str] = set()
    for code in _codes(module):
        found |= {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
    return found


def _codes(module: nn.Module) -> Iterator[Any]:
    """Of a module's forward, and of the methods and functions that it is made of."""
    queue: list[Any] = [forward_of(module)]
    seen: set[int] = set()
    while queue:
        function = inspect.unwrap(queue.pop())
        code = getattr(function, "__code__", None)
        if code is None or id(code) in seen:
            continue
        seen.add(id(code))
        yield code
        queue += _called(function, code.co_names, host_class(module))


def _called(function: Any, names: Collection[str], cls: type) -> list[Any]:
    """Functions that a method may call by these names: those of its class and of its own package, not of torch."""
    if "super" in names:
        names = {*names, function.__name__}
    methods = [vars(base)[name] for name in names for base in cls.__mro__ if name in vars(base)]
    around = [function.__globals__.get(name) for name in names]
    called = (inspect.unwrap(found) for found in (*methods, *around) if isinstance(found, FunctionType))
    return [found for found in called if found.__module__.partition(".")[0] != "torch"]


class Traced(NamedTuple):
    """What tracing a module gives."""

    graph: fx.Graph
    """With the placeholders `x` and `inputs`."""
    given: dict[str, tuple[str, ...]]
    """By path of a submodule that was traced through: names of the tensors that it is given beside the first."""
    first: dict[str, fx.Node]
    """By the same: the node that it is given first."""
    written: Written
    """What the forwards set on their modules, which are left as they were."""


def trace(module: nn.Module, name: str, spec: TraceSpec, through: Collection[str] = ()) -> Traced:
    """A module's forward as a graph.

    Args:
        module: Left as it is.
        name: Fully qualified, for errors.
        spec: What the adapter knows about the module.
        through: Paths of the submodules whose code is part of the graph; all others are leaves.

    Raises:
        AttentionNotFoundError: If torch.fx can't trace it; says how far it came.
    """
    shim = _Shim(module, spec)
    tracer = _Tracer(shim, spec, through)
    try:
        replaced = (target for target in spec.replaced if isinstance(target, str))
        methods = (*spec.leaf_methods, *spec.position_biases, *replaced)
        with (
            ONE_AT_A_TIME,
            taken_back(module, through) as written,
            leaf_methods(shim, tracer, methods),
            leaf_functions(shim, leaves_of(spec)),
            dropout_rates(shim, tracer),
            noticed(tracer.entered),
            Making() as making,
        ):
            graph = tracer.trace(shim)
        keep_constants(graph, shim, making)
        take_up(graph)
    except Exception as error:
        last = next(iter(reversed(tracer.graph.nodes)), None) if hasattr(tracer, "graph") else None
        raise AttentionNotFoundError(
            f"{name} ({type(module).__name__}) can't be traced by torch.fx"
            + ("" if last is None else f" past the graph node '{last.name}' ({last.op} {last.target})")
            + f": {error}"
        ) from error
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix(f"{ROOT}.")
    written.tensors |= filled(graph)
    # Dead-code elimination looks submodules up in it.
    graph.owning_module = module  # type: ignore[assignment]
    return Traced(graph, tracer.given, tracer.first, written)
