"""Plans judged by one metric beside the float network, each once, on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from pow2quant.backends.base import SILENT
from pow2quant.runs import Job
from pow2quant.runs.judging import interval_of_change
from pow2quant.runs.unfinished import Numbers
from pow2quant.tasks.base import Counter, Metric
from pow2quant.tasks.judging import value_of


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
