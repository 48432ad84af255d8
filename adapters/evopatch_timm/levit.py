"""timm LeViT: a pyramid without a class token, whose strided attention between stages needs the whole grid."""

from __future__ import annotations

from typing import Any

from timm.models.levit import Levit
from torch import nn

from evopatch.adapter import Adapter, HostSpec
from evopatch.graph import TraceSpec
from evopatch.spec import Pyramid
from evopatch.stream import walk
from evopatch.swap import Swapped


class SlowFastLevit(Swapped):
    """Mixin of a patched timm LeViT: the two methods that walk over the stages."""

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks."""
        # Gradient checkpoints hold whole stages, and no run of blocks crosses from one into the next.
        return walk(self, "forward_features", *args, compact=True, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks; intermediate features are those between the stages."""
        return walk(self, "forward_intermediates", *args, compact=True, **kwargs)


class LevitAdapter(Adapter):
    """Linear and convolutional LeViT, distilled or not."""

    mixin = SlowFastLevit
    notice = (
        "LeViT's blocks are so small that a patched model may be slower than unpatched for single images (see "
        "benchmarks/speed.md); measure yours with evopatch.benchmark"
    )

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (Levit,)

    def inspect(self, host: Any, name: str) -> HostSpec:
        blocks = tuple(
            tuple((f"stages.{number}.blocks.{index}",) for index in range(len(stage.blocks)))
            for number, stage in enumerate(host.stages)
        )
        grids = tuple(tuple(stage.blocks[0].attn.resolution) for stage in host.stages)
        return HostSpec(
            blocks=blocks,
            prefix=0,
            readout=0,
            received=True,
            taper=0.5,  # coarse grids are more redundant than fine ones
            trace=TraceSpec(position_biases=("get_attention_biases",)),
            # Every second token is taken as a query of the strided attention.
            pyramid=Pyramid(grids, kernel=3),
            channels_first=host.use_conv,
        )

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = host.stages[0].blocks[0].attn.resolution
        return rows, columns
