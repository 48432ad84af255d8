"""Copies of a model on the same weights in memory, to be measured in its place."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from .patch import forget_caches

Model = TypeVar("Model", bound=nn.Module)


def shared_copy(model: Model, requires_grad: bool = False) -> Model:
    """A copy that has gradients and flags of its own, but the values of the model's parameters, not a copy of them.

    Args:
        model: Stays as it is, as long as the copy isn't trained.
        requires_grad: Of all the copy's floating-point parameters.
    """
    own = {
        id(p): nn.Parameter(p.detach(), requires_grad=requires_grad and p.is_floating_point())
        for p in model.parameters()
    }
    forget_caches(model)  # may hold tensors of a graph, which can't be copied
    return copy.deepcopy(model, own)
