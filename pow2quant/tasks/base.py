"""What a task is, and what its metrics count with. Everything outside this package knows only this file.

A task is made for a network by the shapes of its outputs for one sample, such as `((10,),)`; its methods see batches:
outputs are float32 arrays (N, …), targets what the data give beside the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pow2quant.errors import DataError

Array = NDArray[Any]
Outputs = Sequence[NDArray[np.float32]]
Shapes = Sequence[tuple[int, ...]]


class Counter(Protocol):
    """Counts one metric of one executor while batches stream by."""

    def add(self, outputs: Outputs, targets: Any) -> None:
        """A batch of outputs and their targets, arrays in place of tensors."""
        ...

    def value(self) -> float | None:
        """The metric over all batches so far; None where it has no value, as over none."""
        ...


@dataclass(frozen=True)
class Metric:
    """A number by which a network is judged. counter: makes a fresh one; unit: behind the number, such as `%`.

    key: of report.json's `initial_<key>`, `final_<key>`, … where it has such keys. guessed: nothing said which way is
    good.
    """

    name: str
    counter: Callable[[], Counter]
    higher_is_better: bool = True
    unit: str = ""
    key: str = ""
    guessed: bool = False

    def text(self, value: float | None) -> str:
        """The value as it is shown: two decimals of per cent or dB, four digits of all else."""
        if value is None:
            return "-"
        return f"{value:.2f} {self.unit}" if self.unit else f"{value:.4g}"

    def better(self, one: float, other: float) -> bool:
        """Whether the first value is better."""
        return one > other if self.higher_is_better else one < other


class Task(Protocol):
    """What a network is for.

    metrics: the first one leads. diagnostics: measured beside them, without a good direction. loss: the default
    criterion, a name that torch knows. A task may also have `answers(targets, outputs)`: of a batch the targets and the
    outputs in words, for the report; and `arguments`, with which metrics of torchmetrics are made for it.
    """

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    def diagnostics(self) -> tuple[Metric, ...]: ...

    @property
    def loss(self) -> str: ...

    def check(self, targets: Any, samples: int, where: str) -> Any:
        """Targets as metrics and loss read them. Raises DataError, which begins with `where`, for others."""
        ...


ONE_ANSWER = "one_answer"
"""The diagnostic of tasks with labels: what one answer for every sample would get."""


@dataclass
class OneAnswer:
    """Whether each sample's label is the most frequent one, `labels(targets)` being (N,) integers."""

    labels: Callable[[Any], Array]
    parts: list[Array] = field(default_factory=list)

    def add(self, outputs: Outputs, targets: Any) -> None:
        self.parts.append(self.labels(targets))

    def value(self) -> float | None:
        return round(100 * float(self.per_sample().mean()), 4) if self.parts else None

    def per_sample(self) -> Array:
        """1 or 0 for each sample, (N,), in order."""
        labels = np.concatenate(self.parts)
        values, counts = np.unique(labels, return_counts=True)
        found: Array = (labels == values[counts.argmax()]) * 1.0
        return found


@dataclass
class Averaged:
    """The mean of `of(outputs, targets)`, one row (N, …) per sample, times `factor`; keeps each sample's own mean."""

    of: Callable[[Outputs, Any], Array]
    factor: float = 1.0
    parts: list[Array] = field(default_factory=list)

    def add(self, outputs: Outputs, targets: Any) -> None:
        found = self.of(outputs, targets)
        self.parts.append(found.reshape(len(found), -1).mean(1, dtype=np.float64))

    def value(self) -> float | None:
        return round(self.factor * float(self.per_sample().mean()), 4) if self.parts else None

    def per_sample(self) -> Array:
        """The mean of each sample, (N,), in order; without the factor."""
        return np.concatenate(self.parts)


@dataclass
class Ratios:
    """A sum over samples by another, the mean over columns (classes), times `factor`.

    of: of a batch (outputs, targets) the parts (N, C) of both sums. Columns whose lower sum is 0 do not count.
    """

    of: Callable[[Outputs, Any], tuple[Array, Array]]
    factor: float = 100.0
    parts: list[tuple[Array, Array]] = field(default_factory=list)

    def add(self, outputs: Outputs, targets: Any) -> None:
        self.parts.append(self.of(outputs, targets))

    def value(self) -> float | None:
        if not self.parts:
            return None
        upper, lower = (np.sum([part[i].sum(0) for part in self.parts], 0) for i in (0, 1))
        counted = lower > 0
        return round(self.factor * float((upper[counted] / lower[counted]).mean()), 4) if counted.any() else None

    def per_sample(self) -> Array:
        """Values of samples, (N,), whose mean is the ratio without the factor: it, linearized at all of them.

        v_i = r + N mean_c((a_ic - r_c b_ic) / B_c) of parts a and b, sums B, ratios r_c with mean r: the delta method
        (Cochran, Sampling Techniques, 1977, section 6.3), by which the variance of r is that of a mean of v.
        """
        upper, lower = (np.concatenate([part[i] for part in self.parts]).astype(np.float64) for i in (0, 1))
        counted = lower.sum(0) > 0
        upper, lower = upper[:, counted], lower[:, counted]
        ratios = upper.sum(0) / lower.sum(0)
        values: Array = ratios.mean() + len(upper) * ((upper - ratios * lower) / lower.sum(0)).mean(1)
        return values


def in_unit(counter: Counter | None) -> Array | None:
    """Values of samples, (N,), whose mean is a metric in its unit; None where it is no mean, or over nothing."""
    if isinstance(counter, Averaged | Ratios) and counter.value() is not None:
        values: Array = counter.factor * counter.per_sample()
        return values
    return None


def tensor_of(targets: Any, where: str, expected: str) -> Tensor:
    """The targets, if they are a tensor. Raises DataError that says what was expected."""
    if not isinstance(targets, Tensor):
        raise DataError(f"{where}: expected {expected}, got a {type(targets).__name__}")
    return targets


def wrong(targets: Tensor, where: str, expected: str) -> DataError:
    """The error for targets of another shape or type."""
    return DataError(f"{where}: expected {expected}, got {tuple(targets.shape)} {str(targets.dtype).partition('.')[2]}")
