"""How the settings of a run differ from those that it was begun with, for messages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

NAMED = 3
"""How many names a message gives of lists that differ in more."""


def differences(saved: Mapping[str, Any], given: Mapping[str, Any], leave_out: Collection[str] = ()) -> str:
    """What was and what is now, by name; `""` where all is the same. Of mappings inside, and of lists of
    names, what differs in them.

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
        elif was != now and _names(was) and _names(now) and set(was) != set(now):
            lost, added = [part for part in was if part not in now], [part for part in now if part not in was]
            changes = [("no longer", lost), ("now also", added)]
            found += [f"{name} are {word} {_first_of(names)}" for word, names in changes if names]
        elif was != now:
            found.append(f"{name} was {was!r} and is {now!r} now")
    return found


def _names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _first_of(names: list[str]) -> str:
    listed = ", ".join(map(repr, names[:NAMED]))
    return listed if len(names) <= NAMED else f"{listed} and {len(names) - NAMED} more"
