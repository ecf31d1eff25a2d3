"""Commands that write, killed at random moments: what was there is whole, and the next run works and clears up."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tests.attacks.good import copied
from tests.attacks.harness import LEFT

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
"""Most are kills that no process hears."""

QUICK = ["--config", "quick.yaml", "--quiet"]
LOSSY = ["--constraint", "accuracy_drop=50%"]
LOGITS = ["--num-clusters", "1", "--pca-dim", "1", "--alpha", "1", "--quiet", "--overwrite"]


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    again: what the next run adds to the arguments where the killed one can be continued.
    """

    name: str
    arguments: list[str]
    again: tuple[str, ...] = ()


WRITERS = (
    Writer("ptq", ["ptq", *QUICK, "--output", "new"]),
    Writer("ptq --overwrite", ["ptq", *QUICK, "--output", "run", "--overwrite"]),
    Writer("qat", ["qat", *QUICK, "--output", "new"], ("--resume",)),
    Writer("qat --overwrite", ["qat", *QUICK, "--output", "run", "--overwrite"]),
    Writer("correct --overwrite", ["correct", "run", *LOGITS, "--fold"]),
    Writer("logits --overwrite", ["logits", "run", *LOGITS]),
    Writer("export --to c", ["export", "run", "--to", "c", "--overwrite", "--quiet"]),
    Writer("export --to integers", ["export", "run", "--to", "integers", "--overwrite", "--quiet"]),
    Writer("export --to aimet-2.0.0", ["export", "run", "--to", "aimet-2.0.0", "--overwrite", "--quiet"]),
    Writer("report", ["report", "run", "--quiet"]),
    Writer("validate --output", ["validate", "run/model.onnx", "--output", "run", "--quiet"]),
    Writer("sweep", ["sweep", "--grid", "seed=1..3", *QUICK, "--output", "study"]),
    Writer("compare", ["compare", "--method", "none", "--widths", "8:8", "--seeds", "0,1", *QUICK, "--output", "c"]),
    Writer("search --overwrite", ["search", *QUICK, *LOSSY, "--output", "run", "--overwrite"]),
)  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """What came of one: `fine`, or what is wrong."""

    writer: str
    signal: str
    seconds: float
    kind: str


def kill(good: Path, writer: Writer, seed: int, longest: float) -> Kill:
    """Starts a writer, kills it within `longest` seconds, looks at what is left, and runs it again to its end."""
    chance = random.Random(seed)
    sent, wait = chance.choice(SIGNALS), chance.uniform(0, longest)
    place = Path(tempfile.mkdtemp(prefix="pow2quant-kill-"))
    folder = place / "case"
    folder.mkdir()
    os.environ["TMPDIR"] = str(place)
    tempfile.tempdir = None
    try:
        copied(good, folder)
        before = _whole(folder / "run")
        process = _started(folder, writer.arguments)
        time.sleep(wait)
        with suppress(ProcessLookupError):
            os.killpg(process, sent)
        os.waitpid(process, 0)
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        kind = _judged(folder, before)
        if kind == "fine":
            kind = _again(folder, place, writer)
        return Kill(writer.name, sent.name, wait, kind)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def seconds(good: Path, writer: Writer) -> float:
    """How long a writer takes that is not killed."""
    place = Path(tempfile.mkdtemp(prefix="pow2quant-kill-"))
    try:
        copied(good, place)
        started = time.monotonic()
        os.waitpid(_started(place, writer.arguments), 0)
        return time.monotonic() - started
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _started(folder: Path, arguments: list[str]) -> int:
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        os.setsid()
        os.chdir(folder)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(d, "w", 1) for d in (1, 2))
        sys.argv = ["pow2quant", *arguments]
        from pow2quant import cli

        cli.run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    finally:
        os._exit(status)


def _whole(run: Path) -> dict[str, str]:
    """What must never change or vanish: the run's own files, by their content."""
    names = ("model.onnx", "model.safetensors", "report.json", "correction.safetensors", "correction.json")
    return {name: sha256((run / name).read_bytes()).hexdigest() for name in names if (run / name).is_file()}


def _judged(folder: Path, before: dict[str, str]) -> str:
    """The run must be as it was, or another whole one."""
    now = _whole(folder / "run")
    changed = {name for name in before if now.get(name) != before[name]}
    lost = {name for name in before if name not in now and not name.startswith("correction")}
    if lost:
        return f"lost: {', '.join(sorted(lost))}"
    corrections = {"correction.safetensors", "correction.json"}
    if changed & corrections and not changed - corrections and not corrections <= now.keys():
        return "lost: half of a correction"
    if changed - corrections and "report.json" not in changed:
        return f"mixed: {', '.join(sorted(changed))}"
    return "fine"


def _again(folder: Path, place: Path, writer: Writer) -> str:
    more = [a for a in writer.again if a not in writer.arguments]
    if more and not (folder / "new.training").exists():
        more = []
    if (folder / "new").exists():  # it had ended before the signal came
        return "fine"
    _, status = os.waitpid(_started(folder, [*writer.arguments, *more]), 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):
        return f"the next run ended with {code}: {(place / 'stderr').read_text()[-200:]}"
    left = [p.name for root in (folder, place) for p in root.rglob(".*") if LEFT.fullmatch(p.name)]
    return f"left: {', '.join(left)}" if left else "fine"


def every(good: Path, count: int, say: Callable[[str], None]) -> list[Kill]:
    """So many kills, over all writers in turn, each at a moment within its own time."""
    times = {writer.name: seconds(good, writer) for writer in WRITERS}
    found = []
    for number in range(count):
        writer = WRITERS[number % len(WRITERS)]
        found.append(kill(good, writer, number, 1.1 * times[writer.name]))
        if found[-1].kind != "fine":
            say(f"{found[-1]}")
    return found
