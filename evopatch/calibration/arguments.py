"""What `calibrate` is given beside model, images and target."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError


def check_arguments(batch_size: Any, budget: Any) -> None:
    """
    Raises:
        ConfigError: If either is no number of its kind, or outside its range.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r}: expected a whole number, at least 1")
    if not isinstance(budget, (int, float)) or isinstance(budget, bool) or not budget > 0:
        raise ConfigError(f"budget={budget!r}: expected seconds, more than 0; float('inf') for no bound")
