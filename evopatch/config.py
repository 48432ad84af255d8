"""What to patch a model with: `EvoConfig`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import ConfigError

Representative = Literal["matched", "single", "none"]
Selection = Literal["stage", "layer"]
Schedule = Literal["taper", "constant"]


@dataclass(frozen=True)
class EvoConfig:
    """How slow and fast tokens are chosen and updated (Evo-ViT, arXiv 2108.01390, section 3).

    Args:
        keep_ratio: Share of the patch tokens that are slow, in (0, 1]. One number is spread over the runs (see
            `schedule`); a sequence gives one keep ratio per run. 1.0 is exactly the original forward.
        start: First block that selects, counted from 0, or the share of the depth, below 1, that is left alone.
            None: the first third, at keep ratios below 0.45 the first quarter; of LeViT and Swin the first half of the
            first stage, of PiT the first stage.
        selection: `"stage"` selects once per run of blocks and keeps the compact set through the run,
            `"layer"` selects again before every block (the paper's section 3.4: layer-to-stage training).
        stages: Number of runs over the blocks from `start` on, or the first block of each run. A run never crosses
            from one stage of a pyramid (LeViT, PiT, Swin) to the next: there a number is that of runs in each. None:
            three runs, with a constant schedule two, or one per keep ratio; in a pyramid one per stage from `start` on;
            in a Swin with one keep ratio that tapers one per block.
        schedule: How one keep ratio is spread over the runs. `"taper"` lets it fall (three runs at 0.5: 0.76, 0.56 and
            0.31, see `plan.tapered`; the three stages of LeViT: 0.75, 0.5 and 0.25; those of PiT keep it) and makes
            later runs of one stage longer (2 to 3 to 4 and so on). In a Swin with matched representatives it is small
            early and large where a stage begins, see `plan.tapered_swin`. `"constant"` (the paper's) uses it in every
            run and makes them equally long.
        representative: What stands in for the fast tokens. `"matched"`: every fast token joins the slow token
            most similar to it, needs no training. `"single"`: one token, the mean of all fast tokens weighted by
            class attention (the paper's equations 5 and 6). `"none"`: fast tokens are carried unchanged.
        tradeoff: Weight of a block's own class attention when it is accumulated over depth (the paper's
            equation 4, where it is 0.5), in [0, 1]; a sequence gives one per block. Without effect where matched
            representatives are chosen by look-ahead alone (as by default), by foresight, or inside windows.
        importance: How much a token's importance counts against its novelty when matched representatives choose the
            slow tokens: the importance's exponent, in [0, 10]. Classifiers read what the class token attends to; dense
            features are wanted everywhere (see `dense`). With other representatives it counts where windows are chosen
            as a whole, and nowhere else; tokens matched inside windows are chosen by novelty alone.
        look_ahead: Weight of what later blocks would attend to, by their own weights on the tokens as they are now, in
            the importance that matched representatives are chosen by, in [0, 1]; the rest is what earlier blocks
            attended to, as all of it is where nothing can be looked at. For flat models and PiT, whose queries and
            keys are plain linear projections (docs/concepts.md). Without effect with other representatives, and once
            foresight is learned from images, by `apply(images=)` or `calibrate`.
        readout: Let the last block update nothing but what the head reads, where that are prefix tokens: exact, and a
            fifteenth of a 12-block model's work less. None: unless `keep_ratio` is 1.0, which is exactly the original
            forward. True: also then (see `exact`). False: never.

    Raises:
        ConfigError: If a value is outside its range.
    """

    keep_ratio: float | Sequence[float] = 0.5
    start: int | float | None = None
    selection: Selection = "stage"
    stages: int | Sequence[int] | None = None
    schedule: Schedule = "taper"
    representative: Representative = "matched"
    tradeoff: float | Sequence[float] = 0.5
    importance: float = 0.7
    look_ahead: float = 1.0
    readout: bool | None = None

    def __post_init__(self) -> None:
        for field in ("keep_ratio", "stages", "tradeoff"):
            value = getattr(self, field)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, field, tuple(value))
        for ratio in _listed(self.keep_ratio):
            _check_number("keep_ratio", ratio, expected="(0, 1]", valid=lambda v: 0.0 < v <= 1.0)
        for tradeoff in _listed(self.tradeoff):
            _check_number("tradeoff", tradeoff, expected="[0, 1]", valid=lambda v: 0.0 <= v <= 1.0)
        for field, allowed in (("selection", Selection), ("schedule", Schedule), ("representative", Representative)):
            if getattr(self, field) not in get_args(allowed):
                expected = ", ".join(map(repr, get_args(allowed)))
                raise ConfigError(f"{field}={getattr(self, field)!r}: expected one of {expected}")
        _check_number("look_ahead", self.look_ahead, expected="[0, 1]", valid=lambda v: 0.0 <= v <= 1.0)
        if not (self.readout is None or isinstance(self.readout, bool)):
            raise ConfigError(f"readout={self.readout!r}: expected True, False or None")
        _check_number("importance", self.importance, expected="[0, 10]", valid=lambda v: 0.0 <= v <= 10.0)
        if isinstance(self.start, float):
            _check_number("start", self.start, expected="(0, 1) as a share of the depth", valid=lambda v: 0.0 < v < 1.0)
        elif self.start is not None:
            _check_block("start", self.start)
        if self.stages is None:
            return
        if isinstance(self.stages, int):
            if isinstance(self.stages, bool) or self.stages < 1:
                raise ConfigError(f"stages={self.stages!r}: expected at least one run of blocks")
            return
        if not isinstance(self.stages, tuple):
            raise ConfigError(f"stages={self.stages!r}: expected a number of runs, or the first block of each")
        firsts = self.stages
        for first in firsts:
            _check_block("stages", first)
        if not firsts or list(firsts) != sorted(set(firsts)):
            raise ConfigError(f"stages={firsts}: expected the first block of each run, in increasing order")
        if self.start is not None and self.start != firsts[0]:
            raise ConfigError(
                f"start={self.start} and stages={firsts} disagree about the first selecting block: leave start out"
            )

    @classmethod
    def paper(cls, keep_ratio: float | Sequence[float] = 0.5) -> EvoConfig:
        """The paper's setting (section 4.1): one representative, keep ratio constant; of 12 blocks, runs at 4 and 8."""
        return cls(keep_ratio=keep_ratio, schedule="constant", representative="single", readout=False)

    @classmethod
    def exact(cls) -> EvoConfig:
        """All tokens slow, and nothing computed that isn't read: results equal up to rounding, for classifiers that
        read prefix tokens about 1.07 times as fast; other models stay as they are."""
        return cls(keep_ratio=1.0, readout=True)

    @classmethod
    def dense(cls, keep_ratio: float | Sequence[float] = (0.84, 0.76, 0.65, 0.59, 0.51, 0.35)) -> EvoConfig:
        """For dense features: segmentation, depth, saliency, retrieval of patches, and DINOv2 in general.

        For flat models of at least 7 blocks. Every patch token's own value is wanted, not only what the class token
        reads, so tokens are chosen nearly by novelty alone, in six short runs that begin a sixth into the depth; found
        by search (docs/accuracy.md). Does less well than the default for classifiers.
        """
        return cls(keep_ratio=keep_ratio, start=0.17, stages=6, importance=0.05)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as `from_dict` takes them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvoConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: If a name is unknown or a value is outside its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown setting(s) {unknown}: expected some of {sorted(known)}")
        return cls(**values)

    def to_json(self) -> str:
        """One JSON object, keys sorted."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EvoConfig:
        """The inverse of `to_json`.

        Raises:
            ConfigError: If the text is no JSON object, or holds unknown or invalid settings.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a JSON text: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"expected a JSON object with the settings, found {type(values).__name__}")
        return cls.from_dict(values)


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _check_number(name: str, value: Any, *, expected: str, valid: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not valid(value):
        raise ConfigError(f"{name}={value!r}: expected a number in {expected}")


def _check_block(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{name}={value!r}: expected a block index of at least 1, as the first block takes all tokens: before it, "
            "there is no class attention to rank them by"
        )
