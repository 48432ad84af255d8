"""Labels as numbers of classes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DataError


def class_number(label: Any, name: Callable[[], str]) -> int:
    """
    Args:
        label: An int, or an integer of numpy or torch; nothing that would have to be rounded or looked up.
        name: Gives what a message calls the image that it is of.

    Raises:
        DataError: If it is anything else.
    """
    try:
        return operator.index(label)
    except TypeError:
        raise DataError(
            f"{name()} has the label {_described(label)}: expected the number of its class, a whole one. Of one-hot "
            "labels give the argmax, of names their place in a list, and leave labels out where they are no classes"
        ) from None


def whole_numbers(names: Sequence[str]) -> list[int] | None:
    """Names of classes as their numbers; None unless all are numbers, and different ones."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return None
    numbers = [int(name) for name in names]
    return numbers if len(set(numbers)) == len(numbers) else None


def _described(label: Any) -> str:
    if getattr(label, "shape", ()):  # a tensor, or an array
        return f"{type(label).__name__} of shape {tuple(label.shape)}"
    text = repr(label)
    return f"{text[:60]} ({type(label).__name__})"
