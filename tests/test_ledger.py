"""The record of a study: no trial is lost or done twice, whatever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pow2quant.errors import ConfigError, OutputError
from pow2quant.study.space import given

optuna = pytest.importorskip("optuna", reason="the extra 'search' is not installed")

from pow2quant.study.ledger import ATTEMPTS, Ledger, Plan  # noqa: E402
from pow2quant.study.locks import FileLock  # noqa: E402
from tests.commands import ROOT  # noqa: E402

GRID = ((given("x=1..5"), given("y=a,b")),)


TEN = Plan(GRID)


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[str, Callable[[str], None]]]:
    """A PostgreSQL server of our own, on a socket in a temporary folder: its URL, and what starts and stops it."""
    pytest.importorskip("psycopg", reason="the extra 'search' is not installed")
    installed = [shutil.which("postgres"), *map(str, Path("/usr/lib/postgresql").glob("*/bin/postgres"))]
    server = next((Path(p).resolve().parent for p in installed if p), None)
    if server is None or not (server / "initdb").exists():
        pytest.skip("no PostgreSQL server is installed")
    user = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []  # root is refused
    if user and not shutil.which(user[0]):
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    folder = Path(tempfile.mkdtemp(prefix="pow2quant-pg-"))  # another user may enter it
    if user:
        shutil.chown(folder, "nobody")
    data, socket = folder / "data", f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    made = [*user, server / "initdb", "-D", data, "-A", "trust", "-U", "study", "--no-sync"]
    control = [*user, server / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    try:
        subprocess.run(made, check=True, capture_output=True, cwd=folder)

        def order(what: str) -> None:
            options = ["-o", socket] if what == "start" else ["-m", "fast"]
            subprocess.run([*control, *options, what], check=True, capture_output=True, cwd=folder)

        order("start")
        yield f"postgresql://study@/postgres?host={folder}", order
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, capture_output=True, cwd=folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    return str(request.getfixturevalue("postgres"))


@pytest.fixture
def study(url: str, tmp_path: Path) -> partial[Ledger]:
    return partial(Ledger, url, f"study-{tmp_path.name}", TEN, "fingerprint")


WORKER = """
import sys, time
from pathlib import Path
from pow2quant.study.ledger import Ledger, Plan
from pow2quant.study.space import given
url, name, log, dies = sys.argv[1:]
ledger = Ledger(url, name, Plan(((given("x=1..5"), given("y=a,b")),)), "fingerprint")
done = 0
while (claim := ledger.claim()) is not None:
    with open(log, "a") as file:
        print("began", claim.number, file=file, flush=True)
    if dies == "yes" and done == 2:
        time.sleep(600)
    time.sleep(0.05)
    if ledger.finish(claim, {"by": dies}, float(claim.number)):
        done += 1
        with open(log, "a") as file:
            print("ended", claim.number, file=file, flush=True)
"""


def test_of_two_workers_one_is_killed_and_no_trial_is_lost_or_done_twice(
    url: str, study: partial[Ledger], tmp_path: Path
) -> None:
    """The killed one holds a trial: the other takes it over, in the same minute, and finishes all."""
    log, name = tmp_path / "log", study.args[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", WORKER, url, name, str(log)]
    doomed = subprocess.Popen([*command, "yes"], env=environment)
    while (log.read_text().count("began") if log.exists() else 0) < 3 and doomed.poll() is None:
        time.sleep(0.05)
    other = subprocess.Popen([*command, "no"], env=environment)
    while log.read_text().count("began") < 5 and other.poll() is None:
        time.sleep(0.02)
    doomed.send_signal(signal.SIGKILL)
    doomed.wait()
    assert other.wait() == 0
    assert subprocess.run([*command, "no"], env=environment, check=False).returncode == 0  # whatever the other left
    entries = study().entries()
    assert [e.number for e in entries] == list(range(10))
    assert {e.state for e in entries} == {"complete"}
    assert len({json.dumps(e.combination) for e in entries}) == 10
    lines = log.read_text().split("\n")
    ended = [line for line in lines if line.startswith("ended")]
    assert len(ended) == len(set(ended)) == 10, "none finished twice"
    (taken_over,) = (e for e in entries if e.attempts == 2)
    assert lines.count(f"began {taken_over.number}") == 2
    assert sum(e.result == {"by": "yes"} for e in entries) == 2


@pytest.fixture
def postgres(server: tuple[str, Callable[[str], None]]) -> str:
    return server[0]


def test_a_database_that_is_away_for_a_while_loses_nothing(
    server: tuple[str, Callable[[str], None]], tmp_path: Path
) -> None:
    """PostgreSQL stops and starts again under two workers: both go on, and all trials are finished."""
    (url, order), log = server, tmp_path / "log"
    name = f"study-{tmp_path.name}"
    command = [sys.executable, "-W", "error", "-c", WORKER, url, name, str(log), "no"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    workers = [subprocess.Popen(command, env=environment) for _ in range(2)]
    while (log.read_text().count("ended") if log.exists() else 0) < 3 and None in [w.poll() for w in workers]:
        time.sleep(0.02)
    order("stop")
    order("start")
    assert [worker.wait() for worker in workers] == [0, 0]
    entries = Ledger(url, name, TEN, "fingerprint").entries()
    assert [(e.number, e.state) for e in entries] == [(number, "complete") for number in range(10)]
    assert len({json.dumps(e.combination) for e in entries}) == 10


def test_a_worker_writes_nothing_after_its_lock_is_lost(
    server: tuple[str, Callable[[str], None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL starts again between a worker's look at the trials and its own new one; another comes first."""
    (url, order), first = server, []
    slow, other = (Ledger(url, f"study-{tmp_path.name}", TEN, "fingerprint") for _ in range(2))

    def late(trials: object) -> object:
        monkeypatch.undo()
        order("stop")
        order("start")
        first.append(other.claim())
        return slow._next(trials)

    monkeypatch.setattr(slow, "_next", late)
    second = slow.claim()
    assert (first[0].number, second.number) == (0, 1)
    assert first[0].combination != second.combination
    assert len(other.entries()) == 2
    slow.close()
    other.close()


