"""Networks that name classes themselves, as those that end in argmax do: judged as if they gave one logit per class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np

from pow2quant.tasks.base import ONE_ANSWER, Array, Averaged, Counter, Metric, Outputs, Ratios, Task

JUDGED = ("classification", "segmentation")
"""The tasks of class indices."""


@dataclass(frozen=True)
class Named:
    """A task of logits (N, C, …) for outputs (N, …) that are class indices. classes: C. kept: outputs are (N, 1, …)."""

    task: Task
    classes: int
    kept: bool = False

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def loss(self) -> str:
        return self.task.loss

    @property
    def arguments(self) -> dict[str, Any]:
        """Of metrics of torchmetrics, which take class indices, too."""
        found: dict[str, Any] = getattr(self.task, "arguments", {})
        return found

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Without top-5: only one class is named."""
        known = (metric for metric in self.task.metrics if metric.name != "top5")
        return tuple(replace(m, counter=partial(_counter, m.counter, self.classes, self.kept)) for m in known)

    @property
    def diagnostics(self) -> tuple[Metric, ...]:
        return tuple(metric for metric in self.task.diagnostics if metric.name == ONE_ANSWER)

    def check(self, targets: Any, samples: int, where: str) -> Any:
        """See `Task.check`."""
        return self.task.check(targets, samples, where)


def _counter(make: Callable[[], Counter], classes: int, kept: bool) -> Counter:
    counter = make()
    assert isinstance(counter, Averaged | Ratios)
    of = counter.of

    def of_indices(outputs: Outputs, targets: Any) -> Any:
        return of([one_hot(outputs[0][:, 0] if kept else outputs[0], classes), *outputs[1:]], targets)

    return cast(Counter, replace(cast(Any, counter), of=of_indices))


def one_hot(indices: Array, classes: int) -> Array:
    """Class indices (N, …) as ones among zeros, (N, C, …)."""
    columns = np.arange(classes).reshape(-1, *(1,) * (indices.ndim - 1))
    found: Array = (indices[:, None] == columns).astype(np.float32)
    return found
