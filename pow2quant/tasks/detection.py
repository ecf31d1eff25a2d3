"""Detection, and everything else whose targets only the user's own metric reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pow2quant.tasks.base import Metric, Shapes


@dataclass(frozen=True)
class Detection:
    """Targets of any form, such as a list of dictionaries of boxes; the user's metric reads them."""

    shapes: Shapes
    name: str = "detection"
    loss: str = ""
    metrics: tuple[Metric, ...] = ()
    diagnostics: tuple[Metric, ...] = ()

    def check(self, targets: Any, samples: int, where: str) -> Any:
        return targets

    @classmethod
    def fits(cls, targets: Any, shapes: Shapes) -> bool:
        """Whether the data look like this task: any targets do."""
        return targets is not None
