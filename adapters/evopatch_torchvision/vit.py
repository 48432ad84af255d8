"""torchvision's ViT: blocks with `nn.MultiheadAttention` in an encoder of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from evopatch.forward.walk import PatchedHost, refuse_symbolic, walk
from evopatch.forward.whole import reads_prefix_only
from evopatch.patching.adapter import Adapter, HostSpec
from evopatch.rewrite.reading import is_of

_WHOLE = ("forward", "_process_input")


class SlowFast(PatchedHost):
    """Mixin of a patched torchvision ViT."""

    encoder: Any
    patch_size: int

    def forward(self, x: Tensor) -> Tensor:
        """The host's own, on slow-fast blocks; its head reads the class token only."""
        refuse_symbolic((x,), {})
        reads_prefix = reads_prefix_only(self, "torchvision", _WHOLE, (self.encoder.ln,)) and _is_stock(self.encoder)
        grid = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        out: Tensor = walk(self, "forward", x, compact=True, grid=grid, reads_prefix=reads_prefix)
        return out


def _is_stock(encoder: nn.Module) -> bool:
    return is_of("torchvision", encoder, ("forward",))


class ViTAdapter(Adapter):
    """torchvision's `vit_*`."""

    mixin = SlowFast

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (VisionTransformer,)

    def inspect(self, host: Any, name: str) -> HostSpec:
        stock = is_of("torchvision", host, _WHOLE) and _is_stock(host.encoder)
        return HostSpec(blocks="encoder.layers", prefix=1, readout=1, head_reads=1 if stock else 0)

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        return image_size[0] // host.patch_size, image_size[1] // host.patch_size
