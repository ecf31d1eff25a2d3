"""Processor time and peak memory of every command over network size.

    python benchmarks/sizes.py [--widths 8 20 44 88] [--rows docs/sizes.json]

Chains of six residual blocks with random weights, at 16 x 16, 8 x 8 and 4 x 4: a width of 8 has 44,000 weights, twice
the width four times as many. 64 random images of 32 x 32 calibrate and train, in two steps, and 32 validate. Every
command is a process of its own on one thread; its compilers count. Prints a row per command and writes it; networks
whose rows are there are not measured again. `docs/draw.py` draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NETWORK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Block(nn.Module):
    def __init__(self, before, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(before, channels, 1, stride) if before != channels else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def network(width=WIDTH):
    torch.manual_seed(0)
    blocks = [Block(*sizes) for sizes in (
        (width, width, 1), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1),
        (2 * width, 4 * width, 2), (4 * width, 4 * width, 1),
    )]
    stem = nn.Conv2d(3, width, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)).eval()


def data():
    torch.manual_seed(1)
    images, labels = torch.rand(96, 3, 32, 32), torch.randint(0, 10, (96,))
    return TensorDataset(images[:64], labels[:64]), TensorDataset(images[64:], labels[64:])
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """Arguments by command, in an order in which each finds what it needs."""
    given = ["--model", f"{folder / 'mine.py'}:network", "--data", f"{folder / 'mine.py'}:data", "--batch-size", "32"]
    run = str(folder / "ptq")
    return {
        "ptq": ["ptq", *given, "--output", run],
        "qat": ["qat", *given, "--epochs", "1", "--output", str(folder / "qat")],
        "validate": ["validate", run],
        "export --to c": ["export", run, "--to", "c", "--output", str(folder / "c")],
    }


def measured(arguments: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """CPU seconds of a command, its children's too, and the peak of its resident memory in bytes."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "pow2quant", *arguments, "--quiet"], env=environment, stdout=said, stderr=said
        )
        _, status, spent = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode != 0:
            raise SystemExit(said.read().decode())
    return spent.ru_utime + spent.ru_stime, spent.ru_maxrss * 1024


def rows_of(width: int, environment: dict[str, str]) -> list[dict[str, Any]]:
    """A network's rows."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "mine.py").write_text(NETWORK.replace("WIDTH", str(width)))
        # Not counted in this process: on Linux the peak of a child begins with the memory of its parent.
        count = "import mine; print(sum(p.numel() for p in mine.network().parameters()))"
        weights = int(subprocess.run([sys.executable, "-c", count], cwd=folder, capture_output=True, check=True).stdout)
        for command, arguments in commands(folder).items():
            seconds, memory = measured(arguments, environment)
            row = {"width": width, "weights": weights, "command": command}
            found.append(row | {"seconds": round(seconds, 1), "mebibytes": memory >> 20})
            print(f"| {weights:,} | {command} | {seconds:.1f} s | {memory >> 20:,} MiB |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[8, 20, 44, 88])
    parser.add_argument("--rows", type=Path, default=Path(__file__).parents[1] / "docs" / "sizes.json")
    given = parser.parse_args()
    print("| weights | command | CPU | peak of memory |\n|---|---|---|---|")
    rows: list[dict[str, Any]] = json.loads(given.rows.read_text(encoding="utf-8")) if given.rows.exists() else []
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache}
        measured(["ptq", "--output", str(Path(cache, "first"))], environment)  # what is compiled for every network
        for width in [w for w in given.widths if w not in {row["width"] for row in rows}]:
            rows += rows_of(width, environment)
            given.rows.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
