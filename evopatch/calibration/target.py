"""What a calibration is to reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError

_RANGES = {
    "flops": (0.0, 1.0, "a share of the unpatched FLOPs in (0, 1)"),
    "speedup": (1.0, 100.0, "more than 1 times as fast as unpatched"),
    "kl": (0.0, math.inf, "nats per image, above 0"),
    "agreement": (0.0, 1.0, "a share of the images in (0, 1)"),
}


@dataclass(frozen=True)
class Target:
    """One number to reach; everything else is as good as can be found under it."""

    kind: str
    """`"flops"` and `"speedup"` bound what the model costs, `"kl"` and `"agreement"` what it loses."""
    value: float

    @classmethod
    def of(cls, **given: float | None) -> Target:
        """
        Args:
            **given: By kind; None where it isn't asked for.

        Raises:
            ConfigError: Unless exactly one is given, in its range.
        """
        asked = {kind: value for kind, value in given.items() if value is not None}
        if len(asked) != 1:
            names = " and ".join(f"target_{kind}" for kind in asked) or "none"
            raise ConfigError(f"{names} given: expected one of {', '.join(f'target_{kind}' for kind in _RANGES)}")
        ((kind, value),) = asked.items()
        low, high, expected = _RANGES[kind]
        if not isinstance(value, (int, float)) or not low < value < high:
            raise ConfigError(f"target_{kind}={value!r}: expected {expected}")
        return cls(kind, float(value))

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"
