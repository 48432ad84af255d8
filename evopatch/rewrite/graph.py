"""Generated code: a module's own forward with its attention core tapped, and the start of a block's.

The code is bound to the *original* module: same parameters, same submodules (also ones that are replaced later, such as
by LoRA layers), same hooks on them. Nothing of a forward is copied, so every kind of attention comes out of its own
graph.
"""

from __future__ import annotations

import itertools
import linecache
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..errors import AttentionNotFoundError
from .before_core import layer_norm, projected_from, up_to
from .classes import host_class
from .contexts import carry, entering
from .logits import check_logits
from .mixing import count_values
from .projections import Projections, find_projections
from .readout import readout_graph
from .replaced import replace_calls
from .tracing import ROOT, SDPA, TraceSpec, attention_cores, inputs_of, on_the_way, parameters_of, softmax_of, trace
from .written import refuse

_SOFTMAX_FUNCTIONS = {torch.softmax, F.softmax, softmax_of}


@dataclass(frozen=True, eq=False)
class Code:
    """The generated functions of one module, by its training flag."""

    functions: dict[bool, Callable[..., Any]] = field(repr=False)
    source: Callable[..., Any] = field(repr=False)
    """The forward that was traced."""
    parameters: tuple[str, ...]
    """Names of what the module's own forward takes, in order."""
    inputs: tuple[str, ...]
    """Those of the spec's inputs among them."""
    given: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the tensors that a block gives to its attention modules beside the tokens, by their path."""
    readout: dict[bool, Callable[..., Any]] = field(default_factory=dict, repr=False)
    """Of a module with an attention core: the same where only some tokens ask, see `readout.readout_graph`. Of a block:
    the tokens that its one attention module is given. Empty where there is none."""
    projections: Projections | None = None
    """Of a module with an attention core, see `projections.find_projections`."""
    norm: str | None = None
    """Of a block: path of the layer norm that alone stands between its input and what the code gives, if one does."""
    sets: frozenset[str] = frozenset()
    """Of a block: what its own forward sets on it, such as a number of calls."""

    def __deepcopy__(self, memo: Any) -> Code:
        return self  # stateless; tracing again would disturb forwards in other threads, as fx patches nn.Module

    def __reduce__(self) -> tuple[Any, ...]:
        # Generated functions don't pickle, and needn't: they are traced again, from the module's own class.
        return (_untraced, ())


def _untraced() -> None:
    return None


def generate_core(module: nn.Module, name: str, spec: TraceSpec) -> Code:
    """`(module, x, inputs, evo, module)`: the module's own forward with its attention core handed to `evo`.

    Traced in both modes, since tracing burns `self.training` in.

    Args:
        module: Whose own forward holds an attention core; left as it is.
        name: Fully qualified, for errors.
        spec: What the adapter knows about it.

    Raises:
        AttentionNotFoundError: If it can't be traced or has no attention core of a known form.
    """
    functions, readout = {}, {}
    methods = set(spec.cores.values()) - {"multi_head"}  # takes tokens, not queries
    for training in (False, True):
        with _mode(module, training):
            traced = trace(module, name, spec)
        refuse(traced.written.own | traced.written.tensors, module, name)
        graph = traced.graph
        _tap(graph, module, name, spec, checked=True)
        functions[training] = _function(graph)
        asked = readout_graph(graph, methods)
        if asked is not None:
            readout[training] = _function(asked)
    projections = find_projections(graph, module, methods)  # the same in both modes
    parameters, inputs = parameters_of(module), inputs_of(module, spec)
    return Code(functions, host_class(module).forward, parameters, inputs, readout=readout, projections=projections)


def generate_metric(block: nn.Module, name: str, spec: TraceSpec) -> Code:
    """`(block, x, inputs, None, block)` to `(B, T, C)`: the tokens as the projection before the attention core sees
    them.

    Calls the modules on the way quietly: their hooks are for the block's own run.

    Raises:
        AttentionNotFoundError: If the block can't be traced, or has no attention core behind a projection.
    """
    cores = attention_cores(block, spec)
    with _mode(block, training=False):
        graph, given, first, written = trace(block, name, spec, on_the_way(cores))
    refuse(written.tensors, block, name)
    _tap(graph, block, name, spec, checked=False)  # attention modules are when their own code is made
    projected = projected_from(graph, block, name, spec)
    function = _function(up_to(projected, graph))
    readout = {}
    if len(cores) == 1 and cores[0] in first:
        tokens = _function(up_to(first[cores[0]], graph))
        readout = {False: tokens, True: tokens}
    functions = {False: function, True: function}
    parameters, inputs = parameters_of(block), inputs_of(block, spec)
    norm, sets = layer_norm(projected, block), frozenset(written.own)
    return Code(functions, host_class(block).forward, parameters, inputs, given, readout, norm=norm, sets=sets)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    modes = [(inner, inner.training) for inner in module.modules()]
    try:
        # Not by `train()`, which LeViT's attention clears a cache in.
        for inner, _ in modes:
            inner.__dict__["training"] = training
        yield
    finally:
        for inner, mode in modes:
            inner.__dict__["training"] = mode


def _tap(graph: fx.Graph, block: nn.Module, name: str, spec: TraceSpec, checked: bool) -> None:
    """Hand every attention core to the tap, a new placeholder `evo`; the module itself is the one after it.

    Args:
        checked: Refuse cores that merged tokens can't go through.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]):
        evo = graph.placeholder("evo")
    with graph.inserting_after(evo):
        module = graph.placeholder("module")
    for node in [node for node in graph.nodes if node.op == "get_attr" and node.target == ROOT]:
        node.replace_all_uses_with(module)
        graph.erase_node(node)
    for node in [node for node in graph.nodes if _adds_position_bias(node, spec)]:
        with graph.inserting_before(node):
            tapped = carry(node, graph.call_method("add_position_bias", (evo, *node.args)))
        node.replace_all_uses_with(tapped)
        graph.erase_node(node)
    replace_calls(graph, evo, spec)
    cores = [node for node in graph.nodes if _is_core(node, spec) or _is_softmax(node)]
    for node in cores:
        method = spec.cores.get(node.target, "softmax")
        if method == "softmax" and checked:
            check_logits(node, block, name, spec)
        args, kwargs = node.args, dict(node.kwargs)
        if node.target is SDPA:
            args = (*args, *(kwargs.pop(given) for given in ("query", "key", "value") if given in kwargs))
        if node.target is softmax_of:
            args, kwargs = args[:1], {"module": args[1]}
        if spec.mixing:
            count_values(node, evo, block, name)
            kwargs["by_token"] = True
        with graph.inserting_before(node):
            tapped = carry(node, graph.call_method(method, (evo, *args), kwargs))
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


def _adds_position_bias(node: fx.Node, spec: TraceSpec) -> bool:
    if node.op != "call_function" or node.target not in (operator.add, torch.add) or node.kwargs:
        return False
    bias = node.args[1]
    return isinstance(bias, fx.Node) and bias.op == "call_method" and bias.target in spec.position_biases


_functions: OrderedDict[str, Callable[..., Any]] = OrderedDict()
_KEPT = 512
"""So many, or a number that is scheduled during training, and makes the code anew at every step, would fill memory."""
_numbers = itertools.count()


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a Python function of the original module, one per distinct code."""
    code = entering(graph).python_code("self")
    key = code.src + repr(sorted((k, id(v)) for k, v in code.globals.items()))
    if key not in _functions:
        filename = f"<evopatch block {next(_numbers)}>"
        linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
        namespace = dict(code.globals)
        exec(compile(code.src, filename, "exec"), namespace)
        _functions[key] = namespace["forward"]
    _functions.move_to_end(key)
    function = _functions[key]
    while len(_functions) > _KEPT:
        _, old = _functions.popitem(last=False)
        linecache.cache.pop(old.__code__.co_filename, None)
    return function
