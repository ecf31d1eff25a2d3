"""A part of `benchmarks/attacks.py`: some cases of every kind, and a kill of every command that writes quickly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and forks")
def test_some_bad_inputs_of_every_kind_are_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "attacks.py"), "--share", "211"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
