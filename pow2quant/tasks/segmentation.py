"""Segmentation: one class for each pixel (or token); mean intersection over union, and pixel accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from pow2quant.errors import DataError
from pow2quant.tasks.base import Array, Metric, Outputs, Ratios, Shapes, tensor_of, wrong

IGNORED, LEFT_OUT = 255, -100
"""The class of pixels that do not count, besides negative ones; and how the losses of torch know it."""


@dataclass(frozen=True)
class Segmentation:
    """Masks of class indices (N, …); logits (N, C, …), or (N, …, C), or one of two classes (N, 1, …).

    threshold: above which a single output says the second class, 0.5 behind a sigmoid.
    """

    shapes: Shapes
    name: str = "segmentation"
    diagnostics: tuple[Metric, ...] = ()
    threshold: float = 0.0

    @property
    def loss(self) -> str:
        if self.shapes[0][:1] not in ((), (1,)):
            return "CrossEntropyLoss"
        return "BCELoss" if self.threshold else "BCEWithLogitsLoss"

    @property
    def arguments(self) -> dict[str, Any]:
        """Of metrics of torchmetrics: for logits (N, C, …)."""
        classes = max(1, *self.shapes[0][:1])
        of_two = "binary" if classes == 1 else "multiclass"
        return {"task": of_two, "num_classes": max(2, classes), "ignore_index": LEFT_OUT}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("miou", partial(Ratios, partial(unions, threshold=self.threshold)), unit="%"),
            Metric("pixel_accuracy", partial(Ratios, partial(right_pixels, threshold=self.threshold)), unit="%"),
        )

    def check(self, targets: Any, samples: int, where: str) -> Any:
        shape = self.shapes[0]
        expected = f"masks of class indices {(samples, *shape[1:])}"
        masks = tensor_of(targets, where, expected)
        if len(shape) < 2:
            raise DataError(f"{where}: outputs of the network are {(samples, *shape)}; segmentation needs (N, C, …)")
        masks = masks.argmax(1) if _is_one_hot(masks, shape) else masks
        if masks.ndim == len(shape) + 1 and masks.shape[1] == 1:
            masks = masks[:, 0]
        if masks.is_floating_point() and not bool((masks == masks.round()).all()):
            raise wrong(masks, where, expected)
        if tuple(masks.shape) not in ((samples, *shape[1:]), (samples, *shape[:-1])):
            raise wrong(masks, where, expected)
        classes = max(2, shape[0] if tuple(masks.shape[1:]) == shape[1:] else shape[-1])
        masks = masks.long()
        odd = masks[(masks >= classes) & (masks != IGNORED)]
        if len(odd):
            raise DataError(f"{where}: class {int(odd[0])} in a mask; legal: 0 to {classes - 1}, {IGNORED} is ignored")
        return masks.masked_fill((masks < 0) | ((masks >= classes) & (masks == IGNORED)), LEFT_OUT)

    @classmethod
    def fits(cls, targets: Any, shapes: Shapes) -> bool:
        """Whether the data look like this task."""
        if not isinstance(targets, Tensor) or len(shapes[0]) < 2:
            return False
        if _is_one_hot(targets, shapes[0]):
            return True
        masks = targets[:, 0] if targets.ndim == len(shapes[0]) + 1 and targets.shape[1] == 1 else targets
        if tuple(masks.shape[1:]) not in (shapes[0][1:], shapes[0][:-1]):
            return False
        whites = (1, IGNORED) if shapes[0][0] == 1 else (1,)
        return not masks.is_floating_point() or any(bool(((masks == 0) | (masks == v)).all()) for v in whites)


def refuse_pictures(targets: Any, shapes: Shapes) -> None:
    """Raises DataError for masks of two classes as pictures have them, where white stands for the second class."""
    if not isinstance(targets, Tensor) or shapes[0][:1] not in ((1,), (2,)) or not Segmentation.fits(targets, shapes):
        return
    if bool((targets == IGNORED).any()) and not bool((targets == 1).any()):
        raise DataError(
            f"the masks of the first batch hold 0 and {IGNORED}, and no 1: divide them by {IGNORED} if that is the "
            f"second class; write {LEFT_OUT} for pixels that do not count"
        )


def _is_one_hot(masks: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether every pixel has a channel for each class, (N, C, …), of which one is 1 and the others are 0."""
    if tuple(masks.shape[1:]) != shape or shape[0] < 2:
        return False
    return bool(((masks == 0) | (masks == 1)).all() and (masks.sum(1) == 1).all())


def named_classes(logits: Array, targets: Array, threshold: float = 0.0) -> tuple[Array, int]:
    """The class of each pixel, and how many classes there are."""
    axis = 1 if logits.shape[:1] + logits.shape[2:] == targets.shape else logits.ndim - 1
    if logits.shape[axis] == 1:
        return (np.squeeze(logits, axis) > threshold).astype(np.int64), 2
    return logits.argmax(axis), logits.shape[axis]


def unions(outputs: Outputs, targets: Array, threshold: float = 0.0) -> tuple[Array, Array]:
    """Intersection and union of masks and results, (N, C) pixels of each sample and class."""
    named, classes = named_classes(outputs[0], targets, threshold)
    counted = (targets >= 0) & (targets < classes)

    def pixels(of: Array, where: Array) -> Array:
        sample = np.arange(len(targets)).reshape(-1, *(1,) * (targets.ndim - 1))
        found = (sample * classes + of.astype(np.int64))[where]
        return np.bincount(found, minlength=len(targets) * classes).reshape(len(targets), classes)

    both = pixels(targets, counted & (named == targets))
    return both, pixels(targets, counted) + pixels(named, counted) - both


def right_pixels(outputs: Outputs, targets: Array, threshold: float = 0.0) -> tuple[Array, Array]:
    """How many pixels have the right class, and how many count, (N, 1)."""
    named, classes = named_classes(outputs[0], targets, threshold)
    counted = ((targets >= 0) & (targets < classes)).reshape(len(targets), -1)
    right = counted & (named == targets).reshape(len(targets), -1)
    return right.sum(1, keepdims=True), counted.sum(1, keepdims=True)
