"""What training measured, and the files of it: training_metrics.json, training_curves.png, TensorBoard's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from pow2quant.errors import MissingExtraError
from pow2quant.saving import write

METRICS, CURVES, BOARD = "training_metrics.json", "training_curves.png", "tensorboard"


@dataclass(frozen=True)
class Epoch:
    """What was measured of an epoch (0: before training).

    loss: the mean over the training samples. accuracy: top-1 on the test data in per cent, quantized as it was trained.
    quantized: share of the sites. flips: changes of exponents. moved: exponents that are not those of calibration.
    frozen: exponents that do not move any more.
    """

    epoch: int
    loss: float | None
    accuracy: float
    learning_rate: float
    quantized: float
    flips: int
    moved: int
    frozen: int
    exponents: int
    seconds: float


def log(folder: Path, epoch: Epoch) -> None:
    """Adds an epoch to TensorBoard's files in `folder/tensorboard`. Raises MissingExtraError without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "training.tensorboard needs tensorboard: pip install 'pow2quant[tensorboard]'"
        ) from error
    with SummaryWriter(folder / BOARD) as writer:
        for name, value in asdict(epoch).items():
            if value is not None:
                writer.add_scalar(name, value, epoch.epoch)


def save(folder: Path, epochs: Sequence[Epoch], facts: Mapping[str, Any], lines: Mapping[str, float]) -> None:
    """Writes both files. facts: further keys of the JSON, `best_epoch` among them, and `metric` with its `unit`.

    lines: values of the metric to compare with, by label.
    """
    document = {**facts, "epochs": [asdict(epoch) for epoch in epochs]}
    write(folder / METRICS, (json.dumps(document, indent=2) + "\n").encode())
    write(folder / CURVES, _drawn(epochs, facts, lines))


def _drawn(epochs: Sequence[Epoch], facts: Mapping[str, Any], lines: Mapping[str, float]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, exponents = figure.subplots(3, 1, sharex=True)
    trained = [e for e in epochs if e.loss is not None]
    loss.plot([e.epoch for e in trained], [e.loss for e in trained], "o-", color="tab:blue")
    loss.set_ylabel("training loss")
    best, unit = epochs[facts["best_epoch"]], facts["unit"]
    accuracy.plot([e.epoch for e in epochs], [e.accuracy for e in epochs], "o-", color="tab:green", label="test data")
    accuracy.plot(
        best.epoch, best.accuracy, "*", color="black", markersize=13, label=f"best: {best.accuracy:.4g} {unit}"
    )
    for (label, value), style in zip(lines.items(), ("--", ":", "-."), strict=False):
        accuracy.axhline(value, color="gray", linestyle=style, label=f"{label}: {value:.4g} {unit}")
    accuracy.set_ylabel(", ".join(word for word in (facts["metric"], unit) if word))
    accuracy.legend(loc="best")
    exponents.plot([e.epoch for e in epochs], [e.moved for e in epochs], "o-", label="differ from calibration's")
    exponents.plot([e.epoch for e in epochs], [e.frozen for e in epochs], "s-", label="frozen")
    exponents.bar(
        [e.epoch for e in trained], [e.flips for e in trained], color="lightgray", label="changes in the epoch"
    )
    exponents.set_ylabel(f"exponents (of {epochs[0].exponents})")
    exponents.legend()
    exponents.set_xlabel("epoch (0: before training)")
    exponents.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (loss, accuracy, exponents):
        axes.grid(alpha=0.3)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
