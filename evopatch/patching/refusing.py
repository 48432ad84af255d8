"""Architectures that are known and not served, for the error to say why."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ..errors import UnsupportedModelError
from ..forward.walk import PatchedHost
from .adapter import Adapter, HostSpec


class RefusingAdapter(Adapter):
    """Refuses its hosts. A model that holds others, too, is patched through those."""

    mixin = PatchedHost

    reason: ClassVar[str]
    """What is in the way."""

    def inspect(self, host: nn.Module, name: str) -> HostSpec:
        raise UnsupportedModelError(f"{name} ({type(host).__name__}) isn't served: {self.reason}. Leave it unpatched")


class ReducedKeysAdapter(RefusingAdapter):
    """PVT and PVT v2."""

    reason = (
        "its keys and values are made by convolutions over the whole grid of tokens, and so are the hidden features of "
        "PVT v2's MLP, so none of its blocks can do with the compact set alone (docs/faq.md)"
    )