def test_what_a_worker_has_lost_it_cannot_finish(study: partial[Ledger]) -> None:
    """Its connection, and with it its lock, may be gone while it computes on."""
    slow, other = study(), study()
    claim = slow.claim()
    slow.close()
    assert other.claim() == claim
    assert not slow.finish(claim, {}, 1.0)
    assert other.finish(claim, {"mine": True}, 2.0)
    assert [e.result for e in other.entries()] == [{"mine": True}]
    other.close()


def test_a_trial_that_kills_its_workers_fails_at_last(study: partial[Ledger]) -> None:
    numbers = []
    for _ in range(ATTEMPTS + 1):
        ledger = study()
        numbers.append(ledger.claim().number)
        ledger.close()
    assert numbers == [0] * ATTEMPTS + [1]
    first = ledger.entries()[0]
    assert (first.state, first.error) == ("failed", "its worker died 3 times")


def test_a_study_of_another_kind_is_not_continued(url: str, study: partial[Ledger]) -> None:
    study()
    with pytest.raises(ConfigError, match="another study already"):
        Ledger(url, study.args[1], TEN, "other")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://host/db", "sqlite:///FILE or postgresql"),
        ("sqlite:////nowhere/at/all/study.db", "nowhere"),
        ("postgresql://user:secret@/db?host=/nowhere", "PostgreSQL cannot be used"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_clear_line(url: str, words: str) -> None:
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg", reason="the extra 'search' is not installed")
    with pytest.raises((ConfigError, OutputError), match=words) as caught:
        Ledger(url, "name", TEN, "fingerprint")
    assert "secret" not in str(caught.value)


def test_no_locks_stay_beside_a_database_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("not a database" * 100)
    with pytest.raises(OutputError, match="cannot be used"):
        Ledger(f"sqlite:///{tmp_path / 'study.db'}", "name", TEN, "fingerprint")
    assert [p.name for p in tmp_path.iterdir()] == ["study.db"]


def test_workers_that_are_gone_leave_no_locks(tmp_path: Path) -> None:
    make = partial(Ledger, f"sqlite:///{tmp_path / 'study.db'}", "name", TEN, "fingerprint")
    script = "import os, sys; from tests.test_studies import *; Ledger(sys.argv[1], 'name', TEN, 'fingerprint').claim()"
    url = f"sqlite:///{tmp_path / 'study.db'}"
    subprocess.run([sys.executable, "-c", f"{script}; os.kill(os.getpid(), 9)", url], check=False)
    ledger = make()
    claim = ledger.claim()
    assert claim is not None
    assert claim.number == 0
    ledger.close()
    assert [p.name for p in (tmp_path / "study.db.locks").iterdir()] == ["name-record"]


def test_a_sampler_draws_within_the_ranges_and_repeats_itself(tmp_path: Path) -> None:
    grid = ((given("n=2..8"), given("x=0.5:1.5"), given("r=1e-5:1e-2:log"), given("k=a,b")),)
    found = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        url = f"sqlite:///{tmp_path / folder / 'study.db'}"
        ledger = Ledger(url, "s", Plan(grid, trials=11, sampler="tpe", seed=3), "f")
        while (claim := ledger.claim()) is not None:
            ledger.finish(claim, {}, -abs(claim.combination["x"] - 1))
        ledger.close()
        found.append([e.combination for e in ledger.entries()])
    assert found[0] == found[1]
    assert len(found[0]) == 11
    for drawn in found[0]:
        assert drawn["n"] in range(2, 9)
        assert 0.5 <= drawn["x"] <= 1.5
        assert 1e-5 <= drawn["r"] <= 1e-2
        assert drawn["k"] in ("a", "b")


def test_a_lock_of_a_file_has_one_holder(tmp_path: Path) -> None:
    one, two = (FileLock(tmp_path / "lock") for _ in range(2))
    assert one.take()
    assert not two.take()
    one.free()
    assert two.take()
    two.free()
