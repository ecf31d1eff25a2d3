"""A small run that works, whose files are the ground that bad ones are made of."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

import yaml

CODE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def data():
    x, y = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4
    return TensorDataset(x, y), TensorDataset(x, y)
"""
QUICK = {
    "report": {"statistics": False, "latency": False},
    "model": {"name": "mine.py:net"},
    "data": {"dataset": "mine.py:data", "batch_size": 8},
    "training": {"epochs": 1, "batch_size": 8},
}


def ground(folder: Path) -> Path:
    """Writes the code and its configuration and makes a run `run`; imports everything on the way.

    No training: after it, torch refuses to compute gradients in a forked process.
    """
    import pow2quant.study.compare
    import pow2quant.study.search
    import pow2quant.three_steps  # noqa: F401
    from pow2quant.cli import main

    put(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            assert main(["ptq", "--config", "quick.yaml", "--output", "run", "--quiet"]) == 0
            assert main(["correct", "run", "--alpha", "1", "--num-clusters", "1", "--pca-dim", "1", "--quiet"]) == 0
            assert main(["validate", "run/model.onnx", "--quiet"]) == 0
    finally:
        os.chdir(before)
    return folder


def put(folder: Path, code: str = CODE, **changes: object) -> list[str]:
    """Writes `mine.py` and `quick.yaml` with changes, `section__key` by name; returns arguments of a run of them."""
    (folder / "mine.py").write_text(code, encoding="utf-8", errors="surrogateescape")
    document: dict[str, dict[str, object]] = {key: {**value} for key, value in QUICK.items()}
    for name, value in changes.items():
        section, key = name.split("__")
        document.setdefault(section, {})[key] = value
    (folder / "quick.yaml").write_text(yaml.safe_dump(document))
    return ["ptq", "--config", "quick.yaml", "--output", "out", "--quiet"]


def copied(good: Path, folder: Path) -> Path:
    """The good run, its code and its configuration in a case's folder."""
    for name in ("mine.py", "quick.yaml"):
        shutil.copy(good / name, folder / name)
    shutil.copytree(good / "run", folder / "run")
    text = (folder / "run" / "config.yaml").read_text()
    (folder / "run" / "config.yaml").write_text(text.replace(str(good.resolve()), str(folder.resolve())))
    return folder / "run"
