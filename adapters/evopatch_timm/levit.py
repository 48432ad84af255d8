"""timm LeViT: a pyramid without a class token, whose strided attention between stages needs the whole grid."""

from __future__ import annotations

from typing import Any

from timm.models.levit import Levit
from torch import Tensor, nn

from evopatch.forward.token_counts import check_size
from evopatch.forward.walk import PatchedHost, refuse_symbolic, walk
from evopatch.patching.adapter import HostSpec
from evopatch.patching.pyramid import BiasedPyramidAdapter


class SlowFastLevit(PatchedHost):
    """Mixin of a patched timm LeViT: the two methods that walk over the stages."""

    stem: Any

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks."""
        self._check_size(x)
        # Gradient checkpoints hold whole stages, and no run of blocks crosses from one into the next.
        return walk(self, "forward_features", x, *args, compact=True, **kwargs)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks; intermediate features are those between the stages."""
        self._check_size(x)
        return walk(self, "forward_intermediates", x, *args, compact=True, **kwargs)

    def _check_size(self, x: Tensor) -> None:
        refuse_symbolic((x,), {})
        if hasattr(self.stem, "stride"):
            check_size(x, self.stem.stride, self._evo_state)


class LevitAdapter(BiasedPyramidAdapter):
    """Linear and convolutional LeViT, distilled or not."""

    mixin = SlowFastLevit

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (Levit,)

    def inspect(self, host: Any, name: str) -> HostSpec:
        blocks = tuple(
            tuple((f"stages.{number}.blocks.{index}",) for index in range(len(stage.blocks)))
            for number, stage in enumerate(host.stages)
        )
        grids = tuple(_grid(host.stages, number) for number, stage in enumerate(host.stages) if stage.blocks)
        return self.describe(name, blocks, grids, channels_first=host.use_conv)


def _grid(stages: Any, number: int) -> tuple[int, int]:
    """Rows and columns of the tokens in a stage."""
    attention = stages[number].blocks[0].attn
    if hasattr(attention, "resolution"):
        rows, columns = attention.resolution
    # timm before 1.0.21 keeps it only where a stage is entered.
    elif number + 1 < len(stages):
        rows, columns = stages[number + 1].downsample.attn_downsample.resolution
    else:
        finer = stages[number].downsample.attn_downsample.resolution
        rows, columns = (-(-side // 2) for side in finer)
    return rows, columns
