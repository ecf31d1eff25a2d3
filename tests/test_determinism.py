"""The same command gives the same files in another process: a part of `benchmarks/determinism.py`, and its page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import determinism  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_files_do_not_depend_on_the_hash_seed() -> None:
    command = [sys.executable, determinism.__file__, "--only", "ptq, W4A8", "--setting", determinism.MUST]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    name, count, found = cells(done.stdout.splitlines()[-1])
    assert (name, found) == ("ptq, W4A8", "equal")
    assert int(count) > 5


def test_the_page_shows_every_command_in_every_setting() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    head, _, *rows = page.split(determinism.BEGIN)[1].split(determinism.END)[0].strip().splitlines()
    assert cells(head) == ["command", "files", *determinism.SETTINGS]
    assert [cells(row)[0] for row in rows] == [*determinism.COMMANDS]
    assert {cells(row)[cells(head).index(determinism.MUST)] for row in rows} == {"equal"}
