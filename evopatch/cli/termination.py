"""SIGTERM as an exception, so that a command that is stopped removes its temporary files."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_CODE = 128 + signal.SIGTERM
"""What shells call the exit by that signal."""


@contextmanager
def terminable() -> Iterator[None]:
    """While inside, the first SIGTERM raises `SystemExit` with code 143; the next one acts as usual.

    Another handler that is there already stays, as does everything in a thread other than the main one, which can't
    handle signals.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(_CODE)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
