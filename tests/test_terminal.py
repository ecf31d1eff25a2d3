"""What the command line draws: stages, bars, tables and verdicts, on a terminal and without one."""

import os
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from pow2quant import progress
from pow2quant.cli import console


def test_stages_without_a_terminal_are_a_few_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    for _ in console.Console().track(range(40), "thinking", 40):
        pass
    assert capsys.readouterr().err.splitlines() == [
        "thinking ...",
        "thinking: 15 of 40, 25.0 s left",
        "thinking: 30 of 40, 10.0 s left",
        "thinking: 42.0 s",
    ]


def test_a_quiet_stage_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.Console(quiet=True).track(range(3), "thinking")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_gets_a_bar_and_drawn_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        shown = console.Console(out=terminal)
        for _ in shown.track(range(3), "thinking", 3):
            pass
        shown.table(["name", "text"], [["a", "[x] stays"]])
        terminal.flush()
        seen = ""
        while "stays" not in seen:
            seen += screen.read(4096).decode(errors="replace")
    assert re.search(r"thinking .*100%.*0:00:00", seen)  # the time that is left
    assert "thinking: 0." in seen
    assert "\u2500\u2500\u2500" in seen
    assert "[x] stays" in seen


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("good", [True, False])
def test_a_terminal_gets_a_verdict_that_wraps_at_words(good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    path = "/a/" + "very-long-" * 5 + "path"
    facts = {"verdict": "0 of 1,234 output elements differ between all executors", "files": path}
    coloured = _on_a_terminal(lambda shown: shown.facts(facts, good))
    assert ("\x1b[32m" if good else "\x1b[1;31m") in coloured
    assert path in coloured, "a path stays in one piece"
    monkeypatch.setenv("NO_COLOR", "1")
    plain = _on_a_terminal(lambda shown: shown.facts(facts, good))
    assert not re.search(r"\x1b\[[\d;]*3\d", plain)
    lines = re.sub(r"\x1b\[[\d;]*m", "", plain).split("\r\n")
    assert lines[0].strip() == f"{'✓' if good else '✗'} verdict: 0 of 1,234 output elements"
    assert all(len(line) <= 40 for line in lines if path not in line)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_s_tables_have_their_numbers_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rows = [["a long name that has to be wrapped somewhere", "1", "-2.5 %"], ["b", "1,000,000", "-"]]
    seen = _on_a_terminal(lambda shown: shown.table(["name", "count", "change"], rows, "a title"))
    text = re.sub(r"\x1b\[[\d;]*m", "", seen)
    assert re.search(r"^a title", text)
    ends = [re.search(number, text)[0] for number in ("\\n a long.* 1 +-2.5 %", "\\n b .*1,000,000 +- ")]  # type: ignore[index]
    assert ends[0].index("1 ") == ends[1].index("0 "), "both numbers end in one column"


def _on_a_terminal(show: Callable[[console.Console], None]) -> str:
    """What `show` prints where the output is a terminal."""
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0) as screen:
        show(console.Console(out=terminal))
        terminal.write("THE END")
        terminal.flush()
        seen = ""
        while not seen.endswith("THE END"):
            seen += screen.read(4096).decode(errors="replace")
    return seen.removesuffix("THE END")


def test_durations() -> None:
    assert [progress.duration(s) for s in (0.04, 59.9, 60, 3599, 7500)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "59 min 59 s",
        "2 h 05 min",
    ]
