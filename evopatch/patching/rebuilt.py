"""Whether two models are built alike."""

from __future__ import annotations

from torch import nn

from ..errors import CheckpointError
from ..rewrite.classes import host_class


def check_rebuilt(model: nn.Module, rebuilt: nn.Module, advice: str) -> None:
    """Compare tensors' shapes, and modules' classes with their settings; dropout doesn't count.

    Args:
        model: The model to save.
        rebuilt: What its library builds from what it would save, maybe on the meta device.
        advice: What to do about a difference.

    Raises:
        CheckpointError: Names the first difference.
    """
    here, there = _structure(model), _structure(rebuilt)
    different = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"another model would be built from what is saved: '{name}' is {here.get(name)} here and "
            f"{there.get(name)} there ({len(different)} differences). {advice}"
        )


def _structure(model: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        cls = host_class(module)
        if "Drop" not in cls.__name__ and cls is not nn.Identity:
            found[f"{name} (module)"] = (cls.__name__, cls.extra_repr(module))
    return found
