"""What an architecture has to say about itself to be patched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from .graph import TraceSpec
from .swap import Swapped


@dataclass(frozen=True)
class HostSpec:
    """One host module: the module whose forward walks over a run of attention blocks."""

    blocks: str
    """Name of the attribute that holds the blocks."""
    prefix: int
    """`P`: how many prefix tokens (class, distillation, registers) precede the patch tokens."""
    readout: int
    """How many of the first prefix tokens the head reads; 0 where it averages the patch tokens."""
    trace: TraceSpec = field(default_factory=TraceSpec)
    token_inputs: tuple[str, ...] = ()
    """Those of the block's inputs that have one entry per patch token, such as a rotary table: averaged per group."""


class Adapter(ABC):
    """Knows one architecture of one library. About 60 lines; see `adapters/evopatch_timm/vit.py`."""

    mixin: ClassVar[type[Swapped]]
    """Goes before the host's class: wraps the methods that walk over the blocks (see `stream.walk`)."""
    method: ClassVar[str] = "forward"
    """The one of those methods that takes images."""

    @abstractmethod
    def hosts(self) -> tuple[type[nn.Module], ...]:
        """The classes that this adapter serves, subclasses included. May import the library."""

    @abstractmethod
    def inspect(self, host: nn.Module, name: str) -> HostSpec:
        """Describe one host.

        Args:
            host: An instance of one of `hosts()`.
            name: Fully qualified, for errors.

        Raises:
            UnsupportedModelError: If this variant can't be patched; says why.
        """

    @abstractmethod
    def grid(self, host: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patch tokens for images of `(height, width)` pixels."""
