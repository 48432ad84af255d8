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
from torch import nn

from evopatch.forward.walk import refuse_symbolic
from evopatch.forward.whole import reads_prefix_only
from evopatch.patching.adapter import Adapter, HostSpec
from evopatch.rewrite.reading import is_of, rows_read
from evopatch.rewrite.tracing import TraceSpec
from evopatch.rewrite.view import View

from . import refusals
from .walks import SlowFastFlat, grid_of

_WHOLE = ("forward", "forward_features", "forward_head", "pool")


class SlowFast(SlowFastFlat):
    """Mixin of a patched timm ViT: also of the method that calls the first of those that walk over the blocks."""

    global_pool: str
    norm: Any

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's own, whose head may read prefix tokens only."""
        refuse_symbolic((x,), {})
        host: Any = self
        pools_token = self.global_pool == "token" and getattr(self, "attn_pool", None) is None
        if pools_token and reads_prefix_only(self, "timm", _WHOLE, (self.norm,)):
            host = View(self, {"forward_features": partial(self._features, reads_prefix=True)})
        return self._evo_host_class.forward(host, x, *args, **kwargs)


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
        return grid_of(host, image_size)

    def why_not(self, module: nn.Module) -> str:
        return refusals.why_not(module)

    @staticmethod
    def _readout(host: Any) -> int:
        if isinstance(host, VisionTransformerDistilled):
            return 2
        pools_patches = host.global_pool in ("avg", "avgmax", "max", "map")
        return 0 if pools_patches or host.cls_token is None else 1
