"""How tests call the command line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pow2quant.cli import main

ROOT = Path(__file__).resolve().parents[1]


SHORT = ["--max-eval-batches", "1", "--max-calibration-batches", "2", "--quiet"]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """The command ends with status 2 and one line on stderr that holds these words."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    for word in words:
        assert word in captured.err, captured.err


def command(*arguments: str, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    line = [sys.executable, *options.pop("python", []), "-m", "pow2quant", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(line, cwd=cwd, env=ENVIRONMENT, text=True, **pipes)
