"""Being told to end: Ctrl-C and SIGTERM, and whether one of them came."""

from __future__ import annotations

import os
import signal
import time

INTERRUPTED = 130
"""The exit status of a process that was told to end."""

PATIENCE = 2.0
"""Seconds to clear up, in which a further signal (a launcher passes it on, a key is hit twice) changes nothing."""

_received: list[float] = []


def install() -> None:
    """From now on both signals end what runs with KeyboardInterrupt, unless the shell wants them ignored.

    After `PATIENCE`, a second one ends the process at once, as a kill does: the next run clears up.
    """
    _received.clear()

    def interrupt(number: int, frame: object) -> None:
        _received.append(time.monotonic())
        if len(_received) == 1:
            raise KeyboardInterrupt
        if _received[-1] - _received[0] > PATIENCE:
            os._exit(INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def ignore() -> None:
    """From now on neither signal does anything."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def interrupted() -> bool:
    """Whether this process was asked to end, though a library may have made another error of it."""
    return bool(_received)
