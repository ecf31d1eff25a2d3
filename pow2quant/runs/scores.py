"""What a task's metrics say of each executor, and quantization noise, counted while the executors run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pow2quant.frontends.batches import inputs
from pow2quant.runs.worst import Worst
from pow2quant.tasks.base import Averaged, Counter, Metric, Task, in_unit
from pow2quant.tasks.judging import Noise, arrays_of
from pow2quant.validation.agreement import Executor

Arrays = Sequence[NDArray[Any]]

FLOAT = "float"
"""What the float network is called among the executors."""


@dataclass
class Scores:
    """Counts by executor and metric, and the power of the quantization noise, while batches stream by.

    judged: the executors that are; None: all. limit, total: how many batches of the test data are looked at, and how
    many samples these have in all; None: all, and as many as are counted. worst: where samples go that lost by
    quantization. classes: the labels seen. digest: of inputs. expected: the float network's last outputs.
    """

    task: Task
    judged: Collection[str] | None = None
    limit: int | None = None
    total: int | None = None
    worst: Worst | None = None
    classes: set[int] = field(default_factory=set)
    digest: Any = field(default_factory=lambda: blake2b(digest_size=8))
    samples: int = 0
    counters: dict[str, dict[str, Counter]] = field(default_factory=dict)
    noise: Noise = field(default_factory=Noise)
    running: bool = False
    targets: Any = None
    expected: Arrays = ()

    def stream(self, batches: Iterable[tuple[Any, Any]], network: Callable[[Arrays], Arrays]) -> Iterator[Arrays]:
        """Yields the inputs; notes targets and float outputs for what runs on them next."""
        for batch, targets in batches:
            arrays = [x.numpy() for x in inputs(batch)]
            self.targets = arrays_of(targets)
            outputs = network(arrays)
            self.expected, self.running = outputs, True
            self.samples += len(arrays[0])
            self._note(arrays)
            self._count(FLOAT, outputs)
            yield arrays
        self.running = False  # what runs from now on is no evaluation

    def _note(self, arrays: Arrays) -> None:
        """What tells the samples from others."""
        for array in arrays:
            self.digest.update(np.ascontiguousarray(array).data)
        if isinstance(self.targets, np.ndarray) and self.targets.ndim == 1 and self.targets.dtype.kind in "iu":
            self.classes.update(np.unique(self.targets).tolist())

    def watch(self, executor: Executor, noise: bool = False) -> Executor:
        """The executor, judged as it runs. noise: it is the quantized network whose noise and losses are looked at."""
        if self.judged is not None and executor.name not in self.judged:
            return executor

        def run(batch: Arrays) -> Arrays:
            outputs = executor.run(batch)
            if self.running:
                self._count(executor.name, outputs)
                if noise:
                    self.noise.add(outputs, self.expected[0])
                    if self.worst is not None and self.targets is not None:
                        self.worst.add(batch[0], self.targets, self.expected, outputs)
            return outputs

        return replace(executor, run=run)

    def _count(self, name: str, outputs: Arrays) -> None:
        if self.targets is None:
            return
        metrics = (*self.task.metrics, *self.task.diagnostics)
        counters = self.counters.setdefault(name, {m.name: m.counter() for m in metrics})
        for counter in counters.values():
            counter.add(outputs, self.targets)

    def value(self, executor: str, metric: Metric) -> float | None:
        """What a metric says of an executor; None where it was not judged."""
        counters = self.counters.get(executor)
        return None if counters is None else counters[metric.name].value()

    def keyed(self, **executors: str) -> dict[str, float | None]:
        """`<when>_<key>` for executors by when, of the metrics that have keys in report.json."""
        return {
            f"{when}_{metric.key}": self.value(name, metric)
            for metric in self.task.metrics
            if metric.key
            for when, name in executors.items()
        }

    def metrics(self, **executors: str) -> dict[str, dict[str, Any]]:
        """By metric: its direction and unit, and the values of executors by key; the leading metric first."""
        return {
            metric.name: {
                **{key: self.value(name, metric) for key, name in executors.items()},
                "higher_is_better": metric.higher_is_better,
                "unit": metric.unit,
            }
            for metric in self.task.metrics
        }

    def diagnostic(self, executor: str, name: str) -> float | None:
        """What one of the task's diagnostics says of an executor; None where the task has no such."""
        return next((self.value(executor, m) for m in self.task.diagnostics if m.name == name), None)

    @property
    def hits(self) -> bool:
        """Whether the leading metric is a mean of shares of its samples, in per cent."""
        metric = self.task.metrics[0] if self.task.metrics else None
        return metric is not None and metric.unit == "%" and isinstance(metric.counter(), Averaged)

    def per_sample(self, executor: str) -> NDArray[np.float64] | None:
        """Values of samples, (N,), whose mean is the leading metric, in its unit; None where there are none."""
        leading = self.task.metrics[0].name if self.task.metrics else ""
        return in_unit(self.counters.get(executor, {}).get(leading))
