"""Metrics of tasks: by hand, by scikit-learn, by the user and by torchmetrics."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, r2_score
from torch import nn

from pow2quant.errors import ConfigError
from pow2quant.plugins import resolve
from pow2quant.runs.judging import interval_of_change
from pow2quant.tasks.base import Metric
from pow2quant.tasks.choosing import task_of
from pow2quant.tasks.images import ssim
from pow2quant.tasks.own import metric_of

rng = np.random.default_rng(0)


def counted(metric: Metric, outputs: np.ndarray, targets: Any, parts: int = 3) -> float | None:
    """A metric over some batches of different sizes."""
    counter = metric.counter()
    bounds = [0, *sorted(rng.choice(np.arange(1, len(outputs)), parts - 1, replace=False)), len(outputs)]
    for low, high in pairwise(bounds):
        counter.add([outputs[low:high].astype(np.float32)], targets[low:high])
    return counter.value()


def metrics_of(task: str, shape: tuple[int, ...]) -> dict[str, Metric]:
    return {m.name: m for m in resolve("tasks", task)([shape]).metrics}


def test_metrics_of_classes() -> None:
    logits, labels = rng.normal(size=(40, 7)), rng.integers(0, 7, 40)
    found = metrics_of("classification", (7,))
    assert counted(found["top1"], logits, labels) == pytest.approx(100 * (logits.argmax(1) == labels).mean(), abs=1e-4)
    best = np.argsort(-logits, 1)[:, :5]
    assert counted(found["top5"], logits, labels) == pytest.approx(100 * (best == labels[:, None]).any(1).mean())
    assert counted(found["top1"], logits, np.eye(7)[labels]) == counted(found["top1"], logits, labels)
    one = logits[:, :1]
    assert counted(metrics_of("classification", (1,))["top1"], one, labels % 2) == pytest.approx(
        100 * ((one[:, 0] > 0) == (labels % 2 > 0)).mean()
    )


def test_metrics_of_labels_and_masks() -> None:
    logits, labels = rng.normal(size=(30, 4)), rng.integers(0, 2, (30, 4))
    found = metrics_of("multi-label", (4,))
    assert counted(found["f1"], logits, labels) == pytest.approx(100 * f1_score(labels, logits > 0, average="micro"))
    assert counted(found["label_accuracy"], logits, labels) == pytest.approx(100 * ((logits > 0) == labels).mean())
    logits, masks = rng.normal(size=(9, 3, 5, 4)), rng.integers(0, 3, (9, 5, 4))
    masks[:, 0] = -100  # does not count
    seen, named = masks >= 0, logits.argmax(1)
    expected = 100 * jaccard_score(masks[seen], named[seen], average="macro")
    found = metrics_of("segmentation", (3, 5, 4))
    assert counted(found["miou"], logits, masks) == pytest.approx(expected, abs=1e-3)
    assert counted(found["pixel_accuracy"], logits, masks) == pytest.approx(100 * (masks == named)[seen].mean())
    last = np.moveaxis(logits, 1, -1)  # tokens have their classes in the last dimension
    assert counted(metrics_of("segmentation", (5, 4, 3))["miou"], last, masks) == pytest.approx(expected, abs=1e-3)


def test_the_interval_of_a_ratio_of_sums_is_that_of_resampled_images() -> None:
    masks = rng.integers(0, 3, (60, 6, 6))
    before = np.where(rng.random(masks.shape) < 0.9, masks, rng.integers(0, 3, masks.shape))
    worse = rng.random((60, 1, 1)) * 0.4  # some images lose much, some nothing
    after = np.where(rng.random(masks.shape) < worse, (before + 1) % 3, before)
    metric = metrics_of("segmentation", (3, 6, 6))["miou"]
    counters = []
    for named in (before, after):
        counters.append(metric.counter())
        for part in np.array_split(np.arange(60), 4):
            counters[-1].add([np.moveaxis(np.eye(3)[named[part]], -1, 1)], masks[part])
    found = interval_of_change(*counters, metric)
    assert found is not None
    change = counters[1].value() - counters[0].value()
    assert sum(found) / 2 == pytest.approx(change, abs=1e-3)

    def score(named: Any, chosen: Any) -> float:
        return 100 * jaccard_score(masks[chosen].ravel(), named[chosen].ravel(), average="macro")

    drawn = [rng.integers(0, 60, 60) for _ in range(300)]
    spread = np.std([score(after, c) - score(before, c) for c in drawn])
    assert found[1] - found[0] == pytest.approx(2 * 1.96 * spread, rel=0.2)
    same = interval_of_change(counters[0], counters[0], metric)
    assert same == (0.0, 0.0)


def test_metrics_of_numbers_and_images() -> None:
    y = rng.normal(size=(50, 3)).astype(np.float32)
    t = y + rng.normal(size=(50, 3))
    found = metrics_of("regression", (3,))
    assert counted(found["mae"], y, t) == pytest.approx(np.abs(y - t).mean(), abs=1e-4)
    assert counted(found["rmse"], y, t) == pytest.approx(np.sqrt(np.square(y - t).mean()), rel=1e-5)
    assert counted(found["r2"], y, t) == pytest.approx(r2_score(t, y), abs=1e-6)
    assert not found["mae"].higher_is_better
    images = rng.random((6, 1, 24, 20)).astype(np.float32)
    noisy = images + 0.1 * rng.choice([-1, 1], images.shape)
    found = metrics_of("image-to-image", (1, 24, 20))
    assert counted(found["psnr"], noisy, images) == pytest.approx(20, abs=1e-3)
    assert counted(found["ssim"], images, images) == pytest.approx(1)
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    x, y = noisy[0, 0, :11, :11].astype(np.float64), images[0, 0, :11, :11].astype(np.float64)
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy, both = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2, (window * x * y).sum() - mx * my
    expected = (2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    cut = slice(0, 1), slice(0, 1), slice(0, 11), slice(0, 11)
    whole = np.zeros((1, 1, 23, 23), np.float32), np.zeros((1, 1, 23, 23), np.float32)
    for image, part in zip(whole, (noisy[cut], images[cut]), strict=True):
        image[..., 6:17, 6:17] = part
    blurred = ssim([whole[0]], whole[1])
    assert expected < float(blurred[0]) < 1, "the zeros around the centre are alike"


class Largest:
    """A metric that counts, as those of torchmetrics do."""

    higher_is_better = False

    def __init__(self) -> None:
        self.seen = 0.0

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.seen = max(self.seen, float((outputs - targets).abs().max()))

    def compute(self) -> torch.Tensor:
        return torch.tensor(self.seen)


def largest(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return float((outputs - targets).abs().max())


def make() -> Largest:
    return Largest()


@pytest.mark.parametrize("given", [Largest, Largest(), make, largest, partial(largest)])
def test_metrics_of_the_user(given: Any) -> None:
    metric = metric_of(given, ())
    y, t = rng.normal(size=(20, 2)).astype(np.float32), rng.normal(size=(20, 2)).astype(np.float32)
    for _ in range(2):  # an object is not shared between executors
        assert counted(metric, y, t) == pytest.approx(float(np.abs(y - t).max()), rel=1e-5)


def test_a_dictionary_with_one_number_is_that_number() -> None:
    metric = metric_of(lambda outputs, targets: {"accuracy": torch.tensor(0.5)}, ())
    assert counted(metric, np.zeros((4, 2)), np.zeros(4)) == 0.5


def largest_error(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return largest(outputs, targets)


def test_which_way_a_metric_is_good(tmp_path: Path) -> None:
    assert not metric_of(largest_error, ()).higher_is_better
    assert metric_of(largest, ()).higher_is_better
    assert not metric_of(Largest, ()).higher_is_better
    assert not metric_of(nn.functional.cross_entropy, ()).higher_is_better
    (tmp_path / "own.py").write_text("def wrong(outputs, targets): return 1 / 0\ndef text(o, t): return 'much'\n")
    for name, expected in (("wrong", "own.py, line 1: ZeroDivisionError"), ("text", "gave a str, not a number")):
        counter = metric_of(f"{tmp_path / 'own.py'}:{name}", ()).counter()
        counter.add([np.zeros((2, 1), np.float32)], np.zeros(2))
        with pytest.raises(ConfigError, match=expected):
            counter.value()


def test_masks_and_labels_of_probabilities_are_above_a_half() -> None:
    for task, shape, metrics in (
        ("segmentation", (1, 5, 4), ("miou", "pixel_accuracy")),
        ("multi-label", (4,), ("f1",)),
    ):
        logits = rng.normal(size=(30, *shape))
        labels = rng.integers(0, 2, (30, *(shape[1:] if task == "segmentation" else shape)))
        plain, probable = (task_of(task, None, None, [shape], probable) for probable in (False, True))
        assert (plain.loss, probable.loss) == ("BCEWithLogitsLoss", "BCELoss")
        for name in metrics:
            one, other = (next(m for m in each.metrics if m.name == name) for each in (plain, probable))
            assert counted(one, logits, labels) == counted(other, 1 / (1 + np.exp(-logits)), labels)
            assert counted(one, logits, labels) == counted(one, logits, labels, parts=30)


def probabilities(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Accuracy where targets are a probability per class."""
    return float((outputs.argmax(1) == targets.argmax(1)).float().mean())


