"""Regression: numbers for each sample; mean absolute error, and R2."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from pow2quant.tasks.base import Array, Averaged, Metric, Outputs, Shapes, tensor_of, wrong


@dataclass(frozen=True)
class Regression:
    """Targets of the outputs' shape (N, …); (N,) for one number (N, 1)."""

    shapes: Shapes
    name: str = "regression"
    loss: str = "MSELoss"
    diagnostics: tuple[Metric, ...] = ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("mae", partial(Averaged, absolute_errors), higher_is_better=False),
            Metric("rmse", Rmse, higher_is_better=False),
            Metric("r2", R2),
        )

    def check(self, targets: Any, samples: int, where: str) -> Any:
        shape = (samples, *self.shapes[0])
        numbers = tensor_of(targets, where, f"numbers {shape}")
        if numbers.numel() != int(np.prod(shape)) or len(numbers) != samples:
            raise wrong(numbers, where, f"numbers {shape}")
        return numbers.float().reshape(shape)

    @classmethod
    def fits(cls, targets: Any, shapes: Shapes) -> bool:
        """Whether the data look like this task."""
        return isinstance(targets, Tensor) and targets.numel() == len(targets) * int(np.prod(shapes[0]))


def absolute_errors(outputs: Outputs, targets: Array) -> Array:
    """|y - t| of every number."""
    return np.abs(outputs[0].astype(np.float64) - targets)


class Rmse:
    """The root of the mean square error of all numbers."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, outputs: Outputs, targets: Array) -> None:
        self.total += float(np.square(outputs[0].astype(np.float64) - targets).sum())
        self.count += targets.size

    def value(self) -> float | None:
        return float(f"{np.sqrt(self.total / self.count):.6g}") if self.count else None


class R2:
    """1 - sum (y - t)^2 / sum (t - mean t)^2, the mean over the outputs of a sample whose targets vary."""

    def __init__(self) -> None:
        self.count = 0
        self.errors = self.total = self.squares = np.zeros(())

    def add(self, outputs: Outputs, targets: Array) -> None:
        t = targets.reshape(len(targets), -1).astype(np.float64)
        y = outputs[0].reshape(len(targets), -1)
        self.count += len(t)
        self.errors = self.errors + np.square(y - t).sum(0)
        self.total = self.total + t.sum(0)
        self.squares = self.squares + np.square(t).sum(0)

    def value(self) -> float | None:
        if not self.count:
            return None
        spread = self.squares - self.total**2 / self.count
        varied = spread > 1e-12 * np.maximum(self.squares, 1e-30)
        return round(float((1 - self.errors[varied] / spread[varied]).mean()), 6) if varied.any() else None
