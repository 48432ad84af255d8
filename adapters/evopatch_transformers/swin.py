"""Swin and Swin V2 of transformers, and every model that holds their encoders or a copy of them: with heads, as
backbones, in detectors.

The class of an encoder that records outputs stays: the state travels in its keyword arguments. Those that take none,
and record nothing, run on a view.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from evopatch.errors import UnsupportedInputError
from evopatch.forward.host_state import HostState
from evopatch.forward.spec import qualified
from evopatch.forward.walk import viewed
from evopatch.forward.window_blocks import WindowedBlocks
from evopatch.forward.windowed import WindowedPass
from evopatch.patching.adapter import Adapter, Change, HostSpec, named_blocks
from evopatch.patching.window_changes import window_block_changes
from evopatch.rewrite.classes import Swapped
from evopatch.rewrite.view import View

from .families import loaded, row_of
from .swin_blocks import ShrinkingBlocks, SwinBlocks, SwinV2Blocks, TableBlocks


class Family(NamedTuple):
    """One encoder, which loops over its stages."""

    kind: type[WindowedBlocks]
    """Of its blocks."""
    stages: str = "layers"
    """Path of the container of its stages."""
    blocks: str = "blocks"
    """Path in a stage of the container of its blocks."""
    coarsens: bool = True
    """Its stages have coarser and coarser grids."""
    no_grid: str = ""
    """Why its tokens aren't the grid of one image's patches, where they aren't."""


# By module, below transformers.models, and class.
FAMILIES: dict[tuple[str, str], Family] = {
    ("swin.modeling_swin", "SwinEncoder"): Family(SwinBlocks),
    ("swinv2.modeling_swinv2", "Swinv2Encoder"): Family(SwinV2Blocks),
    ("donut.modeling_donut_swin", "DonutSwinEncoder"): Family(ShrinkingBlocks),
    ("maskformer.modeling_maskformer_swin", "MaskFormerSwinEncoder"): Family(TableBlocks),
    ("clap.modeling_clap", "ClapAudioEncoder"): Family(
        ShrinkingBlocks, no_grid="takes sound, whose patches aren't a grid of an image's"
    ),
    ("swin2sr.modeling_swin2sr", "Swin2SREncoder"): Family(
        SwinV2Blocks, stages="stages", blocks="layers", coarsens=False
    ),
}


_ASKED = "output_attentions"


class SlowFastStage(Swapped):
    """Mixin of a patched stage."""

    _evo_state: HostState
    _evo_name: str
    _evo_path: str

    def forward(self, *args: Any, evo_pass: WindowedPass | None = None, **kwargs: Any) -> Any:
        """The stage's own, on the steps of this forward."""
        if evo_pass is None:
            self._evo_state.refuse_bypass(self._evo_name)
            return self._evo_host_class.forward(self, *args, **kwargs)
        return viewed(self, evo_pass, self._evo_path).forward(*args, **kwargs)


class SlowFastEncoder(Swapped):
    """Mixin of a patched encoder that takes no other keyword arguments than it knows."""

    _evo_state: HostState
    _evo_stages: str
    _evo_arguments: tuple[str, ...]
    """Of its forward, in order."""
    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's own, whose stages are given the state of this forward."""
        wanted = kwargs.get("output_attentions", dict(zip(self._evo_arguments, args, strict=False)).get(_ASKED))
        forward_pass = _pass(self._evo_state, bool(wanted) or bool(getattr(self.config, "output_attentions", False)))
        stages = [partial(stage, evo_pass=forward_pass) for stage in getattr(self, self._evo_stages)]
        return View(self, {self._evo_stages: stages}).forward(*args, **kwargs)


def start_pass(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a Swin encoder: a new state for this forward pass, among its keyword arguments."""
    wanted = kwargs.get("output_attentions", getattr(host.config, "output_attentions", False))
    return args, {**kwargs, "evo_pass": _pass(host._evo_state, bool(wanted))}


def _pass(state: HostState, attentions_wanted: bool) -> WindowedPass:
    if attentions_wanted and state.active:
        raise UnsupportedInputError(
            f"output_attentions was asked of '{state.name or 'model'}', whose blocks attend among chosen or merged "
            "tokens: expected no such output while the model is patched. Leave it out, or use "
            "evopatch.set_keep_ratio(model, 1.0) or evopatch.remove(model) for this call"
        )
    forward_pass = WindowedPass(state)
    forward_pass.depth = state.depth
    return forward_pass


class SwinAdapter(Adapter):
    """The encoders, which loop over the stages."""

    families: ClassVar[dict[tuple[str, str], Family]] = FAMILIES

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return tuple(loaded(self.families))

    def inspect(self, host: Any, name: str) -> HostSpec:
        family = row_of(host, self.families)
        blocks = tuple(
            tuple((f"{path}.{family.blocks}.{name}",) for name, _ in getattr(stage, family.blocks).named_children())
            for path, stage in _stages(host, family)
        )
        return HostSpec(blocks=blocks, prefix=0, readout=0, taper=0.0, windowed=True, coarsens=family.coarsens)

    def plan(self, host: Any, state: HostState) -> list[Change]:
        family = row_of(host, self.families)
        own: dict[str, Any] = {"_evo_state": state}
        # The class of an encoder that records outputs stays.
        if isinstance(host, PreTrainedModel):
            changes = [Change(host, None, own, start_pass)]
        else:
            arguments = tuple(inspect.signature(type(host).forward).parameters)[1:]
            own |= {"_evo_stages": family.stages, "_evo_arguments": arguments}
            changes = [Change(host, SlowFastEncoder, own)]
        for path, stage in _stages(host, family):
            named = {"_evo_name": qualified(state.name, path), "_evo_path": path}
            changes.append(Change(stage, SlowFastStage, own | named))
        for name, block in named_blocks(host, state):
            changes += window_block_changes(block, name, state, family.kind())
        return changes

    def grid(self, host: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        if reason := row_of(host, self.families).no_grid:
            raise UnsupportedInputError(f"{type(host).__name__} {reason}")
        size = host.config.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        return -(-image_size[0] // height), -(-image_size[1] // width)


def _stages(host: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    return [(f"{family.stages}.{name}", stage) for name, stage in host.get_submodule(family.stages).named_children()]
