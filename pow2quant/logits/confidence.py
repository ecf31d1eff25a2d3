"""How well confidence tells accuracy: bins of confidence, and the calibration error."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Of confidence, in the calibration figure and its error."""


def bins(confidence: NDArray[np.float32]) -> NDArray[np.int64]:
    """Which of the equal bins of [0, 1] each lies in."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def calibration_error(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): |accuracy - confidence| over bins, by their images."""
    of = bins(confidence)
    off: Iterable[float] = (abs(float((right[of == b] - confidence[of == b]).sum())) for b in range(BINS))
    return sum(off) / len(right)
