"""The options that an `EvoConfig` is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import EvoConfig
from ..progress import errors
from .expansion import Option, expanded
from .options import parse_ratios, parse_start, whole_numbers

if TYPE_CHECKING:
    from torch import nn

    from ..patching.handle import Patched


class RepresentativeName(str, Enum):
    """What stands in for the fast tokens."""

    matched = "matched"
    single = "single"
    none = "none"


@dataclass(frozen=True)
class Asked:
    """What the options say: one or more settings, each with those fields of an `EvoConfig` only that were given."""

    settings: tuple[Mapping[str, Any], ...]

    def over(self, base: EvoConfig) -> list[EvoConfig]:
        """Each setting, with all other fields from `base`.

        Raises:
            ConfigError: If a value is outside its range, or two of them disagree.
        """
        return [EvoConfig.from_dict({**base.to_dict(), **given}) for given in self.settings]


_PANEL = "Slow-fast tokens"
_RATIO = "Share of slow tokens, or one per run (0.6,0.35)."


def _option(kind: Any, text: str, *flags: str) -> Any:
    return Annotated[kind, typer.Option(*flags, help=text, rich_help_panel=_PANEL)]


_PRESETS = {"paper": EvoConfig.paper, "dense": EvoConfig.dense, "exact": EvoConfig.exact}
# None throughout for what isn't given: a saved model has settings of its own, which only given options change.
_COMMON = {
    "paper": Option(_option(bool, "The paper's setting: single, constant keep ratio.", "--paper"), False),
    "dense": Option(_option(bool, "For dense features: six short runs, tokens chosen by novelty.", "--dense"), False),
    "exact": Option(_option(bool, "All tokens slow, and nothing computed that isn't read.", "--exact"), False),
    "selection": Option(_option(str | None, "stage or layer. Default stage.")),
    "schedule": Option(_option(str | None, "taper or constant. Default taper.")),
    "start": Option(_option(str | None, "First selecting block, or the share of the depth before it (0.17).")),
    "stages": Option(_option(str | None, "Number of runs, or the first block of each (4,8).")),
    "tradeoff": Option(_option(str | None, "Weight of each block's own class attention, or one per block.")),
    "importance": Option(_option(float | None, "Exponent of a token's importance against its novelty. Default 0.7.")),
    "look_ahead": Option(_option(float | None, "Weight of later blocks' attention in the importance. Default 1.")),
    "readout": Option(
        _option(bool | None, "Let the last block update only what the head reads, or never.", "--readout/--no-readout")
    ),
}
_ONE = {
    "keep_ratio": Option(_option(str | None, f"{_RATIO} Default 0.5.")),
    "representative": Option(_option(RepresentativeName | None, "Default matched.")),
    **_COMMON,
}
_SEVERAL = {
    "keep_ratio": Option(_option(list[str] | None, f"{_RATIO} Repeat for several. Default 0.5.")),
    "representative": Option(_option(list[RepresentativeName] | None, "Repeat for several. Default matched.")),
    **_COMMON,
}


def _asked(
    keep_ratio: list[str] | None,
    representative: list[RepresentativeName] | None,
    start: str | None,
    stages: str | None,
    tradeoff: str | None,
    **others: Any,
) -> Asked:
    common = _preset([name for name in _PRESETS if others.pop(name)])
    common |= {name: value for name, value in others.items() if value is not None}
    if start is not None:
        common["start"] = parse_start(start)
    if stages is not None:
        firsts = whole_numbers(stages.split(","), stages)
        common["stages"] = firsts[0] if len(firsts) == 1 else firsts
    if tradeoff is not None:
        common["tradeoff"] = parse_ratios(tradeoff)
    kinds: list[dict[str, Any]] = [{"representative": name.value} for name in representative or ()] or [{}]
    ratios: list[dict[str, Any]] = [{"keep_ratio": parse_ratios(text)} for text in keep_ratio or ()] or [{}]
    asked = Asked(tuple({**common, **kind, **ratio} for kind in kinds for ratio in ratios))
    asked.over(EvoConfig())  # what is out of range is said before a model is loaded
    return asked


def _preset(names: list[str]) -> dict[str, Any]:
    if len(names) > 1:
        raise typer.BadParameter(f"{' and '.join(f'--{name}' for name in names)}: expected one preset at most")
    return _PRESETS[names[0]]().to_dict() if names else {}


def _asked_once(keep_ratio: str | None, representative: RepresentativeName | None, **common: Any) -> Asked:
    return _asked(
        None if keep_ratio is None else [keep_ratio], None if representative is None else [representative], **common
    )


one_config = expanded("asked", _ONE, _asked_once)
"""For a command with a parameter `asked: Asked`, of one setting."""

several_configs = expanded("asked", _SEVERAL, _asked)
"""For a command with a parameter `asked: Asked`: every representative with every keep ratio."""


def patch(network: nn.Module, model: str, asked: Asked) -> list[EvoConfig]:
    """Patch a model of the command line: as it was saved, where `--model` is a folder of `evopatch.save_pretrained`,
    with what it learned; options that were given change their fields of that.

    Args:
        network: The unpatched model.
        model: What `--model` was given.
        asked: What the options say.

    Returns:
        All settings; the model has the first.

    Raises:
        ConfigError: If a setting doesn't fit the model.
    """
    from ..patching.apply import apply, config_of
    from ..patching.handle import Patched
    from ..sources.saving import is_saved, patch_as_saved

    if not is_saved(Path(model)):
        configs = asked.over(EvoConfig())
        apply(network, config=configs[0])
        return configs
    patch_as_saved(network, Path(model))
    patched = Patched(network)
    changed = dict.fromkeys(name for given in asked.settings for name in given)
    if not changed:
        _say(f"patched as {model} was saved; --keep-ratio and the like change that")
        return [config_of(network)]
    configs = asked.over(config_of(network))
    _say(f"patched as {model} was saved, but for what was given here: {', '.join(changed)}")
    for lost in dict.fromkeys(text for config in configs for text in _unused(patched, config)):
        _say(lost)
    patched.set_config(configs[0])
    return configs


def _unused(patched: Patched[Any], config: EvoConfig) -> list[str]:
    """What the model learned and makes no use of with these settings."""
    from ..forward.learned import correction_of
    from ..patching.correcting import runs_of
    from ..patching.fitting import blocks_of
    from ..patching.learning import learned

    if not learned(patched.model):
        return []
    if config.representative != "matched":
        return [f"what it learned from images is for matched representatives: not used with {config.representative}"]
    state = patched.host.state
    if state.spec.windowed:  # each block's correction serves all settings
        return []
    blocks, runs = blocks_of(patched, patched.host), runs_of(state.plan(config))
    corrected = [run for run in runs_of(state.plans) if correction_of(blocks[run[1]], run[0]) is not None]
    lost = [f"{first} to {last}" for first, last in corrected if (first, last) not in runs]
    return [f"its corrections of blocks {', '.join(lost)} are left out: these settings have other runs"] if lost else []


def _say(text: str) -> None:
    errors.print(text, highlight=False, markup=False, soft_wrap=True)
