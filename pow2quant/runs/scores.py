"""Accuracies and quantization noise, counted while the executors run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pow2quant.validation.agreement import Executor

Arrays = Sequence[NDArray[np.float32]]


@dataclass
class Scores:
    """Top-1 and top-5 hits by executor, and the power of the quantization noise, while batches stream by."""

    classes: int = 0
    samples: int = 0
    hits: dict[str, list[int]] = field(default_factory=dict)
    tied: dict[str, int] = field(default_factory=dict)
    signal: float = 0.0
    noise: float = 0.0
    labels: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    expected: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    def stream(self, batches: Iterable[tuple[Tensor, Tensor]], network: Callable[[Arrays], Arrays]) -> Iterator[Arrays]:
        """Yields the images; notes labels and float logits for what runs on them next."""
        for images, labels in batches:
            inputs = [images.numpy()]
            self.labels, self.expected = labels.numpy(), network(inputs)[0]
            self.classes = self.expected.shape[-1]
            self.samples += len(self.labels)
            self._count("float", self.expected)
            self.signal += float(np.square(self.expected, dtype=np.float64).sum())
            yield inputs
        self.labels = np.empty(0, np.int64)  # what runs from now on is no evaluation

    def watch(self, executor: Executor, noise: bool = False) -> Executor:
        """The executor, its hits counted as it runs."""

        def run(batch: Arrays) -> Arrays:
            outputs = executor.run(batch)
            if not self.labels.size:
                return outputs
            self._count(executor.name, outputs[0])
            if noise:
                self.noise += float(np.square(outputs[0] - self.expected, dtype=np.float64).sum())
            return outputs

        return replace(executor, run=run)

    def _count(self, name: str, logits: NDArray[np.float32]) -> None:
        if logits.ndim != 2:
            return
        labels = self.labels[: len(logits), None]  # a slow executor may have been given fewer
        order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        best = order == labels
        first = np.take_along_axis(logits, order[:, :2], 1)
        tied = int((first[:, 0] == first[:, -1]).sum()) if first.shape[1] > 1 else 0
        self.tied[name] = self.tied.get(name, 0) + tied
        hits = self.hits.setdefault(name, [0, 0])
        hits[0] += int(best[:, 0].sum())
        hits[1] += int(best.any(1).sum())

    def accuracy(self, name: str, top: int = 1) -> float | None:
        """Per cent of samples whose label is among the `top` (1 or 5) largest logits."""
        hits = self.hits.get(name)
        return None if hits is None or not self.samples else round(100 * hits[top == 5] / self.samples, 4)

    def ties(self, name: str) -> float | None:
        """Per cent of samples whose largest logit is not alone: which class is named then is an accident."""
        return round(100 * self.tied[name] / self.samples, 4) if name in self.tied and self.samples else None

    @property
    def sqnr_db(self) -> float | None:
        """Logits of the simulation against the float network's, in dB; None where they are equal."""
        return round(10 * float(np.log10(self.signal / self.noise)), 3) if self.noise and self.signal else None


def accuracies(scores: Scores, **executors: str) -> dict[str, float | None]:
    """`<key>_accuracy` of executors by key; top-5 too, where there are more than 5 classes."""
    found = {f"{key}_accuracy": scores.accuracy(name) for key, name in executors.items()}
    if scores.classes > 5:
        found |= {f"{key}_accuracy_top5": scores.accuracy(name, 5) for key, name in executors.items()}
    return found
