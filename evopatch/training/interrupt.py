"""Ctrl-C and SIGTERM between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Request:
    """Whether the run was asked to stop."""

    made = False


def outlive_a_request(worker: int) -> None:
    """For a data-loading process: a SIGTERM to all of a program's processes, as of a service manager, is for the main
    one to answer, which needs this one until its step is done. The next one acts as usual.

    Args:
        worker: Its number.
    """

    def ignore(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)

    if getattr(signal.getsignal(signal.SIGTERM), "notes", False):  # inherited: signals are deferred
        signal.signal(signal.SIGTERM, ignore)
    _mask("SIG_UNBLOCK")


@contextmanager
def held_back() -> Iterator[None]:
    """While inside, a SIGTERM waits, also in processes that are started meanwhile, until they `outlive_a_request`."""
    _mask("SIG_BLOCK")
    try:
        yield
    finally:
        _mask("SIG_UNBLOCK")


def _mask(how: str) -> None:
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(getattr(signal, how), {signal.SIGTERM})


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
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        request.made = True
        signal.signal(number, usual[signal.Signals(number)])

    note.notes = True  # type: ignore[attr-defined]
    for number in usual:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
