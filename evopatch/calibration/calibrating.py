"""Find the best settings for one model and one target, from a few images without labels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EvoConfig
from ..durable import make_folder
from ..errors import ConfigError
from ..forward.learned import give_correction
from ..measure.fingerprint import fingerprint
from ..patching.apply import apply, is_patched
from ..patching.correcting import fit_correction, runs_of
from ..patching.fitting import blocks_of, fit_foresight
from ..patching.handle import Patched, unpatch
from ..patching.learning import learned, set_learned
from ..patching.window_correcting import fit_window_corrections
from ..progress import progress_bar
from ..version import VERSION
from .arguments import check_arguments
from .batches import images_of, repeated
from .judge import Judge
from .levels import Levels, is_reached, level_of, nearest
from .outcome import Calibration, Point
from .schedule import Schedule, schedule_of
from .search import Record, Search, clearly_worse
from .target import Target
from .trials import Trials

SEARCH_FILE = "search.json"
_AROUND = (-0.1, 0.1)
"""FLOPs of the curve beside the chosen ones."""
_LEARNED_FROM = 128
"""Images at most that foresight and corrections are fitted on: more bring nothing."""
_WORTH = 0.99
"""A correction is kept where it leaves less of the error than this."""


def calibrate(
    model: nn.Module,
    images: Any,
    *,
    target_flops: float | None = None,
    target_speedup: float | None = None,
    target_kl: float | None = None,
    target_agreement: float | None = None,
    config: EvoConfig | None = None,
    batch_size: int = 16,
    budget: float = 300.0,
    output: str | Path | None = None,
    progress: bool = True,
) -> Calibration:
    """Find where runs of blocks begin and what they keep, learn foresight and corrections, and leave the model so.

    Half of the images (the even ones) are searched on: foresight and corrections are fitted on them, schedules are
    compared, and the FLOPs found at which a `target_kl` or `target_agreement` is met. The other half decides whether
    foresight and each correction stay, and whether what was found does, or what the search began with where that loses
    clearly less; the result's figures, and whether a loss is at its target, are of that half, too. What is compared is
    what comes out, by `Point.error`: KL to the unpatched model where there are classes.

    Args:
        model: A supported model, patched or not, with one host. In eval mode afterwards as before, or in train mode.
        images: 100 or so, normalised as the model expects: what `finetune` takes, `(B, 3, height, width)`, or a
            loader. Labels are ignored.
        target_flops: Share of the unpatched model's FLOPs; exactly one target is given.
        target_speedup: Times as fast as unpatched, measured at `batch_size` on the model's device, in its type.
        target_kl: Mean `Point.error`: KL(unpatched || patched) in nats of classes, and of labels summed over them; of a
            regression the squared difference relative to the variance between images; of features one minus the cosine.
        target_agreement: Share of the images whose predicted class stays.
        config: Settings that the search begins with. None: those of a patched model, else the default.
        batch_size: Of the forwards, also of those that are timed.
        budget: Seconds of search, `float("inf")` for no bound; learning and the report come on top.
        output: A folder for what was tried: an interrupted search that is begun again there goes on, one with another
            model, other weights, outputs, images, target, `batch_size`, `config` or version of evopatch begins anew.
        progress: Show a progress bar.

    Returns:
        The settings that the model has now, what they are worth, and the curve.

    Raises:
        ConfigError: If not exactly one target is given, or a value is outside its range.
        UnsupportedModelError: If nothing in the model can be patched, several parts of it can, or its output is of no
            known kind.
        DataError: If the images are fewer than 8, of different sizes, or the model doesn't run on them, or outputs
            aren't finite, or a regression's are the same for all images.
        CheckpointError: If the output folder's record is damaged, or it is a file.

    After an error, or Ctrl-C, the model is as it was before.
    """
    target = Target.of(flops=target_flops, speedup=target_speedup, kl=target_kl, agreement=target_agreement)
    check_arguments(batch_size, budget)
    parameter = next(model.parameters())
    tensor = images_of(images, parameter.device, parameter.dtype)
    folder = None if output is None else make_folder(output, "for what was tried")
    fresh = not is_patched(model)
    if fresh:
        apply(model, config=config)
    try:
        patched = Patched(model)
        base = patched.host.state.config if fresh or config is None else config
        seconds = round(budget) if math.isfinite(budget) else None
        with progress_bar(f"calibrate for {target}", seconds, disable=not progress) as advance:
            run = _Run(patched, base, tensor, target, batch_size, budget, folder, advance)
            found, schedule = run.result()
        set_learned(patched.model, learned(run.trials.patched.model))
        patched.set_config(schedule.config(base))
        return found
    except BaseException:
        if fresh:
            unpatch(model)
        raise


class _Run:
    """One calibration."""

    def __init__(
        self,
        patched: Patched[Any],
        base: EvoConfig,
        images: Tensor,
        target: Target,
        batch_size: int,
        budget: float,
        folder: Path | None,
        advance: Callable[..., object],
    ) -> None:
        self._began, self._budget, self._told = time.monotonic(), budget, 0
        self._search_began = self._began
        self._base, self._target, self._batch_size, self._advance = base, target, batch_size, advance
        copy = Patched(patched.copy().eval())
        set_learned(copy.model, {})
        spec, depths = copy.host.state.spec, copy.host.state.depths
        begins = [sum(depths[:stage]) for stage in range(len(depths))]
        self._flat = spec.pyramid is None and not spec.windowed
        self._windowed = spec.windowed
        self._matched = base.representative == "matched"
        original = unpatch(copy.copy())
        self._search_on, self._report_on = images[::2].split(batch_size), images[1::2].split(batch_size)
        self._judge = Judge(original, self._search_on, spec.prefix + spec.later, spec.behind)
        self._reporter = Judge(original, self._report_on, spec.prefix + spec.later, spec.behind)
        if target.kind == "agreement" and self._judge.kind != "classes":
            raise ConfigError("target_agreement was given, and the model predicts no class: give target_kl, a distance")
        timed = repeated(images, batch_size)
        self.trials = Trials(copy, base, timed)
        # For the settings to begin with, which know nothing of what is learned.
        self._plain = Trials(Patched(copy.copy().eval()), base, timed)
        self._levels = Levels(self.trials, self._judge, target)
        copy.set_config(base)
        state = copy.host.state
        self._fixed = [begin for begin in begins[1:] if begin > begins[0]]
        self._start = schedule_of(state.plans, self._fixed, base.importance, state.least)
        self._depth = state.depth
        self._record = Record(None)
        if folder is not None:
            what = {"model": type(copy.model).__name__, "weights": fingerprint(original.state_dict())}
            what |= {"images": fingerprint({"images": images}), "batch size": str(batch_size)}
            what |= {"target": str(target), "config": base.to_json(), "outputs": self._judge.fingerprint}
            self._record = Record(folder / SEARCH_FILE, what)
        self._search = Search(self.trials, self._judge, self._record, budget, self._tell)

    def result(self) -> tuple[Calibration, Schedule]:
        """What was found, and the setting; what was learned is in the trials' model."""
        if not self._start.firsts:
            raise ConfigError("the settings to begin with keep all tokens: expected a keep ratio below 1")
        flops = self._levels.first(self._start)
        # What a selection weighs is for flat models with matched representatives.
        weighs = self._flat and self._matched
        learns = self._matched and self._learns(flops)
        self._search_began = time.monotonic()
        best = self._search.best(level_of(self.trials, self._start, flops), flops, self._depth, self._fixed, weighs)
        best, flops = self._levels.reached(best, flops)
        best, learns = self._no_worse(best, flops, learns)
        best, corrected = self._corrected(best, flops, learns)
        after = self._point("calibrated", self.trials, best)
        before = self._point("default", self._plain, nearest(self._plain, self._start, after.flops))
        curve = [before, after]
        for name, trials, schedule in (("default", self._plain, self._start), ("calibrated", self.trials, best)):
            levels = [trials.level(schedule, after.flops + by) for by in _AROUND if 0.2 < after.flops + by < 0.97]
            curve += [self._point(name, trials, level, rounds=3) for level in levels if level is not None]
        parameter = next(self.trials.patched.model.parameters())
        found = Calibration(
            target=self._target,
            reached=is_reached(self._target, after),
            before=before,
            after=after,
            curve=tuple(curve),
            foresight=learns and self._flat,
            corrected=corrected,
            outputs=self._judge.kind,
            searched=sum(map(len, self._search_on)),
            reported=sum(map(len, self._report_on)),
            tried=len(self._record),
            seconds=time.monotonic() - self._began,
            batch_size=self._batch_size,
            device=torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else str(parameter.device),
            dtype=str(parameter.dtype).removeprefix("torch."),
            versions={"evopatch": VERSION, "torch": torch.__version__},
        )
        return found, best

    def _learns(self, flops: float) -> bool:
        """Learn foresight, or with windows corrections, and keep it if the settings to begin with lose less with it on
        images that it wasn't learned from."""
        # Foresight is of what the class token will attend to: not where features of patches count.
        if self._flat and not self._judge.compares_patches:
            fit_foresight(self.trials.patched.model, self._learned_from())
        elif self._windowed:
            fit_window_corrections(self.trials.patched.model, self._learned_from())
        else:
            return False
        self.trials.forget_flops()
        with_it, without = (
            self._reporter.all_errors(trials.at(nearest(trials, self._start, flops).config(self._base))).error
            for trials in (self.trials, self._plain)
        )
        if float(with_it.mean()) < float(without.mean()):
            return True
        set_learned(self.trials.patched.model, {})
        self.trials.forget_flops()
        return False

    def _no_worse(self, best: Schedule, flops: float, learns: bool) -> tuple[Schedule, bool]:
        """What was found; or what the search began with, with what was learned or without, where the images to report
        on lose clearly less so: a few images say little of others."""
        start, plain = nearest(self.trials, self._start, flops), nearest(self._plain, self._start, flops)
        if clearly_worse(self._errors(best), self._errors(start)):
            best = start
        bare = self._reporter.all_errors(self._plain.at(plain.config(self._base))).error
        if not clearly_worse(self._errors(best), bare):
            return best, learns
        set_learned(self.trials.patched.model, {})
        self.trials.forget_flops()
        return plain, False

    def _corrected(self, best: Schedule, flops: float, learns: bool) -> tuple[Schedule, tuple[tuple[int, int], ...]]:
        """Corrections where the images to report on lose less with them, at the same FLOPs. Blocks with windows have
        theirs from the beginning, each its own."""
        if self._windowed and learns:
            plans = self.trials.patched.host.state.plan(best.config(self._base))
            return best, tuple((i, i) for i, plan in enumerate(plans) if plan.keep_ratio < 1.0)
        if not (self._flat and self._matched and self._base.selection == "stage"):
            return best, ()
        patched = self.trials.patched
        blocks, images = blocks_of(patched, patched.host), self._learned_from()
        plain = loss = self._loss(best)
        kept = []
        for first, last in runs_of(patched.host.state.plans):
            self._advance(0, f"calibrate for {self._target}: correction of blocks {first} to {last}")
            give_correction(blocks[last], first, fit_correction(patched.model, images, first, last))
            with_it = self._loss(best)
            if with_it < _WORTH * loss:
                loss = with_it
                kept.append((first, last))
            else:
                give_correction(blocks[last], first, None)
        self.trials.forget_flops()
        level = self.trials.level(best, flops) if kept else None
        if level is not None and self._loss(level) < _WORTH * plain:
            return level, tuple(kept)
        for _, last in kept:
            give_correction(blocks[last], 0, None)
        self.trials.forget_flops()
        return best, ()

    def _learned_from(self) -> Tensor:
        return torch.cat(self._search_on)[:_LEARNED_FROM]

    def _errors(self, schedule: Schedule) -> Tensor:
        return self._reporter.all_errors(self.trials.at(schedule.config(self._base))).error

    def _loss(self, schedule: Schedule) -> float:
        return float(self._errors(schedule).mean())

    def _point(self, name: str, trials: Trials, schedule: Schedule, rounds: int = 5) -> Point:
        config = schedule.config(self._base)
        self._advance(0, f"calibrate for {self._target}: report, {name} at {trials.flops(config):.3f} of the FLOPs")
        errors = self._reporter.all_errors(trials.at(config))
        return Point(
            name=name,
            config=config,
            flops=trials.flops(config),
            speed_up=trials.speed_up(config, rounds),
            error=float(errors.error.mean()),
            agreement=None if errors.agrees is None else float(errors.agrees.double().mean()),
        )

    def _tell(self, error: float) -> None:
        done = min(self._budget, time.monotonic() - self._search_began)
        text = f"calibrate for {self._target}: error {error:.4f}, {len(self._record)} settings tried"
        self._advance(round(done) - self._told, text)
        self._told = round(done)
