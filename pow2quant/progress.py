"""How far long work is: a bar on a terminal or in a notebook, else a few plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from html import escape
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = 15.0
"""Seconds until a stage without a terminal says how far it is; then again whenever as much time has passed anew."""

BETWEEN = 0.2
"""Seconds between two drawings of a notebook's bar."""


class Bars:
    """Progress for people: passes items on and shows how many are done, and how long the rest will take."""

    def track(self, items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
        """Passes items on while showing a bar."""
        started = time.monotonic()
        if notebook() is not None:
            yield from _in_notebook(items, title, total)
            return
        if sys.stderr.isatty():
            from rich.console import Console as Rich
            from rich.progress import track

            yield from track(items, title, total=total, console=Rich(stderr=True), transient=True)
        else:
            self.note(f"{title} ...")
            yield from counted(items, title, total, self.note)
        self.note(f"{title}: {duration(time.monotonic() - started)}")

    def note(self, text: str) -> None:
        """One line of information."""
        print(text, file=sys.stderr, flush=True)


class Within:
    """Progress of one part of longer work: only what takes long is said, in lines that name the part."""

    def __init__(self, say: Callable[[str], None], part: str) -> None:
        self.say, self.part = say, part

    def track(self, items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
        """Passes items on; says now and then how many are done."""
        return counted(items, f"{self.part}, {title}", total, self.say)

    def note(self, text: str) -> None:
        """Nothing: a line for every layer of every part would be too many."""


def counted(items: Iterable[T], title: str, total: int | None, say: Callable[[str], None]) -> Iterator[T]:
    """Passes items on; says in a line how many are done, after `PATIENCE` seconds and then ever more rarely."""
    started, due = time.monotonic(), PATIENCE
    for done, item in enumerate(items, start=1):
        yield item
        passed = time.monotonic() - started
        if passed >= due and done != total:
            due = 2 * passed
            left = f" of {total}, {duration(passed / done * (total - done))} left" if total else " done"
            say(f"{title}: {done}{left}")


def notebook() -> Any:
    """IPython's display functions inside a notebook, else None."""
    if "IPython" not in sys.modules:
        return None
    ipython = import_module("IPython")
    return ipython.display if type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell" else None


def _in_notebook(items: Iterable[T], title: str, total: int | None) -> Iterator[T]:
    display = notebook()
    started = last = time.monotonic()
    handle = display.display(display.HTML(_bar(title, 0, total, "")), display_id=True)
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= BETWEEN:
            last = now
            left = f"{duration((now - started) / done * (total - done))} left" if total else ""
            handle.update(display.HTML(_bar(title, done, total, left)))
    handle.update(display.HTML(_bar(title, done, done, duration(time.monotonic() - started))))


def _bar(title: str, done: int, total: int | None, left: str) -> str:
    share = f'value="{done}" max="{max(1, total)}"' if total is not None else ""
    return f"<div>{escape(title)} <progress {share}></progress> {left}</div>"


def duration(seconds: float) -> str:
    """`0.4 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
