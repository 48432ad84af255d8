"""SAM's encoder, its copies in other models of transformers, and ViTDet.

Most of their layers attend inside windows, some over the whole map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.models.vitdet.modeling_vitdet import add_decomposed_relative_positions, get_rel_pos

from evopatch.errors import UnsupportedInputError
from evopatch.forward.host_state import HostState
from evopatch.forward.joined_blocks import RelativeBlocks
from evopatch.forward.walk import PatchedHost, walk
from evopatch.forward.windowed import WindowedPass
from evopatch.patching.adapter import Adapter, Change, HostSpec, named_blocks, passages
from evopatch.patching.window_changes import common_window, window_block_changes
from evopatch.rewrite.tracing import TraceSpec

from . import layer
from .families import loaded, row_of
from .recording import is_recorded


class SamBlocks(RelativeBlocks):
    """Of SAM."""

    norm = "layer_norm1"

    def heads(self, attention: Any) -> int:
        return int(attention.num_attention_heads)

    def between(self, attention: Any, length: int, table: Tensor) -> Tensor:
        between: Tensor = attention.get_rel_pos(length, length, table)
        return between


class VitDetBlocks(RelativeBlocks):
    """Of ViTDet, some of which end with a convolution.

    Args:
        window: As for all of them.
        convolves: This one does.
    """

    attention = "attention"
    channels_first = True

    def __init__(self, window: int, convolves: bool) -> None:
        super().__init__(window)
        self.last = "residual" if convolves else None

    def call(self, block: Any, x: Tensor, inputs: tuple[Any, ...], options: Any) -> Any:
        out, *_ = block.forward(x.transpose(1, 2).unsqueeze(3))
        return out.squeeze(3).transpose(1, 2), ()

    def between(self, attention: Any, length: int, table: Tensor) -> Tensor:
        between: Tensor = get_rel_pos(length, length, table)
        return between


class Family(NamedTuple):
    """One encoder, which loops over its layers."""

    blocks: str = "layers"
    """Path of their container."""
    vitdet: bool = False


# By module, below transformers.models, and class.
FAMILIES: dict[tuple[str, str], Family] = {
    ("sam.modeling_sam", "SamVisionEncoder"): Family(),
    ("sam_hq.modeling_sam_hq", "SamHQVisionEncoder"): Family(),
    ("got_ocr2.modeling_got_ocr2", "GotOcr2VisionEncoder"): Family(),
    ("slanext.modeling_slanext", "SLANeXtVisionEncoder"): Family(),
    ("pp_formulanet.modeling_pp_formulanet", "PPFormulaNetVisionModel"): Family(),
    ("deepseek_ocr2.modeling_deepseek_ocr2", "DeepseekOcr2SamVisionEncoder"): Family(),
    ("unlimited_ocr.modeling_unlimited_ocr", "UnlimitedOcrSamVisionEncoder"): Family(),
    ("vitdet.modeling_vitdet", "VitDetEncoder"): Family(blocks="layer", vitdet=True),
}


class SlowFastEncoder(PatchedHost):
    """Mixin of a patched encoder. Its layers are given the tokens alone, so it runs on a view."""

    _evo_keeps_name = True
    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's own, on slow-fast layers."""
        default = args[1] if len(args) > 1 else getattr(self.config, "output_attentions", False)
        asked = kwargs.get("output_attentions", default)
        if self._evo_state.active and (asked or is_recorded("attentions")):
            raise UnsupportedInputError(
                f"output_attentions was asked of '{self._evo_state.name or 'model'}', whose layers attend among "
                "merged tokens: expected no such output while the model is patched. Leave it out, or use "
                "evopatch.set_keep_ratio(model, 1.0) or evopatch.remove(model) for this call"
            )
        return walk(self, "forward", *args, compact=True, pass_class=WindowedPass, **kwargs)


class SamAdapter(Adapter):
    """The encoders; the models that hold them, and their decoders, are as they were."""

    mixin = SlowFastEncoder

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return tuple(loaded(FAMILIES))

    def inspect(self, host: Any, name: str) -> HostSpec:
        family = row_of(host, FAMILIES)
        container = getattr(host, family.blocks)
        replaced: dict[Any, str] = {"get_decomposed_rel_pos": "relative_bias"}
        if family.vitdet:
            replaced = {add_decomposed_relative_positions: "add_relative_bias"}
        return HostSpec(
            blocks=(tuple((f"{family.blocks}.{index}",) for index, _ in container.named_children()),),
            prefix=0,
            readout=0,
            taper=0.0,
            windowed=True,
            trace=TraceSpec(replaced=replaced),
        )

    def plan(self, host: Any, state: HostState) -> list[Change]:
        changes = [Change(host, self.mixin, {"_evo_state": state}), *passages(host, state.index_of)]
        vitdet, blocks = row_of(host, FAMILIES).vitdet, named_blocks(host, state)
        window = common_window((block for _, block in blocks), self.grid(host, image_size_of(host.config)))
        for name, block in blocks:
            kind = VitDetBlocks(window, bool(block.use_residual_block)) if vitdet else SamBlocks(window)
            changes += window_block_changes(block, name, state, kind)
        return changes

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        return layer.grid_of(host.config, image_size)


def image_size_of(config: Any) -> tuple[int, int]:
    """Height and width that a model is made for."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])
