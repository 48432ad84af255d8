"""How the settings of a run differ from those that it was begun with, for messages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def differences(saved: Mapping[str, Any], given: Mapping[str, Any], leave_out: Collection[str] = ()) -> str:
    """What was and what is now, by name; `""` where all is the same. Of mappings inside, what differs in them.

    Args:
        saved: Plain values.
        given: The same, as they are now.
        leave_out: Names that may differ.
    """
    return ", ".join(_differences(saved, given, "", leave_out))


def _differences(
    saved: Mapping[str, Any], given: Mapping[str, Any], path: str, leave_out: Collection[str]
) -> list[str]:
    found = []
    for key in sorted((saved.keys() | given.keys()) - set(leave_out)):
        was, now, name = saved.get(key), given.get(key), ".".join(part for part in (path, key) if part)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += _differences(was, now, name, ())
        elif was != now:
            found.append(f"{name} was {was!r} and is {now!r} now")
    return found