TORCHMETRICS = {
    "Accuracy": ((3,), lambda: torch.arange(16) % 3, lambda y, t: float((y.argmax(1) == t).float().mean())),
    "torchmetrics:MulticlassAccuracy": (
        (3,),
        lambda: torch.arange(16) % 3,
        lambda y, t: float(np.mean([(y.argmax(1)[t == c] == c).float().mean() for c in range(3)])),
    ),
    "torchmetrics:classification.Accuracy": ((3,), lambda: torch.rand(16, 3).softmax(1), probabilities),
    "F1Score": (
        (3,),
        lambda: (torch.rand(16, 3) > 0.5).long(),
        lambda y, t: float(f1_score(t, y > 0, average="micro")),
    ),
    "Accuracy ": ((1,), lambda: torch.arange(16) % 2, lambda y, t: float(((y[:, 0] > 0) == (t > 0)).float().mean())),
    "JaccardIndex": (
        (2, 8, 8),
        lambda: (torch.rand(16, 8, 8) > 0.5).long().masked_fill(torch.rand(16, 8, 8) > 0.9, 255),
        lambda y, t: float(jaccard_score(t[t < 255], y.argmax(1)[t < 255], average="macro")),
    ),
    "MeanAbsoluteError": ((4,), lambda: torch.rand(16, 4), lambda y, t: float((y - t).abs().mean())),
}


@pytest.mark.parametrize("name", TORCHMETRICS)
def test_metrics_of_torchmetrics_by_name(name: str) -> None:
    """They are made for the task: how many classes, which pixels are left out."""
    pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    shape, targets, expected = TORCHMETRICS[name]
    y, t = torch.randn(16, *shape), targets()
    task = task_of(None, name.strip(), t, [shape])
    metric, read = task.metrics[0], task.check(t, 16, "here")
    assert counted(metric, y.numpy(), read.numpy()) == pytest.approx(expected(y, t), abs=1e-5)
    assert metric.higher_is_better == (name != "MeanAbsoluteError")
