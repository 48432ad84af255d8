"""Files of weights are read as tensors and plain values, whoever reads them: nothing in them is run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_only() -> Iterator[None]:
    """Inside, every `torch.load` of the process is one with `weights_only=True`, also where a library asks for more.

    Some do: accelerate for what is registered for its checkpoints, older versions of timm for all files.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def foreign_code(file: Path) -> str:
    """Part of an error message about a file that couldn't be read: the functions and classes that its pickle asks for.

    Returns:
        `""` where there are none, or the file is no pickle of `torch.save`.
    """
    find: Any = torch.serialization.get_unsafe_globals_in_checkpoint
    try:
        names = sorted(find(str(file)))
    except Exception:  # a damaged file, or one of another kind
        return ""
    if not names:
        return ""
    return (
        f". It asks for {', '.join(names[:5])}, which aren't run: only tensors and plain values are read from a file "
        "of weights. Save model.state_dict() alone"
    )
