"""Ctrl-C in every long command: one line, status 130, nothing half-made; the same command again ends as if alone."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pow2quant
from pow2quant import signals
from pow2quant.cli import main
from pow2quant.runs import unfinished
from pow2quant.signals import INTERRUPTED
from pow2quant.study import workers

QUICK = {
    "data": {"batch_size": 8},
    "report": {"statistics": False, "latency": False},
    "training": {"epochs": 2, "checkpoint_minutes": 1e-9},
    "search": {"constraints": ["sqnr=10dB"], "candidates": ["4", "8"], "points": 2},
}
SOURCE = """
import signal
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import Dataset

ORDERS = Path(__file__).with_name("orders")


class Images(Dataset):
    '''Counts its readings; at the one that `orders` names, Ctrl-C.'''
    classes = ["a", "b"]
    def __len__(self): return 24
    def __getitem__(self, index):
        left = int(ORDERS.read_text()) - 1
        ORDERS.write_text(str(left))
        if left == 0:
            signal.raise_signal(signal.SIGINT)
        return torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(index)), index % 2


def data(): return Images(), Images()
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
"""
COMMANDS = {
    "ptq": ["--method", "adaround:iterations=3", "--weight-bits", "4"],
    "qat": ["--weight-bits", "4"],
    "search": [],
    "sweep": ["--grid", "quantization.weight.bitwidth=3,8", "--method", "none"],
    "compare": ["--method", "none", "--method", "none+adaround:iterations=3", "--widths", "4:8", "--seeds", "0"],
}
STUDIES = ("sweep", "compare")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a network and data; Ctrl-C is heard as the console script hears it."""
    monkeypatch.setattr(unfinished, "PAUSE", 0)
    monkeypatch.setattr(unfinished, "SHARE", 0)
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "quick.yaml").write_text(json.dumps(QUICK))
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.install()
    yield tmp_path
    for number, handler in before:
        signal.signal(number, handler)
    signals._received.clear()


def given(mine: Path, command: str, *more: str) -> list[str]:
    own = ["--model", f"{mine / 'mine.py'}:network", "--data", f"{mine / 'mine.py'}:data", "--quiet"]
    return [command, *own, "--config", str(mine / "quick.yaml"), *more]


def readings(mine: Path, arguments: list[str], at: int = 0) -> tuple[int, int]:
    """The command's status and how often it read an image; at the reading number `at`, Ctrl-C."""
    signals._received.clear()
    (mine / "orders").write_text(str(at))
    return main(arguments), at - int((mine / "orders").read_text())


def found(folder: Path, command: str) -> object:
    """What a command came to, without the time that it took."""
    if command not in STUDIES:
        return [(folder / name).read_bytes() for name in ("model.onnx", "model.encodings", "model.safetensors")]
    with (folder / "results.csv").open() as file:
        rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]
    return rows, (folder / "best.yaml").read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_it_ends_in_one_line_and_the_same_command_continues(
    command: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = given(mine, command, *COMMANDS[command], "--output")
    status, whole = readings(mine, [*first, str(mine / "whole")])
    assert status == 0
    run, before = mine / "run", {path.name for path in mine.iterdir()}
    kept = {"qat": "run.training", "sweep": "run", "compare": "run"}.get(command, "run.unfinished")
    flags: list[str] = []
    for share in (0.05, 0.4):
        capsys.readouterr()
        status, _ = readings(mine, [*first, str(run), *flags], max(1, int(share * whole)))
        assert status == INTERRUPTED
        left = {path.name for path in mine.iterdir()} - before
        assert left <= {kept}, "and nothing half-made"
        new = ["--resume"] if command == "qat" and left and not flags else []
        said = " ".join(["the same command with --output", str(run), *new, "continues"])
        flags += new
        assert capsys.readouterr().err == f"error: interrupted; {said if left else 'nothing was written'}\n"
    assert readings(mine, [*first, str(run), *flags])[0] == 0
    assert found(run, command) == found(mine / "whole", command)
    assert {path.name for path in mine.iterdir()} - before == {"run"}


@pytest.mark.parametrize("command", ["validate", "correct", "logits"])
def test_what_reads_a_run_leaves_it_as_it_was(command: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = mine / "run"
    assert readings(mine, given(mine, "ptq", "--weight-bits", "2", "--method", "none", "--output", str(run)))[0] == 0
    before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    asked = [command, str(run), "--quiet"]
    capsys.readouterr()
    assert readings(mine, asked, 10) == (INTERRUPTED, 10)
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"
    assert {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert readings(mine, asked)[0] == 0


def test_in_a_notebook_it_is_python_s_own_exception(mine: Path) -> None:
    own: dict[str, object] = {"__file__": str(mine / "mine.py")}
    exec((mine / "mine.py").read_text(), own)
    (mine / "orders").write_text("30")
    with pytest.raises(KeyboardInterrupt):
        pow2quant.quantize(own["network"](), own["data"](), config=QUICK, output=mine / "run", progress=False)  # type: ignore[operator]
    assert {path.name for path in mine.iterdir()} <= {"mine.py", "quick.yaml", "orders", "run.unfinished"}


def test_a_process_that_starts_hears_no_ctrl_c_and_can_be_ended() -> None:
    """It has handlers only when its imports are done; until then Python's own would print a traceback."""
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    with workers._interrupts_wait():
        process.start()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(0.3)
    assert process.is_alive()
    workers._end([process])
    assert process.exitcode == -signal.SIGTERM


def test_a_second_signal_waits_for_the_first_one_to_clear_up(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert (signals.interrupted(), ended) == (True, [])
    monkeypatch.setattr(signals, "PATIENCE", -1.0)
    signal.raise_signal(signal.SIGINT)
    assert ended == [INTERRUPTED]
