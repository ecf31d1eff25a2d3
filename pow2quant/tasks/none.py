"""No task: data without targets. What is said is whether executors agree, and how far the outputs are from float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pow2quant.tasks.base import Metric, Shapes


@dataclass(frozen=True)
class Unlabelled:
    """No targets; what the data have beside their inputs is not read."""

    shapes: Shapes
    name: str = "none"
    loss: str = ""
    metrics: tuple[Metric, ...] = ()
    diagnostics: tuple[Metric, ...] = ()

    def check(self, targets: Any, samples: int, where: str) -> Any:
        return None

    @classmethod
    def fits(cls, targets: Any, shapes: Shapes) -> bool:
        """Whether the data look like this task."""
        return targets is None
