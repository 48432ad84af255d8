"""The options that an `EvoConfig` is made of."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import EvoConfig
from ..progress import errors
from .expansion import Option, expanded
from .options import parse_ratios, whole_numbers

if TYPE_CHECKING:
    from torch import nn


class RepresentativeName(str, Enum):
    """What stands in for the fast tokens."""

    matched = "matched"
    single = "single"
    none = "none"


_PANEL = "Slow-fast tokens"
_RATIO = "Share of slow tokens, or one per run (0.6,0.35)."


def _option(kind: Any, text: str, *flags: str) -> Any:
    return Annotated[kind, typer.Option(*flags, help=text, rich_help_panel=_PANEL)]


_COMMON = {
    "paper": Option(_option(bool, "The paper's setting: single, constant keep ratio.", "--paper"), False),
    "selection": Option(_option(str, "stage or layer."), "stage"),
    "schedule": Option(_option(str | None, "taper or constant.")),
    "start": Option(_option(int | None, "First selecting block.")),
    "stages": Option(_option(str | None, "Number of runs, or the first block of each (4,8).")),
}
_ONE = {
    "keep_ratio": Option(_option(str, _RATIO), "0.5"),
    "representative": Option(_option(RepresentativeName | None, "Default matched.")),
    **_COMMON,
}
_SEVERAL = {
    "keep_ratio": Option(_option(list[str] | None, f"{_RATIO} Repeat for several. Default 0.5.")),
    "representative": Option(_option(list[RepresentativeName] | None, "Repeat for several. Default matched.")),
    **_COMMON,
}


def _configs(
    keep_ratio: list[str] | None,
    representative: list[RepresentativeName] | None,
    paper: bool,
    selection: str,
    schedule: str | None,
    start: int | None,
    stages: str | None,
) -> list[EvoConfig]:
    base: dict[str, Any] = EvoConfig.paper().to_dict() if paper else EvoConfig().to_dict()
    base.update(selection=selection, start=start)
    if schedule is not None:
        base["schedule"] = schedule
    if stages is not None:
        firsts = whole_numbers(stages.split(","), stages)
        base["stages"] = firsts[0] if len(firsts) == 1 else firsts
    names = [name.value for name in representative or ()] or [base["representative"]]
    ratios = [parse_ratios(text) for text in keep_ratio or ("0.5",)]
    return [
        EvoConfig.from_dict({**base, "representative": name, "keep_ratio": ratio}) for name in names for ratio in ratios
    ]


def _config(keep_ratio: str, representative: RepresentativeName | None, **common: Any) -> EvoConfig:
    return _configs([keep_ratio], None if representative is None else [representative], **common)[0]


one_config = expanded("patch_config", _ONE, _config)
"""For a command with a parameter `patch_config: EvoConfig`."""

several_configs = expanded("patch_configs", _SEVERAL, _configs)
"""For a command with a parameter `patch_configs: list[EvoConfig]`: every representative with every keep ratio."""


def patch(network: nn.Module, model: str, *configs: EvoConfig) -> list[EvoConfig]:
    """Patch a model of the command line: as it was saved, where `--model` is a folder of `evopatch.save_pretrained` and
    none of the options above says something else.

    Args:
        network: The unpatched model.
        model: What `--model` was given.
        configs: Of the options; the model gets the first.

    Returns:
        What is asked for: them, or the one that was saved.
    """
    from ..patching.apply import apply, config_of
    from ..sources.saving import is_saved, patch_as_saved

    if configs != (EvoConfig(),) or not is_saved(Path(model)):
        apply(network, config=configs[0])
        return list(configs)
    patch_as_saved(network, Path(model))
    errors.print(f"patched as {model} was saved; --keep-ratio and the like change that", highlight=False)
    return [config_of(network)]
