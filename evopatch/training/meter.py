"""Running figures of a run: for the live line, and for the log."""

from __future__ import annotations

import time


class Meter:
    """Sums over the steps since the last line of the log.

    Args:
        accuracy: What a hit is called: `"accuracy"` by labels, `"agreement"` with a teacher; None where outputs are no
            classes, which nothing hits.
    """

    def __init__(self, accuracy: str | None) -> None:
        self._accuracy = accuracy
        self._live = ""
        self._begin()

    def add(self, losses: dict[str, float], hits: float, images: float) -> None:
        """One optimizer step: the mean of each term, how many images were hit, of how many."""
        self._steps += 1
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0.0) + value
        self._hits += hits
        self._images += images
        self._live = self._text()

    def live(self) -> str:
        """For the progress bar."""
        return self._live

    def line(self) -> dict[str, float]:
        """Means for the log, in which they begin anew. Accuracy in percent, speed in images per second."""
        losses = {name.replace(" ", "_"): value / self._steps for name, value in self._losses.items()}
        line = {"loss": sum(losses.values())} | losses
        if self._accuracy is not None:
            line[self._accuracy] = 100 * self._hits / self._images
        line["images_per_second"] = self._speed()
        self._begin()
        return line

    def _begin(self) -> None:
        self._since = time.perf_counter()
        self._steps = 0
        self._hits = self._images = 0.0
        self._losses: dict[str, float] = {}

    def _speed(self) -> float:
        return self._images / (time.perf_counter() - self._since)

    def _text(self) -> str:
        loss, share = sum(self._losses.values()) / self._steps, 100 * self._hits / self._images
        hit = "" if self._accuracy is None else f"{self._accuracy} {share:.1f} %, "
        return f"loss {loss:.4f}, {hit}{self._speed():.1f} images/s"
