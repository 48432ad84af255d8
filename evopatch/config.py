"""What to patch a model with: `EvoConfig`, and its resolution to one `BlockPlan` per block."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

from .errors import ConfigError

Representative = Literal["matched", "single", "none"]
Selection = Literal["stage", "layer"]
Schedule = Literal["taper", "constant"]

# Late blocks bear fewer tokens than early ones: two runs at a mean keep ratio of 0.5 keep 0.63 and 0.37. What is
# redundant changes fastest in the early blocks, so the first runs are the shortest: 3 and 5 of 8 blocks.
TAPER = 0.26
FIRST_RUN = 2


class BlockPlan(NamedTuple):
    """What one block does in a forward pass."""

    keep_ratio: float
    """Share of the patch tokens that go through the block one by one; 1.0 leaves the block as it is."""
    selects: bool
    """Slow and fast tokens are chosen anew before this block."""
    ends: bool
    """Slow and fast tokens are put back on the grid after this block."""
    tradeoff: float | None
    """Weight of this block's class attention in the accumulated one; None where nothing later reads it."""


@dataclass(frozen=True)
class EvoConfig:
    """How slow and fast tokens are chosen and updated (Evo-ViT, arXiv 2108.01390, section 3).

    Args:
        keep_ratio: Share of the patch tokens that are slow, in (0, 1]. One number is the mean over the runs
            (see `schedule`); a sequence gives one keep ratio per run. 1.0 is exactly the original forward.
        start: First block that selects, counted from 0, or the share of the depth, below 1, that is left alone.
            None: the first third; of a pyramid the first half of its first stage.
        selection: `"stage"` selects once per run of blocks and keeps the compact set through the run,
            `"layer"` selects again before every block (the paper's section 3.4: layer-to-stage training).
        stages: Number of runs over the blocks from `start` on, or the first block of each run. A run never crosses
            from one stage of a pyramid (LeViT) to the next: there a number is that of runs in each stage. None: two
            runs, in a pyramid one per stage.
        schedule: How one keep ratio is spread over the runs. `"taper"` lets it fall linearly around its mean
            (two runs at 0.5: 0.63 and 0.37; the three stages of LeViT: 0.75, 0.5 and 0.25; those of Swin keep it) and
            makes later runs of one stage longer (2 to 3 to 4 and so on),
            `"constant"` (the paper's) uses it in every run and makes them equally long.
        representative: What stands in for the fast tokens. `"matched"`: every fast token joins the slow token
            most similar to it, needs no training. `"single"`: one token, the mean of all fast tokens weighted by
            class attention (the paper's equations 5 and 6). `"none"`: fast tokens are carried unchanged.
        tradeoff: Weight of a block's own class attention when it is accumulated over depth (the paper's
            equation 4), in [0, 1]; a sequence gives one per block.
        importance: How much a token's importance counts against its novelty when matched representatives choose the
            slow tokens: the exponent of its accumulated class attention, at least 0. Classifiers read what the class
            token attends to; dense features are wanted everywhere (see `dense`).

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
        return cls(keep_ratio=keep_ratio, schedule="constant", representative="single", tradeoff=0.5)

    @classmethod
    def dense(cls, keep_ratio: float | Sequence[float] = (0.75, 0.52, 0.28)) -> EvoConfig:
        """For dense features: segmentation, depth, saliency, retrieval of patches, and DINOv2 in general.

        For flat models. Every patch token's own value is wanted, not only what the class token reads, so tokens are
        chosen nearly by novelty alone, and in three equal runs over the last three quarters of the depth. Costs a third
        selection and does less well than the default for classifiers.
        """
        return cls(keep_ratio=keep_ratio, start=0.25, stages=3, schedule="constant", importance=0.15)

    def resolve(self, *depths: int, taper: float = TAPER) -> tuple[BlockPlan, ...]:
        """One plan per block.

        Args:
            depths: How many blocks each stage of the model has; a flat model is one stage.
            taper: By what share of the mean the first run keeps more and the last one less, where they taper.

        Raises:
            ConfigError: If a run starts beyond the depth or goes from one stage into the next, or the number of keep
                ratios or tradeoffs doesn't fit.
        """
        depth = sum(depths)
        firsts = self._first_blocks(depths)
        ratios = self._keep_ratios(firsts, taper)
        tradeoffs = self._tradeoffs(depth)
        keep = [1.0] * depth
        selecting: set[int] = set()
        for run, (first, ratio) in enumerate(zip(firsts, ratios, strict=True)):
            end = firsts[run + 1] if run + 1 < len(firsts) else depth
            keep[first:end] = [ratio] * (end - first)
            if ratio < 1.0:
                selecting.update(range(first, end) if self.selection == "layer" else [first])
        last_selection = max(selecting, default=0)
        return tuple(
            BlockPlan(
                keep_ratio=keep[i],
                selects=i in selecting,
                ends=keep[i] < 1.0 and (i + 1 == depth or i + 1 in selecting or i + 1 in firsts),
                tradeoff=tradeoffs[i] if i < last_selection else None,
            )
            for i in range(depth)
        )

    def _first_blocks(self, depths: tuple[int, ...]) -> list[int]:
        depth = sum(depths)
        if depth < 2:
            raise ConfigError(f"a model with {depth} block(s): expected at least 2, one to rank the tokens by")
        begins = [sum(depths[:stage]) for stage in range(len(depths))]
        if isinstance(self.stages, tuple):
            firsts = list(self.stages)
            if crossed := [begin for begin in begins if begin > firsts[0] and begin not in firsts]:
                raise ConfigError(
                    f"stages={self.stages}: a run would go on from one stage of the model into the next, at block(s) "
                    f"{crossed} of stages with {depths} blocks; expected the first block of each stage among them"
                )
        else:
            start = self._start(depths)
            runs = cast(int, self.stages or (2 if len(depths) == 1 else 1))
            growth = 1 if self.schedule == "taper" else 0
            firsts = []
            for begin, length in zip(begins, depths, strict=True):
                first, end = max(begin, start), begin + length
                # A shallow model has fewer blocks left than the default number of runs asks for.
                firsts += _run_starts(first, end, max(0, min(runs, end - first)), growth)
            firsts = firsts or [start]
        if firsts[-1] >= depth:
            raise ConfigError(
                f"a run starts at block {firsts[-1]}, beyond the model's {depth} blocks (0 to {depth - 1})"
            )
        return firsts

    def _start(self, depths: tuple[int, ...]) -> int:
        depth = sum(depths)
        if self.start is None:
            return max(1, depth // 3 if len(depths) == 1 else depths[0] // 2)
        return min(max(1, round(self.start * depth)), depth - 1) if isinstance(self.start, float) else self.start

    def _keep_ratios(self, firsts: list[int], taper: float) -> list[float]:
        runs = len(firsts)
        if isinstance(self.keep_ratio, tuple):
            if len(self.keep_ratio) != runs:
                raise ConfigError(
                    f"{len(self.keep_ratio)} keep ratios {self.keep_ratio} for {runs} run(s) of blocks "
                    f"starting at {firsts}: give one per run, or one number"
                )
            return list(self.keep_ratio)
        mean = cast(float, self.keep_ratio)
        if self.schedule == "constant" or runs == 1:
            return [mean] * runs
        spread = min(taper * mean, 1.0 - mean)
        return [mean + spread * (1.0 - 2.0 * run / (runs - 1)) for run in range(runs)]

    def _tradeoffs(self, depth: int) -> list[float]:
        if not isinstance(self.tradeoff, tuple):
            return [cast(float, self.tradeoff)] * depth
        if len(self.tradeoff) != depth:
            raise ConfigError(f"{len(self.tradeoff)} tradeoffs for {depth} blocks: give one per block, or one number")
        return list(self.tradeoff)

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


def _run_starts(start: int, depth: int, runs: int, growth: int) -> list[int]:
    lengths = [FIRST_RUN + growth * run for run in range(runs)]
    starts = [start + round((depth - start) * sum(lengths[:i]) / sum(lengths)) for i in range(runs)]
    # Rounding must not leave a run without a block.
    return [max(first, start + i) for i, first in enumerate(starts)]


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _check_number(name: str, value: Any, *, expected: str, valid: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not valid(value):
        raise ConfigError(f"{name}={value!r}: expected a number in {expected}")


def _check_block(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{name}={value!r}: expected a block index of at least 1, since the tokens are ranked by the class "
            "attention of an earlier block"
        )
