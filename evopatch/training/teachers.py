"""Whose predictions a run learns: found by name, checked, told from others."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..forward.spec import qualified
from ..measure.accuracy import logits_of
from ..measure.fingerprint import fingerprint

_INSTEAD = "leave it out, for the model as it is now, unpatched"


def find(teacher: nn.Module | str | None, original: nn.Module) -> nn.Module:
    """
    Args:
        teacher: A classifier, or its name.
        original: What teaches where there is none.

    Raises:
        UnsupportedModelError: If nothing has that name.
        CheckpointError: If its weights can't be had.
    """
    if teacher is None:
        return original
    if isinstance(teacher, nn.Module):
        return teacher
    from ..sources.models import open_classifier

    return open_classifier(teacher).model.requires_grad_(False)


def check_apart(teacher: nn.Module, model: nn.Module, trained: Collection[nn.Parameter]) -> None:
    """
    Args:
        teacher: A classifier.
        model: That it teaches.
        trained: Its parameters that are trained. Others may be the teacher's too, as values in modules of its own.

    Raises:
        ConfigError: If training the model would change the teacher.
    """
    if teacher is model:
        raise ConfigError(f"the teacher is the model itself: {_INSTEAD}")
    own = set(map(id, model.modules()))  # they are in training mode when the model is
    averages = (buffer for buffer in model.buffers() if buffer.is_floating_point())
    changing = {address for tensor in chain(trained, averages) for address in _addresses(tensor)}
    for path, module in teacher.named_modules():
        tensors = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in tensors:
            if id(module) in own or _addresses(tensor) & changing:
                raise ConfigError(
                    f"the teacher's '{qualified(path, name)}' is the model's own, and would change with it: expected a "
                    f"teacher that stays as it is. Give copy.deepcopy(teacher), or {_INSTEAD}"
                )


def check_classes(teacher: nn.Module, classes: int, image: Tensor, device: torch.device) -> None:
    """
    Args:
        teacher: A classifier.
        classes: Of the model that it teaches.
        image: `(3, height, width)`, any of the data.
        device: The teacher's.

    Raises:
        ConfigError: If it has other classes.
    """
    parameter = next(teacher.parameters())
    with torch.no_grad():
        found = logits_of(teacher(image.unsqueeze(0).to(device, parameter.dtype))).shape[1]
    if found != classes:
        raise ConfigError(f"the teacher has {found} classes and the model {classes}: expected the same ones")


def identity(teacher: nn.Module) -> str:
    """What tells a teacher from others; that of a compiled one is that of the model which was compiled."""
    return fingerprint(getattr(teacher, "_orig_mod", teacher).state_dict())


def _addresses(tensor: Tensor) -> set[int]:
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass that holds others, such as a quantised weight
        names, _ = tensor.__tensor_flatten__()
        return {address for name in names for address in _addresses(getattr(tensor, name))}
    # Without values, on the meta device or empty, it has none.
    return {tensor.untyped_storage().data_ptr()} - {0}
