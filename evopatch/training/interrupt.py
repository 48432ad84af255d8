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

    for number in usual:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
