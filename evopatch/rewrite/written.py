"""What a forward sets on its own module while it is traced, or changes there: attributes, lists, buffers."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import AttentionNotFoundError

_PLACES = ("_parameters", "_buffers", "_modules")
_OF_TORCH = frozenset(nn.Module().__dict__)
_MAPPINGS = (dict, OrderedDict, defaultdict)
_SEQUENCES = (list, deque)
_CONTAINERS = (*_MAPPINGS, *_SEQUENCES, set)
_NUMBERS = (bool, int, float, complex, str, bytes)


class Written:
    """Attributes of the traced modules that their forwards set."""

    def __init__(self) -> None:
        self.own: set[str] = set()
        """Names of those of the traced module itself."""
        self.tensors: set[str] = set()
        """Paths in it of those that hold something made of tokens, of modules inside it, too."""


@contextmanager
def taken_back(module: nn.Module, paths: Iterable[str]) -> Iterator[Written]:
    """Afterwards the modules are as they were; what was set is said then.

    Args:
        module: The one that is traced.
        paths: Of the modules in it that are traced through.
    """
    written = Written()
    modules = {"": module} | {f"{path}.": module.get_submodule(path) for path in paths}
    before = [(path, place, dict(place)) for path, each in modules.items() for place in _places(each)]
    lent: dict[int, Any] = {}
    for each in modules.values():
        lend(each.__dict__, lent)
        lend(each._buffers, lent)
    try:
        yield written
    finally:
        for path, place, former in before:
            for name, value in list(place.items()):
                was = former.get(name, _MISSING)
                if value is was:
                    continue
                if value is not lent.get(id(was), _MISSING) or not _unchanged(value, was):
                    if not path:
                        written.own.add(name)
                    if _holds_proxy(value):
                        written.tensors.add(path + name)
                # One by one, as other threads may read them meanwhile.
                if name in former:
                    place[name] = was
                else:
                    del place[name]


_MISSING = object()


def _places(module: nn.Module) -> list[dict[str, Any]]:
    return [module.__dict__, *(module.__dict__[place] for place in _PLACES)]


def lend(place: dict[str, Any], lent: dict[int, Any]) -> None:
    """Put copies of what a forward could change in place, such as a list of maps or a buffer with a count, where it
    finds them.

    Args:
        place: A module's attributes or buffers, by name.
        lent: Filled with the copies by the `id` of what they are of.
    """
    for name, value in place.items():
        if name in _OF_TORCH or isinstance(value, nn.Parameter):
            continue
        if isinstance(value, Tensor) and id(value) not in lent:
            with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode doesn't count its changes
                lent[id(value)] = value.clone()
        place[name] = lent[id(value)] if isinstance(value, Tensor) else _copied(value, lent)


def _copied(value: Any, lent: dict[int, Any]) -> Any:
    if type(value) not in _CONTAINERS:
        return value
    if id(value) not in lent:
        twin = lent[id(value)] = copy.copy(value)
        if type(value) in _MAPPINGS:
            twin.update({key: _copied(inner, lent) for key, inner in value.items()})
        elif type(value) in _SEQUENCES:
            for index, inner in enumerate(value):
                twin[index] = _copied(inner, lent)
    return lent[id(value)]


def _unchanged(value: Any, was: Any, seen: tuple[int, ...] = ()) -> bool:
    """Whether a copy holds what it was made of."""
    if isinstance(value, Tensor) and not seen:
        return value._version == 0
    if type(value) not in _CONTAINERS or type(value) is not type(was):
        return value is was or (type(value) in _NUMBERS and type(value) is type(was) and bool(value == was))
    if id(value) in seen:
        return True
    seen, same_size = (*seen, id(value)), len(value) == len(was)
    if type(value) in _MAPPINGS:
        return same_size and all(key in was and _unchanged(inner, was[key], seen) for key, inner in value.items())
    if type(value) is set:
        return set(map(id, value)) == set(map(id, was))
    return same_size and all(_unchanged(inner, other, seen) for inner, other in zip(value, was, strict=True))


def _holds_proxy(value: Any, seen: tuple[int, ...] = ()) -> bool:
    if isinstance(value, fx.Proxy):
        return True
    if type(value) not in (*_CONTAINERS, tuple) or id(value) in seen:
        return False
    inner = (*value, *value.values()) if type(value) in _MAPPINGS else value
    return any(_holds_proxy(each, (*seen, id(value))) for each in inner)


def filled(graph: fx.Graph) -> set[str]:
    """Names of the attributes of which a graph changes the tensor in place, such as a buffer with a running mean."""
    changing = (node for node in graph.nodes if node.op == "call_method" and node.args)
    return {
        str(node.args[0].target)
        for node in changing
        if isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr" and _in_place(str(node.target))
    }


def take_up(graph: fx.Graph) -> None:
    """Let what comes after a statement that changes a tensor in place, such as `logits.mul_(scale)`, use what it gives,
    or nothing would say that the statement is of any use.

    Raises:
        ValueError: If nothing comes after it, as where another view of the tensor is used.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node, place in places.items():
        if node.op != "call_method" or node.users or not _in_place(str(node.target)) or not node.args:
            continue
        changed = node.args[0]
        if not isinstance(changed, fx.Node) or changed.op == "get_attr":
            continue
        for later in [user for user in changed.users if places[user] > place]:
            later.replace_input_with(changed, node)
        if not node.users:
            raise ValueError(
                f"its statement '{changed}.{node.target}(...)' changes a tensor in place that is used by another name: "
                "expected the use of what it gives"
            )


def _in_place(method: str) -> bool:
    return method == "__setitem__" or (method.endswith("_") and not method.endswith("__"))


def refuse(names: set[str], module: nn.Module, name: str) -> None:
    """
    Args:
        names: What a forward sets that can't be kept.
        module: Whose.
        name: Fully qualified.

    Raises:
        AttentionNotFoundError: If there is any.
    """
    if names:
        raise AttentionNotFoundError(
            f"{name} ({type(module).__name__}) sets {', '.join(sorted(names))} on itself in its forward, or changes "
            "what is there, which the patched one, generated from it and called on a compact set, would not: expected "
            "a forward that leaves its module as it is. Take that line out, or look by a forward hook, which sees all "
            "tokens"
        )
