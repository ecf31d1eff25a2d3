"""Judging one network by one metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from pow2quant.tasks.base import Array, Counter, Metric, Outputs, Task


class Noise:
    """What quantization adds to the first output: signal to noise in dB, None where nothing differs."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, outputs: Outputs, targets: NDArray[np.float32]) -> None:
        """A batch, and the first output of the float network for it."""
        self.signal += float(np.square(targets, dtype=np.float64).sum())
        self.noise += float(np.square(outputs[0] - targets, dtype=np.float64).sum())

    def value(self) -> float | None:
        """10 log10 of signal by noise."""
        return round(10 * float(np.log10(self.signal / self.noise)), 3) if self.noise and self.signal else None


SQNR = Metric("sqnr", Noise, unit="dB")
"""What leads where there are no targets."""

EQUAL_DB = 200.0
"""Stands for the SQNR of outputs that are equal to float."""


def leading(task: Task) -> Metric:
    """The metric that a network is judged by first."""
    return task.metrics[0] if task.metrics else SQNR


@torch.no_grad()
def counted(
    metric: Metric,
    run: Callable[..., Any],
    exact: Callable[..., Any],
    batches: Iterable[tuple[Any, Any]],
    device: torch.device,
) -> Counter:
    """A metric's counter behind `run`, which is called with a batch's tensors; `exact` is the float network."""
    counter = metric.counter()
    for batch, targets in batches:
        arguments = [x.to(device) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
        aim = targets if metric is not SQNR else _tensors(exact(*arguments))[0]
        counter.add([x.cpu().numpy() for x in _tensors(run(*arguments))], arrays_of(aim))
    return counter


def judged(
    metric: Metric,
    run: Callable[..., Any],
    exact: Callable[..., Any],
    batches: Iterable[tuple[Any, Any]],
    device: torch.device,
) -> float:
    """The metric itself. 0 over no batches."""
    return value_of(metric, counted(metric, run, exact, batches, device))


def value_of(metric: Metric, counter: Counter) -> float:
    """What a counter says; 0 over no batches."""
    value = counter.value()
    return (EQUAL_DB if metric is SQNR else 0.0) if value is None else value


def arrays_of(targets: Any) -> Array | Any:
    """Arrays in place of tensors, in whatever containers."""
    return pytree.tree_map(lambda x: x.cpu().numpy() if isinstance(x, Tensor) else x, targets)


def _tensors(results: Any) -> list[Tensor]:
    """The tensors of a result; bfloat16, of a network under autocast, as float32."""
    tensors = (x for x in pytree.tree_leaves(results) if isinstance(x, Tensor))
    return [x.float() if x.is_floating_point() else x for x in tensors]
