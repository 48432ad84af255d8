"""What a run says of itself: its log, its live line, and why it stops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import TrainingError
from . import checkpoints, log
from .items import refuse_unreadable
from .meter import Meter
from .state import Progress


class Figures(NamedTuple):
    """Of one optimizer step, all processes together."""

    losses: dict[str, float]
    """Mean of each term."""
    hits: float
    images: float
    gradient_norm: float
    """Summed over the processes; may be no finite number where a scaler left the step out."""
    learning_rate: float


class Report:
    """The events and figures of one run.

    Args:
        journal: The log, where there is an output folder.
        accelerator: Of the run.
        progress: How far it is.
        output: Its folder, if it has one.
        images: How many there are to train on.
        accuracy: What a hit is called, see `Meter`.
    """

    def __init__(
        self,
        journal: log.JsonLines | None,
        accelerator: Accelerator,
        progress: Progress,
        output: Path | None,
        images: int,
        accuracy: str | None,
    ) -> None:
        self._journal, self._accelerator, self._progress = journal, accelerator, progress
        self._output, self._images, self._accuracy = output, images, accuracy

    @contextmanager
    def opened(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """While inside, the run's trackers are there; its begin and end are events."""
        self._meter = Meter(self._accuracy)
        if self._output is not None:
            self._accelerator.init_trackers("tensorboard")
        name = "begin" if self._progress.step == 0 else "resumed"
        self.event(name, settings=dict(settings), **log.versions())
        try:
            yield
            self.event("end", losses=self._progress.losses)
        finally:
            # `end_training` would also destroy the process group, which is the caller's.
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def event(self, name: str, **values: Any) -> None:
        """Something other than figures of a step."""
        if self._journal is not None:
            self._journal.event(name, self._progress.step, **values)

    def add(self, figures: Figures, epoch: int, logged: bool) -> None:
        """One optimizer step.

        Args:
            figures: What came of it.
            epoch: Counted from 0.
            logged: Whether a line of the log ends here.
        """
        self._meter.add(figures.losses, figures.hits, figures.images)
        if not logged:
            return
        norm = figures.gradient_norm
        norm_mean = norm / self._accelerator.num_processes if math.isfinite(norm) else None
        line = {"epoch": epoch, "learning_rate": figures.learning_rate, "gradient_norm": norm_mean}
        self._accelerator.log(self._meter.line() | line, step=self._progress.step)

    def live(self) -> str:
        """For the progress bar."""
        return self._meter.live()

    def fail(self, what: str, value: float, epoch: int, rate: float) -> NoReturn:
        """Say that a loss or gradient is no finite number.

        Raises:
            TrainingError: Always.
        """
        step = self._progress.step
        self.event("failed", what=what, value=str(value), learning_rate=rate)
        kept = ""
        if self._output is not None and (saved := checkpoints.steps(self._output)):
            kept = f" The last checkpoint, of step {saved[-1]}, is in {self._output}."
        raise TrainingError(
            f"the {what} is {value} at step {step} (epoch {epoch}, learning rate {rate:.3g}): use a "
            f"smaller learning rate, or float32. The model has the weights from before this step.{kept}"
        )

    def note_unreadable(self, names: tuple[str, ...]) -> None:
        """Images that this process could not read.

        Raises:
            DataError: If they are too many by now.
        """
        known = self._progress.unreadable
        new = [name for name in dict.fromkeys(names) if name not in known]
        if new:
            known.extend(new)
            self.event("unreadable", images=new)
            refuse_unreadable(known, self._images, "training")

    def gather_unreadable(self) -> None:
        """Put together what the processes could not read: each met its own.

        Raises:
            DataError: If it is too much.
        """
        self._progress.unreadable = sorted(set(gather_object(self._progress.unreadable)))
        refuse_unreadable(self._progress.unreadable, self._images, "training")
