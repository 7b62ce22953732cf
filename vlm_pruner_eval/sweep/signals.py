"""SIGTERM as what it means to a job that is taken off a machine: give back what is held, then end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C it is no error of a run, and nothing that records errors catches it."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind what is inside, so that locks are given back at once and other processes end, then end by that signal.

    Where the program that uses this package treats the signal itself, or outside the main thread, nothing is changed.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    received: list[int] = []

    def end(number: int, frame: object) -> None:
        received.append(number)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:  # Ray, waiting, makes a plain one of any
        if not received:
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
