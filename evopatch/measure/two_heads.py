"""timm's models of a class head and a distillation head: whether they give both apart while they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

_SWITCH = "distilled_training"


def switches(model: nn.Module) -> list[nn.Module]:
    """The modules that have the switch: the model, its head, or parts that are models themselves; mostly none."""
    return [module for module in model.modules() if _SWITCH in vars(module)]


@contextmanager
def heads_apart(modules: Sequence[Any], apart: bool) -> Iterator[None]:
    """While inside, training forwards give both heads' logits, or their mean; afterwards, what they gave before.

    Args:
        modules: Those of `switches`.
        apart: Which of the two.
    """
    before = [getattr(module, _SWITCH) for module in modules]
    try:
        for module in modules:
            setattr(module, _SWITCH, apart)
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            setattr(module, _SWITCH, was)
