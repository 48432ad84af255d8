"""Whether two modules would be traced to the same graph: blocks are alike, as a rule, so one is traced for all."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_TENSORS = ("_parameters", "_buffers")


def fingerprint(module: nn.Module) -> Hashable:
    """What tracing can read of a module: its class, plain attributes, shapes, and the same of the modules in it.

    Other objects are taken by identity, so fingerprints are to be compared only while the modules live.
    """
    own = module.__dict__
    plain = tuple(
        (name, _known(value))
        for name, value in sorted(own.items())
        if name not in ("training", "_modules", *_TENSORS) and not _is_empty(value)
    )
    tensors = tuple((n, None if t is None else tuple(t.shape)) for kind in _TENSORS for n, t in own[kind].items())
    inner = tuple((name, None if m is None else fingerprint(m)) for name, m in own["_modules"].items())
    return type(module), plain, tensors, inner


def _is_empty(value: Any) -> bool:
    """Such as the hooks that nobody has registered."""
    return isinstance(value, (dict, set)) and not value


def _known(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_known(part) for part in value)
    if isinstance(value, set):
        return frozenset(map(_known, value))
    return id(value)
