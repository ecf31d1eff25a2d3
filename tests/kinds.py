"""Kinds of job, as a person has them: a network and its data, in a file; and a float ONNX file without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

from pow2quant.cli import main

SOURCE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, x, y):
        return torch.relu(self.a(x)) + self.b(y)


def seeded(make):
    torch.manual_seed(0)
    return make()


def classifier():
    return seeded(lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ))


def segmenter(): return seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
def regressor(): return seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)))
def two(): return seeded(TwoInputs)
def tagger(): return seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)))
def denoiser(): return seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1)))


def images(n=24): return torch.rand(n, 1, 8, 8)
def loader(*tensors): return DataLoader(TensorDataset(*tensors), 8, shuffle=True)
def labelled(): return seeded(lambda: loader(images(), torch.randint(0, 3, (24,))))
def masked(): return seeded(lambda: loader(images(), torch.randint(0, 2, (24, 8, 8))))
def numbers(): return seeded(lambda: loader(torch.rand(24, 5), torch.rand(24)))
def pairs(): return seeded(lambda: loader(torch.rand(24, 5), torch.rand(24, 3), torch.randint(0, 4, (24,))))
def unlabelled(): return seeded(lambda: loader(images()))
def several(): return seeded(lambda: loader(images(), torch.randint(0, 2, (24, 3))))
def soft(): return seeded(lambda: loader(images(), torch.rand(24, 3).softmax(1)))
def tokens(): return seeded(lambda: loader(torch.rand(24, 6, 5), torch.randint(-1, 4, (24, 6))))
def clean(): return seeded(lambda: loader(images(), images()))
"""


QUICK = {"report": {"statistics": False, "latency": False}, "ptq": {"calibration_batches": 2}}


class Kind(NamedTuple):
    """A network and data by their names in `SOURCE` (or a file's), their task, and the metric that leads."""

    model: str
    data: str
    task: str
    metric: str | None

    @property
    def has_labels(self) -> bool:
        """Whether it can be trained."""
        return self.task != "none"

    def model_in(self, folder: Path) -> str:
        """As the command line names it."""
        return str(folder / self.model) if self.model.endswith(".onnx") else f"{folder / 'mine.py'}:{self.model}"

    def data_in(self, folder: Path) -> str:
        """As the command line names it."""
        return f"{folder / 'mine.py'}:{self.data}"


KINDS = {
    "classifier": Kind("classifier", "labelled", "classification", "top1"),
    "segmentation": Kind("segmenter", "masked", "segmentation", "miou"),
    "regressor": Kind("regressor", "numbers", "regression", "mae"),
    "two inputs": Kind("two", "pairs", "classification", "top1"),
    "ONNX file": Kind("net.onnx", "unlabelled", "none", None),
}


FURTHER = {
    "several labels": Kind("classifier", "several", "multi-label", "f1"),
    "soft labels": Kind("classifier", "soft", "classification", "top1"),
    "tokens": Kind("tagger", "tokens", "segmentation", "miou"),
    "images": Kind("denoiser", "clean", "image-to-image", "psnr"),
}


def command(name: str, kind: Kind, mine: Path, output: Path, *more: str) -> dict[str, Any]:
    """Runs a command on a kind; returns the JSON document that it leaves."""
    arguments = ["--model", kind.model_in(mine), "--data", kind.data_in(mine), "--config", str(mine / "quick.yaml")]
    assert main([name, *arguments, "--output", str(output), "--quiet", *more]) == 0
    document = {"compare": "comparison.json", "sweep": "study.json"}.get(name, "report.json")
    found: dict[str, Any] = json.loads((output / document).read_text())
    return found


def write(folder: Path) -> Path:
    """Writes `mine.py`, `net.onnx` and `quick.yaml` into a folder; returns it."""
    (folder / "mine.py").write_text(SOURCE)
    (folder / "quick.yaml").write_text(json.dumps(QUICK))
    random = np.random.default_rng(0)
    weights = {"w": (6, 1, 3, 3), "b": (6,), "v": (3, 6), "c": (3,)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "v", "c"], ["y"], transB=1),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(random.normal(size=s).astype(np.float32), k) for k, s in weights.items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "net.onnx")
    return folder
