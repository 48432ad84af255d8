"""What transformers records during a forward, also where a model doesn't tell its encoder so."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

try:
    _capturing: Any = importlib.import_module("transformers.utils.output_capturing")
except ImportError:  # older versions record in the models' own code
    _capturing = None


# torch.compile before torch 2.11 follows no context variable.
_CAN_BE_ASKED = torch.__version__ >= "2.11"


def is_recorded(name: str) -> bool:
    """Whether hooks that transformers put on layers collect `"hidden_states"` or `"attentions"` now.

    Compiled by a torch that can't ask: True, which costs some speed where they don't.
    """
    if not _CAN_BE_ASKED and torch.compiler.is_compiling():
        return _capturing is not None
    active = getattr(_capturing, "_active_collector", None)
    collected = None if active is None else active.get()
    return collected is not None and name in collected


def is_looked_between(host: Any, layers: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether layers have to take and return the full grid: hidden states are recorded between them, and a checkpointed
    layer may depend on its arguments only.

    Args:
        host: The module that loops over them.
        layers: Its own.
        kwargs: What it is called with.
    """
    asked = kwargs.get("output_hidden_states", getattr(host.config, "output_hidden_states", False))
    checkpointed = any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers)
    return bool(asked) or checkpointed or is_recorded("hidden_states")
