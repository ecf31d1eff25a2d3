"""Plans judged by one metric beside the float network, each once, on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pow2quant.backends.base import SILENT
from pow2quant.errors import ConfigError
from pow2quant.runs import Job
from pow2quant.runs.judging import interval_of_change
from pow2quant.runs.unfinished import Numbers, Unfinished, fingerprint_of
from pow2quant.tasks.base import Counter, Metric
from pow2quant.tasks.judging import SQNR, leading, value_of


@dataclass(frozen=True)
class Judged:
    """A metric, and the 95 % interval of its change against the float network; None where it has none."""

    value: float
    interval: tuple[float, float] | None


@dataclass
class Judge:
    """numbers: what was measured, by name; what is known is not measured again."""

    job: Job
    metric: Metric
    numbers: Numbers

    @classmethod
    def of(cls, job: Job, name: str | None, unfinished: Unfinished) -> Judge:
        """By the metric with this name, by default the task's leading one. Raises ConfigError for an unknown one."""
        known = {m.name: m for m in (*job.task.metrics, SQNR)}
        if name is not None and name not in known:
            raise ConfigError(f"constraint: {name} is no metric of {job.task.name}; legal: {', '.join(known)}")
        metric = leading(job.task) if name is None else known[name]
        return cls(job, metric, unfinished.numbers(lambda: _fingerprint(job)))

    @cached_property
    def _float(self) -> Counter:
        return self.job.counted(self.job.model, self.metric)

    @property
    def original(self) -> float:
        """The float network's metric."""
        return self.numbers.get("float", lambda: value_of(self.metric, self._float))

    def judged(self, name: str, make: Callable[[], nn.Module]) -> Judged:
        """The metric of a network, which is only made where it is not known."""
        found: list[Counter] = []

        def counter() -> Counter:
            if not found:
                found.append(replace(self.job, progress=SILENT).counted(make(), self.metric))
            return found[0]

        def end(which: int) -> float:
            interval = interval_of_change(self._float, counter(), self.metric)
            return math.nan if interval is None else interval[which]

        value = self.numbers.get(name, lambda: value_of(self.metric, counter()))
        low, high = (self.numbers.get(f"{name}, end {i}", lambda i=i: end(i)) for i in (0, 1))  # type: ignore[misc]
        return Judged(value, None if math.isnan(low) else (low, high))


def _fingerprint(job: Job) -> str:
    """What every number depends on."""
    tests = job.sample(job.config.ptq.max_eval_batches).batches
    tensors = (x for batch in tests for x in pytree.tree_leaves(batch) if isinstance(x, Tensor))
    return fingerprint_of([job.fingerprint()], tensors)
