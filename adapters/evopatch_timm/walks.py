"""The methods of timm's models that walk over the blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evopatch.forward.walk import PatchedHost, walk
from evopatch.forward.windowed import WindowedPass


class SlowFastFlat(PatchedHost):
    """Mixin of a patched flat model: `forward_features` and `forward_intermediates`."""

    grad_checkpointing: bool

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks."""
        return self._features(*args, **kwargs)

    def _features(self, *args: Any, **kwargs: Any) -> Any:
        # A checkpointed block may depend on its arguments only, so it takes and returns the full grid.
        compact = not self.grad_checkpointing
        return walk(self, "forward_features", *args, compact=compact, grid=self._grid_of(*args), **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks; intermediate features are the full grid at every block."""
        return walk(self, "forward_intermediates", *args, compact=False, grid=self._grid_of(*args), **kwargs)

    def _grid_of(self, *args: Any) -> tuple[int, int] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 4:
            return None  # patches, as many for every image
        if not hasattr(_embedding(self), "dynamic_feat_size"):
            return None
        return grid_of(self, (args[0].shape[-2], args[0].shape[-1]))


class SlowFastWindowed(PatchedHost):
    """Mixin of a patched model of windowed blocks, between which there is always the full grid: the same methods."""

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks."""
        return walk(self, "forward_features", *args, compact=True, pass_class=WindowedPass, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks."""
        return walk(self, "forward_intermediates", *args, compact=True, pass_class=WindowedPass, **kwargs)


def grid_of(host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patch tokens, as the model embeds images of `(height, width)` pixels."""
    rows, columns = _embedding(host).dynamic_feat_size(image_size)
    return rows, columns


def _embedding(host: Any) -> Any:
    return host.embeds if hasattr(host, "embeds") else host.patch_embed
