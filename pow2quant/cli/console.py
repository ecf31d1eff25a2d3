"""What a command shows: progress on stderr, results on stdout; rich on a terminal, plain lines in a pipe."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from pow2quant.progress import Bars

if TYPE_CHECKING:
    from rich.console import Console as Rich

    from pow2quant.artifact import Agreement

T = TypeVar("T")

_NUMBER = re.compile(r"-$|[-+]?\d")
"""How a number begins, or what stands for one."""


@dataclass
class Console(Bars):
    """Progress, notes and results of one command.

    quiet: no progress and no notes. as_json: `out` gets one JSON document and nothing else.
    """

    quiet: bool = False
    as_json: bool = False
    out: TextIO = field(default_factory=lambda: sys.stdout)

    def track(self, items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
        """Passes items on; shows a bar with the time left on a terminal, else a few lines."""
        return iter(items) if self.quiet else super().track(items, title, total)

    def note(self, text: str) -> None:
        """One line of information."""
        if not self.quiet:
            super().note(text)

    @property
    def draws(self) -> bool:
        """Whether results go to a terminal: then they are drawn, wrapped at words and in colour."""
        return not self.as_json and self.out.isatty()

    def say(self, text: str = "") -> None:
        """A line of the result; nothing with --json."""
        if not self.as_json:
            print(text, file=self.out)

    def result(self, document: Mapping[str, Any], lines: Iterable[str]) -> None:
        """The command's result: the document with --json, else the lines."""
        if self.as_json:
            print(json.dumps(document, indent=2, default=str), file=self.out)
        for line in lines:
            self.say(line)

    def facts(self, facts: Mapping[str, str], good: bool | None = None) -> None:
        """`label: text`, a line each; nothing with --json. On a terminal wrapped, the first one coloured by `good`."""
        if not self.draws:
            for label, text in facts.items():
                self.say(f"{label}: {text}")
            return
        from rich.text import Text

        for i, (label, text) in enumerate(facts.items()):
            told = i == 0 and good is not None
            head = f"{'✓ ' if good else '✗ '}{label}: " if told else f"{label}: "
            line = Text.assemble((head, "bold"), (text, ("green" if good else "bold red") if told else ""))
            self._rich().print(line, soft_wrap=" " not in text)  # a path stays in one piece

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
        """A table on stdout, nothing with --json: drawn on a terminal under its title, aligned text in a pipe.

        On a terminal numbers stand right, in one line, and text wraps.
        """
        rows = [list(r) for r in rows]
        names = list(header)
        if self.as_json or not rows:
            return
        if self.draws:
            from rich.box import SIMPLE_HEAD
            from rich.table import Table

            table = Table(
                box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False
            )
            for i, name in enumerate(names):
                number = i > 0 and all(_NUMBER.match(row[i]) for row in rows)
                table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
            for row in rows:
                table.add_row(*row)
            self._rich().print(table)
            return
        widths = [max(len(r[i]) for r in [names, *rows]) for i in range(len(names))]
        for row in [names, *rows]:
            self.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def _rich(self) -> Rich:
        from rich.console import Console as Rich

        return Rich(file=self.out, markup=False, highlight=False)


def show_agreements(console: Console, agreements: Sequence[Agreement]) -> None:
    """The agreement table, and below it the first tensor at which each executor differs."""
    against = {a.against for a in agreements}
    once = console.draws and len(against) == 1  # in the title: a terminal is narrow
    console.table(
        [
            "executor",
            *([] if once else ["against"]),
            "elements",
            "differing",
            "max LSB",
            "top-1 agreement",
            "claim",
        ],
        [
            [
                a.executor,
                *([] if once else [a.against]),
                f"{a.elements:,}",
                f"{a.differing:,}",
                f"{a.max_lsb:g}",
                f"{a.top1_agreement:.2f} %",
                a.claim,
            ]
            for a in agreements
        ],
        f"agreement with {against.pop()}" if once else "",
    )
    for a in agreements:
        if a.first_diverging is not None:
            d = a.first_diverging
            cause = f"; likely cause: {d.cause}" if d.cause else ""
            console.say(
                f"{a.executor}: the first tensor that differs is {d.tensor} (node {d.node}): "
                f"{d.differing:,} of {d.elements:,} by up to {d.max_lsb:g} LSB{cause}"
            )
        for note in a.notes:
            console.say(f"{a.executor}: {note}")


def show_left_out(console: Console, reasons: Mapping[str, str]) -> None:
    """Which executors could not take part, and why."""
    for name, reason in reasons.items():
        console.say(f"left out: {name}: {reason}")
