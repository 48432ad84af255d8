"""What each block does in a forward pass: a configuration, for a model of some depth."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import NamedTuple, cast

from .config import EvoConfig
from .errors import ConfigError

# Late blocks bear fewer tokens than early ones. What is redundant changes fastest in the early blocks, so the first
# runs are the shortest: 2, 2 and 4 of 8 blocks.
FIRST_RUN = 2
# Below this one starts a quarter into the depth, not a third: searched on two models (docs/accuracy.md).
EARLY_BELOW = 0.45
# Of Swin: what is added to the logarithm of the keep ratio's odds, by the place of a block's middle in the whole depth,
# and for the first block of every later stage, whose tokens have just been joined. Chosen on a Swin with windows of 49
# (docs/accuracy.md).
_SWIN = ((0.15, -1.65), (0.35, -1.05), (0.55, 0.0), (0.65, 0.45), (0.75, 0.45), (0.85, -0.2), (0.95, -0.85))
_SWIN_ENTRY = 2.4
# To choose nearly all tokens takes as long as the few others would.
_NEARLY_ALL = 0.85


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
    looks_at: tuple[int, ...] = ()
    """Blocks whose class attention on the tokens as they are now counts in the selection before this one."""


def plan_blocks(
    config: EvoConfig,
    *depths: int,
    taper: float | None = None,
    looks_ahead: bool = True,
    start: int | None = None,
    swin: bool = False,
) -> tuple[BlockPlan, ...]:
    """One plan per block.

    Args:
        config: What is asked for.
        depths: How many blocks each stage of the model has; a flat model is one stage.
        taper: Of a pyramid, by what share of the mean the first run keeps more and the last one less, where they taper.
            None: of a flat model, see `tapered`.
        looks_ahead: Whether later blocks of its stage can be looked at before a selection.
        start: Of a pyramid, the first block that selects where the configuration doesn't say. None: that of a flat
            model, or the middle of the first stage.
        swin: A pyramid of windowed blocks: where one keep ratio tapers and tokens are matched, every block is a run and
            keeps what `tapered_swin` says.

    Raises:
        ConfigError: If a run starts beyond the depth or goes from one stage into the next, or the number of keep
            ratios or tradeoffs doesn't fit.
    """
    depth = sum(depths)
    firsts, ratios = runs_of(config, *depths, taper=taper, start=start, swin=swin)
    tradeoffs = _tradeoffs(config, depth)
    keep = [1.0] * depth
    selecting: set[int] = set()
    for run, (first, ratio) in enumerate(zip(firsts, ratios, strict=True)):
        end = firsts[run + 1] if run + 1 < len(firsts) else depth
        keep[first:end] = [ratio] * (end - first)
        if ratio < 1.0:
            selecting.update(range(first, end) if config.selection == "layer" else [first])
    last_selection = max(selecting, default=0)
    looks = looks_ahead and config.representative == "matched" and config.look_ahead > 0.0
    stage_ends = [sum(depths[: stage + 1]) for stage, blocks in enumerate(depths) for _ in range(blocks)]
    return tuple(
        BlockPlan(
            keep_ratio=keep[i],
            selects=i in selecting,
            ends=keep[i] < 1.0 and (i + 1 == depth or i + 1 in selecting or i + 1 in firsts),
            tradeoff=tradeoffs[i] if i < last_selection else None,
            looks_at=_looked_at(i, stage_ends[i]) if looks and i in selecting else (),
        )
        for i in range(depth)
    )


def runs_of(
    config: EvoConfig, *depths: int, taper: float | None = None, start: int | None = None, swin: bool = False
) -> tuple[list[int], list[float]]:
    """The first block of each run, and what each keeps. Arguments and errors as for `plan_blocks`."""
    spread = config.stages is None and config.schedule == "taper" and not isinstance(config.keep_ratio, tuple)
    if swin and spread and config.representative == "matched":
        firsts = list(range(_start(config, depths, start), sum(depths)))
        return firsts, [tapered_swin(cast(float, config.keep_ratio), block, depths) for block in firsts]
    firsts = _first_blocks(config, depths, start)
    return firsts, _keep_ratios(config, firsts, sum(depths), taper)


def _looked_at(selecting: int, end: int) -> tuple[int, ...]:
    """The block itself, the last but one of its stage, and the one in the middle between them."""
    last = max(selecting, end - 2)
    return tuple(sorted({selecting, (selecting + last) // 2, last}))


def _first_blocks(config: EvoConfig, depths: tuple[int, ...], default: int | None) -> list[int]:
    depth = sum(depths)
    if depth < 2:
        raise ConfigError(f"a model with {depth} block(s): expected at least 2, as the first takes all tokens")
    begins = [sum(depths[:stage]) for stage in range(len(depths))]
    if isinstance(config.stages, tuple):
        firsts = list(config.stages)
        if crossed := [begin for begin in begins if begin > firsts[0] and begin not in firsts]:
            raise ConfigError(
                f"stages={config.stages}: a run would go on from one stage of the model into the next, at block(s) "
                f"{crossed} of stages with {depths} blocks; expected the first block of each stage among them"
            )
    else:
        start = _start(config, depths, default)
        runs = cast(int, config.stages or (_default_runs(config) if len(depths) == 1 else 1))
        growth = 1 if config.schedule == "taper" else 0
        firsts = []
        for begin, length in zip(begins, depths, strict=True):
            first, end = max(begin, start), begin + length
            # A shallow model has fewer blocks left than runs are asked for, as by a preset.
            firsts += _run_starts(first, end, max(0, min(runs, end - first)), growth)
        firsts = firsts or [start]
    if firsts[-1] >= depth:
        raise ConfigError(f"a run starts at block {firsts[-1]}, beyond the model's {depth} blocks (0 to {depth - 1})")
    return firsts


def _default_runs(config: EvoConfig) -> int:
    if isinstance(config.keep_ratio, tuple):
        return len(config.keep_ratio)
    return 3 if config.schedule == "taper" else 2


def _start(config: EvoConfig, depths: tuple[int, ...], default: int | None) -> int:
    depth = sum(depths)
    if config.start is None and default is not None:
        return default
    if config.start is None:
        early = config.schedule == "taper" and not isinstance(config.keep_ratio, tuple)
        early = early and cast(float, config.keep_ratio) < EARLY_BELOW
        return max(1, depth // (4 if early else 3) if len(depths) == 1 else depths[0] // 2)
    return min(max(1, round(config.start * depth)), depth - 1) if isinstance(config.start, float) else config.start


def _keep_ratios(config: EvoConfig, firsts: list[int], depth: int, taper: float | None) -> list[float]:
    runs = len(firsts)
    if isinstance(config.keep_ratio, tuple):
        if len(config.keep_ratio) != runs:
            raise ConfigError(
                f"{len(config.keep_ratio)} keep ratios {config.keep_ratio} for {runs} run(s) of blocks "
                f"starting at {firsts}: give one per run, or one number, also to a preset such as EvoConfig.dense(), "
                "whose own six are for flat models of at least 7 blocks"
            )
        return list(config.keep_ratio)
    mean = cast(float, config.keep_ratio)
    if config.schedule == "constant" or runs == 1:
        return [mean] * runs
    if taper is None:
        return [tapered(mean, first, end, depth) for first, end in zip(firsts, [*firsts[1:], depth], strict=True)]
    spread = min(taper * mean, 1.0 - mean)
    return [mean + spread * (1.0 - 2.0 * run / (runs - 1)) for run in range(runs)]


def tapered(keep_ratio: float, first: int, end: int, depth: int) -> float:
    """What a run of a flat model keeps: the odds of `keep_ratio`, times a factor that falls with the run's place.

    Runs from 4, 6 and 8 of 12 blocks keep 0.762, 0.564 and 0.309 at a keep ratio of 0.5.

    Args:
        keep_ratio: What is asked for.
        first: The run's first block.
        end: The block after its last one.
        depth: Of the model.
    """
    if keep_ratio == 1.0:
        return 1.0
    middle = (first + end) / (2 * depth)
    # Through the three runs that a search found on both models, whose middles are 5/12, 7/12 and 10/12; searches at
    # other ratios and starts agree with it to what their noise is.
    log_factor = 1.164 - 5.442 * (middle - 5 / 12) + 2.866 * (middle - 5 / 12) * (middle - 7 / 12)
    return shifted(keep_ratio, log_factor)


def shifted(ratio: float, by: float) -> float:
    """The ratio, in (0, 1), whose odds are those of another one times `exp(by)`."""
    odds = ratio / (1.0 - ratio) * math.exp(by)
    return odds / (1.0 + odds)


def tapered_swin(keep_ratio: float, block: int, depths: tuple[int, ...]) -> float:
    """What one block of a Swin keeps.

    Of 2, 2 and 6 blocks all but the first keep 0.16, 0.74, 0.26, 1, 0.5, 0.61, 0.61, 0.45 and 0.3 at a keep ratio of
    0.5.

    Args:
        keep_ratio: What is asked for.
        block: Its place, from 0.
        depths: How many blocks each stage has.
    """
    if keep_ratio == 1.0:
        return 1.0
    place = (block + 0.5) / sum(depths)
    places, offsets = zip(*_SWIN, strict=True)
    last = len(places) - 1
    right = min(max(bisect_left(places, place), 1), last)
    share = (place - places[right - 1]) / (places[right] - places[right - 1])
    offset = offsets[right - 1] + (offsets[right] - offsets[right - 1]) * min(max(share, 0.0), 1.0)
    if any(block == sum(depths[:stage]) for stage in range(1, len(depths))):
        offset += _SWIN_ENTRY
    kept = shifted(keep_ratio, offset)
    return kept if kept < _NEARLY_ALL else 1.0


def _tradeoffs(config: EvoConfig, depth: int) -> list[float]:
    if not isinstance(config.tradeoff, tuple):
        return [cast(float, config.tradeoff)] * depth
    if len(config.tradeoff) != depth:
        raise ConfigError(f"{len(config.tradeoff)} tradeoffs for {depth} blocks: give one per block, or one number")
    return list(config.tradeoff)


def _run_starts(start: int, depth: int, runs: int, growth: int) -> list[int]:
    lengths = [FIRST_RUN + growth * run for run in range(runs)]
    starts = [start + round((depth - start) * sum(lengths[:i]) / sum(lengths)) for i in range(runs)]
    # Rounding must not leave a run without a block.
    return [max(first, start + i) for i, first in enumerate(starts)]
