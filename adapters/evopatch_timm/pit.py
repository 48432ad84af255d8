"""timm PiT: a pyramid with class tokens, whose strided convolution between stages needs the whole grid."""

from __future__ import annotations

from typing import Any

from timm.models.pit import PoolingVisionTransformer
from torch import Tensor, nn

from evopatch.forward.walk import PatchedHost, walk
from evopatch.forward.whole import reads_prefix_only
from evopatch.patching.adapter import HostSpec
from evopatch.patching.pyramid import PyramidAdapter
from evopatch.rewrite.reading import is_of

_RETURNS_PREFIX = ("forward_features",)


class SlowFastPit(PatchedHost):
    """Mixin of a patched PiT: the two methods that walk over the stages."""

    transformers: Any
    norm: nn.Module

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks; it returns the class tokens alone."""
        reads_prefix = reads_prefix_only(self, "timm", _RETURNS_PREFIX, (self.norm,))
        return walk(self, "forward_features", x, *args, compact=True, reads_prefix=reads_prefix, **kwargs)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks; intermediate features are those between the stages."""
        return walk(self, "forward_intermediates", x, *args, compact=True, **kwargs)


class PitAdapter(PyramidAdapter):
    """PiT, distilled or not."""

    mixin = SlowFastPit

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (PoolingVisionTransformer,)

    def inspect(self, host: Any, name: str) -> HostSpec:
        stages = list(host.transformers)
        blocks = tuple(
            tuple((f"transformers.{number}.blocks.{index}",) for index in range(len(stage.blocks)))
            for number, stage in enumerate(stages)
        )
        grids = [(host.patch_embed.height, host.patch_embed.width)]
        for stage in stages[1:]:
            grids.append(_pooled(grids[-1], stage.pool.conv))
        prefix = host.cls_token.shape[1]
        return self.describe(
            name,
            blocks,
            tuple(grids),
            prefix=prefix,
            readout=prefix,
            head_reads=prefix if is_of("timm", host, _RETURNS_PREFIX) else 0,
            # Of a fine grid with few channels and two or three blocks a selection costs about what it saves.
            start=len(blocks[0]) if len(blocks) > 1 else None,
            # Its grids get coarser by themselves: keeping less of the last one costs more than it saves.
            taper=0.0 if len(blocks) > 1 else None,
        )


def _pooled(grid: tuple[int, int], conv: Any) -> tuple[int, int]:
    """Rows and columns after a stage's pooling."""
    sizes = zip(grid, conv.kernel_size, conv.stride, conv.padding, strict=True)
    rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sizes)
    return rows, columns
