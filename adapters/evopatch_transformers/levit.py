"""LeViT of transformers: a pyramid without a class token, whose attention between stages needs the whole grid."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers.models.levit.modeling_levit import LevitAttention, LevitEncoder, LevitMLPLayer, LevitModel

from evopatch.forward.spec import Block
from evopatch.forward.token_counts import check_size
from evopatch.forward.walk import PatchedHost, walk
from evopatch.patching.adapter import Change, HostSpec
from evopatch.patching.pyramid import BiasedPyramidAdapter


class SlowFastLevit(PatchedHost):
    """Mixin of a patched encoder: its one method that walks over the stages."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own, on slow-fast blocks; hidden states are those between the stages."""
        return walk(self, "forward", *args, compact=True, **kwargs)


class LevitAdapter(BiasedPyramidAdapter):
    """The encoder that every LeViT model and head of transformers holds."""

    mixin = SlowFastLevit

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return (LevitEncoder,)

    def inspect(self, host: Any, name: str) -> HostSpec:
        stages = tuple(_blocks(stage, f"stages.{number}") for number, stage in enumerate(host.stages))
        sides = [math.isqrt(host.get_submodule(stage[0][0]).module.len_points) for stage in stages if stage]
        return self.describe(name, stages, tuple((side, side) for side in sides))

    def plan_holder(self, holder: Any, host: nn.Module) -> list[Change]:
        """The encoder gets no images: what holds it looks at their size."""
        return [Change(holder, None, {}, pre_hook=_look_at_size)] if isinstance(holder, LevitModel) else []


def _look_at_size(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    images, state = kwargs.get("pixel_values", args[0] if args else None), model.encoder.__dict__.get("_evo_state")
    if isinstance(images, Tensor) and images.dim() == 4 and state is not None:
        check_size(images, model.config.patch_size, state)


def _blocks(stage: Any, path: str) -> tuple[Block, ...]:
    """An attention layer and the MLP layer after it; a stage's last layers, which lead to the next grid, are none."""
    inner = [getattr(layer, "module", None) for layer in stage.layers]
    blocks = []
    for index, module in enumerate(inner):
        if isinstance(module, LevitAttention):
            has_mlp = isinstance(inner[index + 1], LevitMLPLayer) if index + 1 < len(inner) else False
            blocks.append(tuple(f"{path}.layers.{i}" for i in range(index, index + 1 + has_mlp)))
    return tuple(blocks)
