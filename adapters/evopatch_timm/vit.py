"""timm ViT, DeiT and everything built like them: `VisionTransformer`, `Eva`, `VisionTransformerRelPos` and `Beit`."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from evopatch.forward.walk import PatchedHost, refuse_symbolic, walk
from evopatch.forward.whole import reads_prefix_only
from evopatch.patching.adapter import Adapter, HostSpec
from evopatch.rewrite.reading import is_of, rows_read
from evopatch.rewrite.tracing import TraceSpec
from evopatch.rewrite.view import View

_WHOLE = ("forward", "forward_features", "forward_head", "pool")


class SlowFast(PatchedHost):
    """Mixin of a patched timm ViT: the two methods that walk over the blocks, and the one that calls the first."""

    grad_checkpointing: bool
    global_pool: str
    patch_embed: Any
    norm: Any

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's own, whose head may read prefix tokens only."""
        refuse_symbolic((x,), {})
        host: Any = self
        pools_token = self.global_pool == "token" and getattr(self, "attn_pool", None) is None
        if pools_token and reads_prefix_only(self, "timm", _WHOLE, (self.norm,)):
            host = View(self, {"forward_features": partial(self._features, reads_prefix=True)})
        return self._evo_host_class.forward(host, x, *args, **kwargs)

    def forward_features(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks."""
        return self._features(x, *args, **kwargs)

    def _features(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        # A checkpointed block may depend on its arguments only, so it takes and returns the full grid.
        compact = not self.grad_checkpointing
        return walk(self, "forward_features", x, *args, compact=compact, grid=self._grid_of(x), **kwargs)

    def forward_intermediates(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks; intermediate features are the full grid at every block."""
        return walk(self, "forward_intermediates", x, *args, compact=False, grid=self._grid_of(x), **kwargs)

    def _grid_of(self, x: Any) -> tuple[int, int] | None:
        if not isinstance(x, Tensor) or not hasattr(self.patch_embed, "dynamic_feat_size"):
            return None
        rows, columns = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return rows, columns


class ViTAdapter(Adapter):
    """Flat timm transformers."""

    mixin = SlowFast

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (VisionTransformer, Eva, VisionTransformerRelPos, Beit)

    def inspect(self, host: Any, name: str) -> HostSpec:
        inputs: tuple[str, ...] = ()
        if getattr(host, "rope", None) is not None:
            inputs = ("rope",)
        elif getattr(host, "shared_rel_pos", None) is not None:
            inputs = ("shared_rel_pos",)
        elif getattr(host, "rel_pos_bias", None) is not None:
            inputs = ("shared_rel_pos_bias",)
        trace = TraceSpec(inputs, leaf_functions=(apply_rot_embed_cat,), leaf_methods=("get_bias", "_get_rel_pos_bias"))
        return HostSpec(
            blocks="blocks",
            prefix=host.num_prefix_tokens,
            readout=self._readout(host),
            head_reads=rows_read(host, "forward_head") if is_of("timm", host, _WHOLE) else 0,
            trace=trace,
            token_inputs=tuple(i for i in inputs if i == "rope"),
            mask="attn_mask",
        )

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = host.patch_embed.dynamic_feat_size(image_size)
        return height, width

    @staticmethod
    def _readout(host: Any) -> int:
        if isinstance(host, VisionTransformerDistilled):
            return 2
        pools_patches = host.global_pool in ("avg", "avgmax", "max", "map")
        return 0 if pools_patches or host.cls_token is None else 1
