"""What adapters of pyramids whose stages have flat blocks (LeViT, PiT) have in common."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError
from ..forward.spec import Block, HostSpec, Pyramid
from ..rewrite.tracing import TraceSpec
from .adapter import Adapter


class PyramidAdapter(Adapter):
    """An adapter of a pyramid between whose stages every second token is taken, of the whole grid."""

    def describe(
        self, name: str, blocks: tuple[tuple[Block, ...], ...], grids: tuple[tuple[int, int], ...], **fields: Any
    ) -> HostSpec:
        """
        Args:
            name: The host's, fully qualified.
            blocks: Of each stage.
            grids: Rows and columns of patch tokens in each stage.
            **fields: What else is to say, see `HostSpec`.

        Raises:
            UnsupportedModelError: If a stage has no block, or a grid isn't half as fine as the one before.
        """
        if not all(blocks):
            raise UnsupportedModelError(f"{name} has a stage without blocks: expected at least one in each stage")
        pyramid = Pyramid(grids, kernel=3)
        pyramid.check(name)
        return HostSpec(blocks=blocks, pyramid=pyramid, **fields)


# Coarse grids are more redundant than fine ones.
TAPER = 0.5


class BiasedPyramidAdapter(PyramidAdapter):
    """LeViT's, without a class token: blocks add a position bias to their attention logits, and attention weights are
    at hand."""

    notice = (
        "LeViT's blocks are so small that a patched model may be slower than unpatched for single images (see "
        "docs/speed.md); measure yours with evopatch.benchmark"
    )

    def describe(
        self, name: str, blocks: tuple[tuple[Block, ...], ...], grids: tuple[tuple[int, int], ...], **fields: Any
    ) -> HostSpec:
        """As of every pyramid."""
        return super().describe(
            name,
            blocks,
            grids,
            prefix=0,
            readout=0,
            received=True,
            taper=TAPER,
            trace=TraceSpec(position_biases=("get_attention_biases",)),
            caches=("attention_bias_cache",),
            **fields,
        )
