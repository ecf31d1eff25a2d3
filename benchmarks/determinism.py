"""The same command under other settings of the machine: which files keep their bits, and which do not.

    python benchmarks/determinism.py [--only TEXT] [--setting TEXT] [--write]

Each command runs on the embedded network with one thread; then again with another hash seed and studies with two
processes, with two threads, and with PyTorch's kernels for processors without vectors. Files are compared byte by byte,
but for what says when, how long and where they were made. Exit status 1 where one differs by hash seed or processes.
--only, --setting: those in whose name this is. --write: the table goes into docs/reliability.md. All takes two minutes
of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.attacks.kills import digests  # noqa: E402

CONFIG = """
data: {batch_size: 64}
ptq: {calibration_batches: 2, max_eval_batches: 1}
report: {statistics: false, latency: false}
"""
QUICK = ["--config", "quick.yaml", "--quiet"]
NARROW = ["--weight-bits", "4", "--activation-bits", "4"]
COMMANDS = {
    "ptq": ["ptq", *QUICK],
    "ptq, W4A8": ["ptq", "--weight-bits", "4", *QUICK],
    "ptq, W4A4, adaround": ["ptq", *NARROW, "--method", "adaround:iterations=20", *QUICK],
    "ptq, W4A4, qdrop": ["ptq", *NARROW, "--method", "qdrop:iterations=20", *QUICK],
    "qat, W4A8": ["qat", "--weight-bits", "4", "--epochs", "1", *QUICK],
    "search": ["search", "--constraint", "accuracy_drop=50%", "--candidates", "4,8", "--points", "2", *QUICK],
    "sweep": ["sweep", "--grid", "quantization.weight.bitwidth=3,4", *QUICK],
}
PLAIN = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "passive"}
SETTINGS: dict[str, dict[str, str]] = {
    "hash seed, 2 processes": {"PYTHONHASHSEED": "4711", "JOBS": "2"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "no vectors": {"ATEN_CPU_CAPABILITY": "default"},
}
MUST = "hash seed, 2 processes"
"""The setting that may change nothing."""

Digests = dict[str, dict[str, str]]
"""By command, then by file."""


def every(chosen: str) -> Digests:
    """What each command writes in this process; of a run its C too."""
    from pow2quant.cli import main

    found = {}
    for name, arguments in COMMANDS.items():
        if chosen not in name:
            continue
        with tempfile.TemporaryDirectory(prefix="pow2quant-determinism-") as folder, redirect_stdout(StringIO()):
            os.chdir(folder)
            Path("quick.yaml").write_text(CONFIG)
            jobs = ["--jobs", os.environ.get("JOBS", "1")] if arguments[0] == "sweep" else []
            assert main([*arguments, *jobs, "--output", "out"]) == 0
            assert arguments[0] == "sweep" or main(["export", "out", "--to", "c", "--quiet"]) == 0
            found[name] = digests(Path("out"))
            os.chdir(ROOT)
    return found


def elsewhere(chosen: str, variables: dict[str, str]) -> Digests:
    """The same in a process with these variables."""
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"} | PLAIN | variables
    command = [sys.executable, __file__, "--here", "--only", chosen]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--setting", default="")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(every(given.only)))
        return 0
    expected = elsewhere(given.only, {})
    found = {}
    settings = {name: variables for name, variables in SETTINGS.items() if given.setting in name}
    for setting, variables in settings.items():
        found[setting] = {
            name: sorted(f for f in {*own, *expected[name]} if own.get(f) != expected[name].get(f))
            for name, own in elsewhere(given.only, variables).items()
        }
        print(f"{setting}: {found[setting]}", flush=True)
    lines = [f"| command | files | {' | '.join(settings)} |", f"|---|---|{'---|' * len(settings)}"]
    for name, own in expected.items():
        cells = [", ".join(f"`{file}`" for file in found[setting][name]) or "equal" for setting in settings]
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if given.write:
        path = ROOT / "docs" / "reliability.md"
        before, _, rest = path.read_text().partition(BEGIN)
        path.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + rest.partition(END)[2])
    return 1 if any(found.get(MUST, {}).values()) else 0


BEGIN, END = "<!-- written by benchmarks/determinism.py --write -->", "<!-- end of determinism -->"


if __name__ == "__main__":
    sys.exit(main())
