"""The test samples that lost most by quantization, for people to look at, and what every class lost."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pow2quant.tasks.base import ONE_ANSWER, Averaged, OneAnswer, Outputs, Task

if TYPE_CHECKING:
    from pow2quant.tasks.base import Counter

MOST = 12
"""So many samples are kept."""

WIDEST = 112
"""Pixels of a picture's longer side."""


@dataclass(frozen=True)
class Sample:
    """A test sample. index: its place in the test data. lost: of the leading metric, in its unit.

    values: its first input, without the batch. expected, exact, quantized: target and answers in words, "" where the
    task has none.
    """

    index: int
    lost: float
    values: NDArray[Any]
    expected: str
    exact: str
    quantized: str

    def to_json(self) -> dict[str, Any]:
        """An entry of `worst` in statistics.json."""
        return {
            "sample": self.index,
            "lost": round(self.lost, 4),
            "expected": self.expected,
            "float": self.exact,
            "quantized": self.quantized,
            "image": picture(self.values),
        }


@dataclass
class Worst:
    """Collects, batch by batch, the samples whose leading metric fell most; those of equal loss as they come."""

    task: Task
    samples: list[Sample] = field(default_factory=list)
    seen: int = 0

    def add(self, values: NDArray[Any], targets: Any, exact: Outputs, quantized: Outputs) -> None:
        """A batch: its first input, targets, and the outputs of the float network and of the quantized one."""
        leading = self.task.metrics[0]
        counters = [leading.counter(), leading.counter()]
        if isinstance(counters[0], Averaged) and isinstance(counters[1], Averaged):
            for counter, outputs in zip(counters, (exact, quantized), strict=True):
                counter.add(outputs, targets)
            direction = counters[0].factor if leading.higher_is_better else -counters[0].factor
            lost = direction * (counters[0].per_sample() - counters[1].per_sample())
            answers = _answers(self.task, targets, exact, quantized)
            found = [
                Sample(self.seen + i, float(lost[i]), values[i].copy(), *answers(i))
                for i in np.argsort(-lost, kind="stable")[:MOST].tolist()
                if lost[i] > 0
            ]
            self.samples = nsmallest(MOST, [*self.samples, *found], key=lambda s: (-s.lost, s.index))
        self.seen += len(values)

    def to_json(self) -> list[dict[str, Any]]:
        """`worst` of statistics.json."""
        return [sample.to_json() for sample in self.samples]


def _answers(task: Task, targets: Any, exact: Outputs, quantized: Outputs) -> Callable[[int], tuple[str, str, str]]:
    """Target and answers of sample i in words."""
    words: Callable[[Any, Outputs], tuple[Sequence[str], Sequence[str]]] | None = getattr(task, "answers", None)
    if words is None:
        return lambda i: ("", "", "")
    expected, first = words(targets, exact)
    _, second = words(targets, quantized)
    return lambda i: (expected[i], first[i], second[i])


def picture(values: NDArray[Any]) -> str | None:
    """An image (C, H, W) or (H, W, C) of one or three channels as a data URL, from its least to its largest value.

    None for anything else, and for values that are not finite.
    """
    from PIL import Image

    if values.ndim == 3 and values.shape[0] in (1, 3):
        values = np.moveaxis(values, 0, -1)
    if values.ndim != 3 or values.shape[-1] not in (1, 3) or min(values.shape[:2]) < 2 or not np.isfinite(values).all():
        return None
    low, high = float(values.min()), float(values.max())
    grey = np.rint(255 * (values.astype(np.float64) - low) / ((high - low) or 1)).astype(np.uint8)
    image = Image.fromarray(grey[..., 0] if grey.shape[-1] == 1 else grey)
    image.thumbnail((WIDEST, WIDEST))
    content = BytesIO()
    image.save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def by_class(
    counters: Mapping[str, Mapping[str, Counter]], exact: str, quantized: str, leading: str | None
) -> list[dict[str, Any]] | None:
    """`by_class` of report.json: the leading metric of every class, float and quantized; None without classes.

    counters: by executor and metric. exact, quantized: the executors that are compared.
    """
    known, seen = counters.get(exact, {}), counters.get(quantized, {})
    labels, first, second = known.get(ONE_ANSWER), known.get(leading or ""), seen.get(leading or "")
    if not (isinstance(labels, OneAnswer) and isinstance(first, Averaged) and isinstance(second, Averaged)):
        return None
    own = np.concatenate(labels.parts)
    if own.shape != first.per_sample().shape:
        return None
    return [
        {
            "class": int(label),
            "samples": int((own == label).sum()),
            "float": round(first.factor * float(first.per_sample()[own == label].mean()), 4),
            "quantized": round(first.factor * float(second.per_sample()[own == label].mean()), 4),
        }
        for label in np.unique(own)
    ]
