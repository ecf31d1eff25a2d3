"""Multi-label classification: any number of classes for each sample; F1 and the share of labels that are right."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from pow2quant.tasks.base import Array, Averaged, Metric, Outputs, Ratios, Shapes, tensor_of, wrong


@dataclass(frozen=True)
class MultiLabel:
    """Targets 0 or 1 for every class (N, C); logits (N, C), or probabilities behind a sigmoid.

    threshold: above which an output names its class, 0.5 behind a sigmoid.
    """

    shapes: Shapes
    name: str = "multi-label"
    diagnostics: tuple[Metric, ...] = ()
    threshold: float = 0.0

    @property
    def loss(self) -> str:
        return "BCELoss" if self.threshold else "BCEWithLogitsLoss"

    @property
    def arguments(self) -> dict[str, Any]:
        """Of metrics of torchmetrics."""
        return {"task": "multilabel", "num_labels": self.shapes[0][-1]}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("f1", partial(Ratios, partial(overlaps, threshold=self.threshold)), unit="%"),
            Metric("label_accuracy", partial(Averaged, partial(right, threshold=self.threshold), 100), unit="%"),
        )

    def check(self, targets: Any, samples: int, where: str) -> Any:
        expected = f"0 or 1 for each of {self.shapes[0][-1]} classes, {(samples, *self.shapes[0])}"
        labels = tensor_of(targets, where, expected)
        if tuple(labels.shape) != (samples, *self.shapes[0]) or not bool(((labels == 0) | (labels == 1)).all()):
            raise wrong(labels, where, expected)
        return labels.float()

    @classmethod
    def fits(cls, targets: Any, shapes: Shapes) -> bool:
        """Whether the data look like this task."""
        if not isinstance(targets, Tensor) or len(shapes[0]) != 1 or tuple(targets.shape[1:]) != shapes[0]:
            return False
        return bool(((targets == 0) | (targets == 1)).all())


def right(outputs: Outputs, targets: Array, threshold: float = 0.0) -> Array:
    """Whether each label is right."""
    found: Array = (outputs[0] > threshold) == (targets > 0.5)
    return found


def overlaps(outputs: Outputs, targets: Array, threshold: float = 0.0) -> tuple[Array, Array]:
    """2 TP and 2 TP + FP + FN of each sample over all classes, (N, 1)."""
    named, meant = outputs[0] > threshold, targets > 0.5
    both, either = (named & meant).sum(1, keepdims=True), named.sum(1, keepdims=True) + meant.sum(1, keepdims=True)
    return 2 * both, either
