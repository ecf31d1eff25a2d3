"""Differences that are measured on the same images: their mean, its standard error, and an interval."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

NORMAL_95 = 1.959964
"""Standard deviations of a normal distribution around its mean that hold 95 % of it."""


def paired(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard error of differences of the same images."""
    count = len(differences)
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share observed in `count` samples, count >= 1 (Wilson, 1927).

    0.9 of 100 gives (0.826, 0.945).
    """
    z = NORMAL_95**2 / count
    middle = (share + z / 2) / (1 + z)
    half = NORMAL_95 / (1 + z) * math.sqrt(share * (1 - share) / count + z / (4 * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences, (N,) with N >= 1, each within [-1, 1].

    For hits less hits, -1, 0 and 1, it is the adjusted Wald interval of Agresti and Min (2005, "Simple improved
    confidence intervals for comparing matched proportions"), which adds half an image to each of the four outcomes.
    So it is no point where no image changed: 450 zeros give (-0.0043, 0.0043).
    """
    count = len(differences) + 2
    mean = float(differences.sum(dtype=np.float64)) / count
    squares = float(np.square(differences, dtype=np.float64).sum()) + 1
    half = NORMAL_95 * math.sqrt(max(squares / count - mean**2, 0.0) / count)
    return max(mean - half, -1.0), min(mean + half, 1.0)
