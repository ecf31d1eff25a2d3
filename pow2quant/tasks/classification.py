"""Classification: one class for each sample; top-1 and, beyond five classes, top-5."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from pow2quant.reading import check_labels
from pow2quant.tasks.base import ONE_ANSWER, Array, Averaged, Metric, OneAnswer, Outputs, Shapes, tensor_of, wrong


@dataclass(frozen=True)
class Classification:
    """Class indices (N,), one-hot rows or probabilities (N, C); logits (N, C), or one of two classes (N, 1) or (N,).

    threshold: above which a single output says the second class, 0.5 behind a sigmoid.
    """

    shapes: Shapes
    name: str = "classification"
    threshold: float = 0.0

    @property
    def outputs(self) -> int:
        """How many outputs a sample has."""
        return self.shapes[0][-1] if self.shapes[0] else 1

    @property
    def loss(self) -> str:
        return "CrossEntropyLoss" if self.outputs > 1 else "BCELoss" if self.threshold else "BCEWithLogitsLoss"

    @property
    def classes(self) -> int:
        """Of one output there are two."""
        return max(2, self.outputs)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of metrics of torchmetrics."""
        return {"task": "binary" if self.outputs == 1 else "multiclass", "num_classes": self.classes}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        top1, top5 = (partial(hits, top=n, threshold=self.threshold) for n in (1, 5))
        first = Metric("top1", partial(Averaged, top1, 100), unit="%", key="accuracy")
        second = Metric("top5", partial(Averaged, top5, 100), unit="%", key="accuracy_top5")
        return (first, second) if self.classes > 5 else (first,)

    @property
    def diagnostics(self) -> tuple[Metric, ...]:
        return (
            Metric("tied_logits", partial(Averaged, ties, 100), unit="%"),
            Metric(ONE_ANSWER, partial(OneAnswer, indices), unit="%"),
        )

    def answers(self, targets: Array, outputs: Outputs) -> tuple[list[str], list[str]]:
        """The class of each target, and that of each output (the first of equal ones), in words."""
        logits = _rows(outputs)
        chosen = logits[:, 0] > self.threshold if logits.shape[1] == 1 else logits.argmax(1)
        return [str(int(c)) for c in indices(targets)], [str(int(c)) for c in chosen]

    def check(self, targets: Any, samples: int, where: str) -> Any:
        expected = f"{samples} class indices, or {samples} rows of {self.classes} probabilities"
        labels = tensor_of(targets, where, expected)
        of_classes = tuple(labels.shape) == (samples, self.classes)
        if of_classes and self.classes > 1 and (labels.is_floating_point() or _are_probabilities(labels)):
            return labels.float()
        if tuple(labels.shape) == (samples, 1):
            labels = labels[:, 0]
        if tuple(labels.shape) != (samples,) or not _are_whole(labels):
            raise wrong(labels, where, expected)
        check_labels(labels, self.classes, where)
        return labels.long()

    @classmethod
    def fits(cls, targets: Any, shapes: Shapes) -> bool:
        """Whether the data look like this task."""
        if not isinstance(targets, Tensor) or len(shapes[0]) > 1:
            return False
        shapes = [shapes[0] or (1,)]
        if targets.ndim == 2 and targets.shape[1:] == shapes[0] and shapes[0][0] > 1:
            return _are_probabilities(targets)
        indices = targets.ndim == 1 or (targets.ndim == 2 and targets.shape[1] == 1)
        if not indices or not _are_whole(targets):
            return False
        return shapes[0][0] > 1 or (not targets.is_floating_point() and int(targets.max()) <= 1)


def _are_whole(labels: Tensor) -> bool:
    """Whether these are class indices, perhaps written as floats."""
    return not labels.is_floating_point() or bool((labels == labels.round()).all())


def _are_probabilities(rows: Tensor) -> bool:
    """Whether each row (N, C) sums to 1, as one-hot ones do."""
    return bool((rows >= 0).all() and ((rows.sum(1) - 1).abs() < 1e-4).all())


def indices(targets: Array) -> Array:
    """The class of each sample, (N,); of probabilities the most likely one."""
    found: Array = targets.argmax(1) if targets.ndim == 2 else targets
    return found


def _rows(outputs: Outputs) -> Array:
    """The logits (N, C)."""
    return outputs[0].reshape(len(outputs[0]), -1)


def hits(outputs: Outputs, targets: Array, top: int = 1, threshold: float = 0.0) -> Array:
    """Whether the class of each sample is among its `top` largest logits (the first of equal ones)."""
    logits = _rows(outputs)
    labels = indices(targets)
    if logits.shape[1] == 1:
        single: Array = (logits[:, 0] > threshold) == (labels > 0)
        return single
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top]
    found: Array = (order == labels[:, None]).any(1)
    return found


def ties(outputs: Outputs, targets: Array) -> Array:
    """Whether the largest logit is not alone: which class is named then is an accident."""
    logits = _rows(outputs)
    found: Array = (logits == logits.max(1, keepdims=True)).sum(1) > 1
    return found
