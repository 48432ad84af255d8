"""Ctrl-C and SIGTERM between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CAN_WAIT = hasattr(signal, "pthread_sigmask")
"""Not on Windows."""


class Request:
    """Whether the run was asked to stop."""

    made = False

    def __init__(self) -> None:
        self.usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number: int, frame: Any) -> None:
        """Handles a signal for the first time."""
        self.made = True
        signal.signal(number, self.usual[signal.Signals(number)])


def outlive_a_request(worker: int) -> None:
    """For a data-loading process: a SIGTERM to all of a program's processes, as of a service manager, is for the main
    one to answer, which needs this one until its step is done. The next one acts as usual.

    Args:
        worker: Its number.
    """

    def ignore(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    inherited = signal.getsignal(signal.SIGTERM)
    if isinstance(getattr(inherited, "__self__", None), Request):  # signals are deferred
        signal.signal(signal.SIGTERM, ignore)
    if _CAN_WAIT:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextmanager
def held_back() -> Iterator[None]:
    """While inside, a SIGTERM waits, also in processes that are started meanwhile, until they `outlive_a_request`."""
    if not _CAN_WAIT:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def deferred(active: bool) -> Iterator[Request]:
    """While inside, the first SIGINT or SIGTERM is only noted; the next one acts as usual.

    Args:
        active: False leaves signals alone, as does a thread other than the main one, which can't handle them.
    """
    request = Request()
    if not active or threading.current_thread() is not threading.main_thread():
        yield request
        return
    for number in request.usual:
        signal.signal(number, request.note)
    try:
        yield request
    finally:
        for number, handler in request.usual.items():
            signal.signal(number, handler)
