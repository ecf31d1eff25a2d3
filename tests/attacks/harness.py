"""Runs commands on bad input, each in a process of its own, and says what came of it.

A process is forked from one that has everything imported, so that a case takes a fraction of a second. It has 30
seconds of CPU, four gigabytes, and a folder that is removed afterwards.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CPU_SECONDS, WALL_SECONDS, BYTES = 30, 240, 4 << 30
SECRET = "the-secret-that-must-stay-3f9c1e"
"""In a file that no input may reach."""

GOOD = {"refused", "accepted"}
LEFT = re.compile(r"\..+\.(partial|old)|.+\.(unfinished|training)")


@dataclass(frozen=True)
class Case:
    """One command on one bad input.

    make: writes the input into the case's folder, where the command runs, and returns its arguments. A command that
    ought to work may be `accepted`, with status 0 or 1; what is bad may be `refused`, with status 2 and one line.
    """

    category: str
    name: str
    make: Callable[[Path], list[str]]


@dataclass(frozen=True)
class Outcome:
    """What came of a case: `refused`, `accepted`, or what is wrong, and the last line that the command wrote."""

    category: str
    name: str
    kind: str
    line: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return self.kind in GOOD


def run(case: Case) -> Outcome:
    """Runs one case in a process of its own."""
    place = Path(tempfile.mkdtemp(prefix="pow2quant-attack-"))
    folder = place / "case"
    folder.mkdir()
    (place / "secret").write_text(SECRET)
    started = time.monotonic()
    try:
        process = os.fork()
        if process == 0:
            _child(case, folder, place)
        status = _waited(process, started)
        seconds = time.monotonic() - started
        out, err = ((place / name).read_text(errors="replace") if (place / name).exists() else "" for name in OUTPUTS)
        kind, line = _kind(status, out, err, folder, case.name.endswith("closed stderr"))
        return Outcome(case.category, case.name, kind, line, seconds)
    finally:
        _removed(place)


OUTPUTS = ("stdout", "stderr")


def _child(case: Case, folder: Path, place: Path) -> None:
    """Never returns."""
    status = 99
    try:
        os.setpgid(0, 0)  # not a session: some schedulers share the processors by session
        os.chdir(folder)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(d, "w", 1, errors="backslashreplace") for d in (1, 2))
        arguments = case.make(folder)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_AS, (_size() + BYTES, resource.RLIM_INFINITY))
        sys.argv = ["pow2quant", *arguments]
        from pow2quant import cli

        try:
            cli.run()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _size() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _waited(process: int, started: float) -> int:
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            _kill_group(process)
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - started > WALL_SECONDS:
            _kill_group(process)
            os.waitpid(process, 0)
            return -signal.SIGXCPU
        time.sleep(0.005)


def _kill_group(process: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def _kind(status: int, out: str, err: str, folder: Path, silent: bool) -> tuple[str, str]:
    lines = err.strip().splitlines()
    line = (lines or [""])[-1][:600]
    if status == -signal.SIGXCPU:
        return "hang", line
    if "Traceback (most recent call last)" in err + out:
        return "traceback", line
    if status < 0:
        return "signal", f"{signal.Signals(-status).name}: {line}"
    if status == 70:
        return "defect", line
    if (folder / "EXECUTED").exists() or (folder.parent / "EXECUTED").exists():
        return "executed", line
    if SECRET in out + err or any(SECRET in text for text in _texts(folder)):
        return "leaked", line
    if any("<script>alert(1)" in text for text in _texts(folder, "*.html")):
        return "injected", line
    left = [path for path in folder.rglob("*") if LEFT.fullmatch(path.name)]
    if any(status != 2 or path.suffix != ".training" for path in left):  # what --resume continues stays
        return "leftover", line
    if status in (0, 1):
        return "accepted", line
    if status in (130, 141):  # own code that raises what Ctrl-C and a closed pipe raise
        return "refused", line
    refusals = [text for text in lines if text.startswith("error: ")]
    clear = status == 2 and len(refusals) == 1 and 10 < len(refusals[0]) < 2000
    if status == 2 and not err and silent:
        return "refused", "(its stderr was closed)"
    return ("refused", line) if clear else (f"status {status}", line)


def _texts(folder: Path, pattern: str = "*") -> Iterator[str]:
    for path in folder.rglob(pattern):
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24:
            yield path.read_text(errors="replace")


def _removed(place: Path) -> None:
    for root, folders, _ in os.walk(place):
        for name in folders:
            if not Path(root, name).is_symlink():
                Path(root, name).chmod(0o700)
    shutil.rmtree(place, ignore_errors=True)


def counts(outcomes: Iterable[Outcome]) -> dict[str, Counter[str]]:
    """By category, how often what came of it."""
    found: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.category, Counter())[outcome.kind] += 1
    return found
