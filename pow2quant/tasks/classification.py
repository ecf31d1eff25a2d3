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
    """Class indices (N,), one-hot rows or probabilities (N, C); logits (N, C), or one of two classes (N, 1)."""

    shapes: Shapes
    name: str = "classification"

    @property
    def loss(self) -> str:
        return "BCEWithLogitsLoss" if self.shapes[0][-1] == 1 else "CrossEntropyLoss"

    @property
    def classes(self) -> int:
        """Of one logit there are two."""
        return max(2, self.shapes[0][-1])

    @property
    def arguments(self) -> dict[str, Any]:
        """Of metrics of torchmetrics."""
        return {"task": "binary" if self.shapes[0][-1] == 1 else "multiclass", "num_classes": self.classes}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        top1 = Metric("top1", partial(Averaged, hits, 100), unit="%", key="accuracy")
        top5 = Metric("top5", partial(Averaged, partial(hits, top=5), 100), unit="%", key="accuracy_top5")
        return (top1, top5) if self.classes > 5 else (top1,)

    @property
    def diagnostics(self) -> tuple[Metric, ...]:
        return (
            Metric("tied_logits", partial(Averaged, ties, 100), unit="%"),
            Metric(ONE_ANSWER, partial(OneAnswer, indices), unit="%"),
        )

    def answers(self, targets: Array, outputs: Outputs) -> tuple[list[str], list[str]]:
        """The class of each target, and that of each output (the first of equal ones), in words."""
        logits = outputs[0]
        chosen = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)
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
        if not isinstance(targets, Tensor) or len(shapes[0]) != 1:
            return False
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


def hits(outputs: Outputs, targets: Array, top: int = 1) -> Array:
    """Whether the class of each sample is among its `top` largest logits (the first of equal ones)."""
    logits = outputs[0]
    labels = indices(targets)
    if logits.shape[1] == 1:
        single: Array = (logits[:, 0] > 0) == (labels > 0)
        return single
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top]
    found: Array = (order == labels[:, None]).any(1)
    return found


def ties(outputs: Outputs, targets: Array) -> Array:
    """Whether the largest logit is not alone: which class is named then is an accident."""
    logits = outputs[0]
    found: Array = (logits == logits.max(1, keepdims=True)).sum(1) > 1
    return found
