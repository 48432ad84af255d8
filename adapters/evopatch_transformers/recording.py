"""What transformers records during a forward, also where a model doesn't tell its encoder so."""

from __future__ import annotations

import importlib
from typing import Any

try:
    _capturing: Any = importlib.import_module("transformers.utils.output_capturing")
except ImportError:  # older versions record in the models' own code
    _capturing = None


def is_recorded(name: str) -> bool:
    """Whether hooks that transformers put on layers collect `"hidden_states"` or `"attentions"` now."""
    active = getattr(_capturing, "_active_collector", None)
    collected = None if active is None else active.get()
    return collected is not None and name in collected
