"""Being told to end: Ctrl-C and SIGTERM, and whether one of them came."""

from __future__ import annotations

import signal

_received: list[int] = []


def install() -> None:
    """From now on both signals end what runs with KeyboardInterrupt, unless the shell wants them ignored."""

    def interrupt(number: int, frame: object) -> None:
        _received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def interrupted() -> bool:
    """Whether this process was asked to end, though a library may have made another error of it."""
    return bool(_received)
