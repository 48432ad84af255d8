"""Tensors that a forward makes of nothing but numbers, such as `torch.tensor(0.5)`: generated code keeps them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Making(TorchFunctionMode):
    """Knows, of the tensors of a trace, those that were made in it and of no others.

    Whatever else a forward may use as a constant belongs to one module, and changes with its weights or device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Collection[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        out = func(*args, **kwargs)
        if all(id(each) in self.made for each in used):
            self.made |= {id(each): each for each in tree_leaves(out) if isinstance(each, Tensor)}
        return out


def keep_constants(graph: fx.Graph, root: nn.Module, making: Making) -> None:
    """Let a graph hold the constants that torch.fx put on the module that it traced.

    Args:
        graph: Changed in place.
        root: The module.
        making: Was on during the trace.

    Raises:
        ValueError: If one of them isn't made of numbers alone.
    """
    tokens = next(iter(graph.nodes))
    for node in [node for node in graph.nodes if node.op == "get_attr" and node.target.startswith("_tensor_constant")]:
        value = getattr(root, node.target)
        if id(value) not in making.made or value.is_meta:
            raise ValueError(
                f"it uses a tensor {tuple(value.shape)} that is neither a parameter or a buffer of its module, nor "
                "made of numbers alone, such as one computed from a buffer, and generated code would keep it as it is "
                "now: expected one of these. Register what was computed as a buffer"
            )
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_function(_Holding(value), (tokens,)))
        graph.erase_node(node)


def constant_of(node: fx.Node) -> Tensor | None:
    """The constant that a graph holds at a node; None if it holds none there."""
    return node.target.value if isinstance(node.target, _Holding) else None


class _Holding:
    """Gives a constant on the device of the tokens, as the model may have moved since."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.__name__ = "constant"  # generated code calls it so

    def __call__(self, x: Tensor) -> Tensor:
        return self.value.to(x.device)
