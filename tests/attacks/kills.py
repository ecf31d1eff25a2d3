"""Commands that write, killed at random moments: what was there is whole, and the next run works and clears up.

What the next run leaves has the bits of a run that was not killed: files are compared byte by byte, but for what says
when, how long, how often and where they were made. Everything that is computed is kept at once here, not after some
seconds.
"""

from __future__ import annotations

import json
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
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.attacks.good import copied
from tests.attacks.harness import LEFT

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
"""Most are kills that no process hears."""

QUICK = ["--config", "quick.yaml", "--quiet"]
LOSSY = ["--constraint", "accuracy_drop=50%", "--candidates", "4,8", "--points", "2"]
ROUND = ["--weight-bits", "4", "--method", "adaround:iterations=60"]
DROP = ["--weight-bits", "4", "--method", "qdrop:iterations=60"]
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
    Writer("ptq --method adaround", ["ptq", *QUICK, *ROUND, "--output", "new"]),
    Writer("ptq --method qdrop", ["ptq", *QUICK, *DROP, "--output", "new"]),
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
    Writer("search", ["search", *QUICK, *LOSSY, *ROUND[2:], "--output", "new"]),
    Writer("search --overwrite", ["search", *QUICK, *LOSSY, "--output", "run", "--overwrite"]),
)  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """What came of one: `fine`, or what is wrong."""

    writer: str
    signal: str
    seconds: float
    kind: str

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return self.kind == "fine"


def kill(good: Path, writer: Writer, seed: int, whole: Whole) -> Kill:
    """Starts a writer, kills it while it works, looks at what is left, runs it again to its end and compares.

    whole: what came of one that was not killed.
    """
    chance = random.Random(seed)
    sent, wait = chance.choice(SIGNALS), chance.uniform(0, 1.1 * whole.seconds)
    place = Path(tempfile.mkdtemp(prefix="pow2quant-kill-"))
    folder = place / "case"
    folder.mkdir()
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
        if kind == "fine" and (differ := sorted(n for n, h in whole.files.items() if digests(folder).get(n) != h)):
            kind = f"other bits: {', '.join(differ)}"
        return Kill(writer.name, sent.name, wait, kind)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@dataclass(frozen=True)
class Whole:
    """What came of a writer that was not killed: how long it took, and the files by name, as digests."""

    seconds: float
    files: dict[str, str]


def undisturbed(good: Path, writer: Writer) -> Whole:
    """Runs a writer to its end."""
    place = Path(tempfile.mkdtemp(prefix="pow2quant-kill-"))
    folder = place / "case"
    folder.mkdir()
    try:
        copied(good, folder)
        started = time.monotonic()
        os.waitpid(_started(folder, writer.arguments), 0)
        return Whole(time.monotonic() - started, digests(folder))
    finally:
        shutil.rmtree(place, ignore_errors=True)


COMPARED = {".onnx", ".encodings", ".safetensors", ".yaml", ".c", ".h", ".hex", ".npz", ".json"}
TIMES = {"duration_seconds", "seconds", "latency", "environment", "attempts"}
"""Keys of documents that say when, how fast and how often."""


def digests(folder: Path) -> dict[str, str]:
    """Every file whose bits must be those of any other such run, as a digest, without what says where and when."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in COMPARED):
        content = path.read_bytes().replace(os.fsencode(folder.resolve()), b"")
        if path.suffix == ".json":
            content = json.dumps(_timeless(json.loads(content))).encode()
        found[str(path.relative_to(folder))] = sha256(content).hexdigest()
    return found


def _timeless(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _timeless(value) for key, value in document.items() if key not in TIMES}
    return [_timeless(value) for value in document] if isinstance(document, list) else document


def _started(folder: Path, arguments: list[str]) -> int:
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        os.setpgid(0, 0)  # not a session: some schedulers share the processors by session
        os.chdir(folder)
        os.environ["TMPDIR"] = str(folder.parent)
        tempfile.tempdir = None
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(d, "w", 1) for d in (1, 2))
        sys.argv = ["pow2quant", *arguments]
        from pow2quant import cli
        from pow2quant.runs import unfinished

        unfinished.PAUSE = unfinished.SHARE = 0  # type: ignore[assignment]
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
    left = [p.name for root in (folder, place) for p in root.rglob("*") if LEFT.fullmatch(p.name)]
    return f"left: {', '.join(left)}" if left else "fine"


def every(good: Path, count: int) -> list[Callable[[], Kill]]:
    """So many kills, over all writers in turn, each at a moment within its own time."""
    whole = [undisturbed(good, writer) for writer in WRITERS[:count]]
    places = [number % len(WRITERS) for number in range(count)]
    return [partial(kill, good, WRITERS[place], number, whole[place]) for number, place in enumerate(places)]
