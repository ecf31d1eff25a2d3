"""Bad input of every kind on every command: what is refused, and what is not as it should be.

    python benchmarks/attacks.py [--category onnx,data] [--only TEXT] [--share 10] [--kills 200] [--write]

Exit status 1 where anything but a clear refusal or a result came. --share N: every N-th case. --kills N: kills so many
commands that write. --record FILE: what was refused or accepted there already is not run again. --write: the counts go
into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.attacks import arguments, files, good, kills, own, places  # noqa: E402
from tests.attacks.harness import Case, Outcome, counts, run  # noqa: E402
from tests.attacks.kills import Kill  # noqa: E402


def cases(ground: Path, mutations: int) -> Iterator[Case]:
    """Every case; the number of those that are drawn by chance grows with `mutations`."""
    yield from files.configurations()
    yield from files.studies()
    yield from files.damaged_runs(ground, mutations)
    yield from files.mutated_files(ground, mutations)
    yield from files.encodings(ground)
    yield from files.states(ground)
    yield from files.onnx_files(ground)
    yield from own.code()
    yield from own.data()
    yield from own.names()
    yield from own.flags(ground)
    yield from own.folders()
    yield from places.places(ground)
    yield from arguments.arguments(ground)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--category")
    parser.add_argument("--only", default="")
    parser.add_argument("--share", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--mutations", type=int, default=200)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    with temporary_folder() as folder:
        ground = good.ground(folder)
        possible = [
            case
            for case in cases(ground, given.mutations)
            if (not given.category or case.category in given.category.split(",")) and given.only in case.name
        ]
        chosen = possible[:: given.share]
        outcomes = [o for o in recorded(given.record) if o.good]
        done = {(o.category, o.name) for o in outcomes}
        work: list[Callable[[], Outcome | Kill]] = [*kills.every(ground, given.kills)] if given.kills else []
        work += [partial(run, case) for case in chosen if (case.category, case.name) not in done]
        killed = []
        for found in in_processes(work, given.jobs):
            if isinstance(found, Kill):
                killed.append(found)
            else:
                outcomes.append(found)
                record(given.record, found)
            if not found.good or given.only:
                print(found, flush=True)
    counted = f"{len(outcomes):,} of {len(possible):,} inputs, evenly spread, and {len(killed)} kills, in one run."
    lines = [f"{commit()}: {counted}", "", *table(outcomes), "", *table_of_kills(killed)]
    print("\n".join(lines))
    if given.write:
        write(lines)
    wrong = sum(not found.good for found in [*outcomes, *killed])
    print(f"{len(outcomes)} inputs, {len(killed)} kills, {wrong} wrong")
    return 1 if wrong else 0


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Removed at the end, but not by the processes that are forked when these end, as a TemporaryDirectory would be."""
    folder = Path(tempfile.mkdtemp(prefix="pow2quant-attacks-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


WORK: list[Callable[[], Outcome | Kill]] = []
"""Handed to the processes that are forked from this one by number, since it cannot be pickled."""


def in_processes(work: list[Callable[[], Outcome | Kill]], jobs: int) -> Iterator[Outcome | Kill]:
    """What came of each, in order; each process does one at a time."""
    WORK[:] = work
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(numbered, range(len(work)))


def numbered(number: int) -> Outcome | Kill:
    return WORK[number]()


def commit() -> str:
    """What is attacked, and when."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{time.strftime('%B %-d, %Y')}, commit {head or 'unknown'}"


def recorded(path: Path | None) -> list[Outcome]:
    """What earlier runs have recorded."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def record(path: Path | None, outcome: Outcome) -> None:
    """Adds an outcome to a file."""
    if path is not None:
        with path.open("a") as file:
            print(json.dumps(asdict(outcome)), file=file, flush=True)


def table(outcomes: list[Outcome]) -> list[str]:
    """The counts by category, as Markdown."""
    kinds = ["refused", "accepted", *sorted({o.kind for o in outcomes if not o.good})]
    lines = [f"| category | inputs | {' | '.join(kinds)} | slowest |", f"|---|---|{'---|' * len(kinds)}---|"]
    found = counts(outcomes)
    for category, counter in sorted(found.items()):
        slowest = max(o.seconds for o in outcomes if o.category == category)
        numbers = " | ".join(f"{counter[kind]:,}" for kind in kinds)
        lines.append(f"| {category} | {counter.total():,} | {numbers} | {slowest:.1f} s |")
    total = " | ".join(f"{sum(c[kind] for c in found.values()):,}" for kind in kinds)
    return [*lines, f"| all | {len(outcomes):,} | {total} | |"]


def table_of_kills(found: list[Kill]) -> list[str]:
    """The kills by command, as Markdown."""
    title = "| command | kills | whole before and after, next run works to the same bits, nothing left |"
    lines = [title, "|---|---|---|"]
    for name in dict.fromkeys(kill.writer for kill in found):
        own = [kill.kind for kill in found if kill.writer == name]
        lines.append(f"| {name} | {len(own)} | {own.count('fine')} |")
    fine = sum(kill.kind == "fine" for kill in found)
    return [*lines, f"| all | {len(found)} | {fine} |"] if found else []


def write(lines: list[str]) -> None:
    """Puts the tables between the marks of docs/reliability.md."""
    path = ROOT / "docs" / "reliability.md"
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + rest.partition(END)[2])


BEGIN, END = "<!-- written by benchmarks/attacks.py --write -->", "<!-- end -->"


if __name__ == "__main__":
    sys.exit(main())
