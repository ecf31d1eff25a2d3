"""Which correction to take, judged on calibration images that it was not fitted to, and without their labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from pow2quant.errors import DataError
from pow2quant.logits.cat import Correction, Logits, fit

HELD_OUT = 0.25
"""Share of the calibration images that judge and do not fit."""


class Candidate(NamedTuple):
    """A correction's parameters. alpha 0 is none at all."""

    alpha: float
    num_clusters: int
    pca_dim: int


class Judged(NamedTuple):
    """A candidate, and how its logits compare with the float network's on images it has not seen.

    agreement: per cent of images with the same largest logit. error: mean square.
    """

    candidate: Candidate
    agreement: float
    error: float


def candidates(alphas: Sequence[float], clusters: Sequence[int], dims: Sequence[int]) -> list[Candidate]:
    """Every combination. Raises DataError for an alpha that is none."""
    for alpha in alphas:
        if not 0 < alpha <= 1:
            raise DataError(f"alpha {alpha:g}: legal: above 0, at most 1")
    return [Candidate(*values) for values in product(alphas, clusters, dims)]


def judged(quantized: Logits, exact: Logits, every: Sequence[Candidate], seed: int = 0) -> list[Judged]:
    """Each candidate and, first, no correction: fitted to some of the images, judged by the others.

    quantized, exact: (N, classes), of the same images.
    """
    order = np.random.default_rng(seed).permutation(len(quantized))
    held = max(1, round(HELD_OUT * len(order)))
    some, others = order[held:], order[:held]
    found = [_judged(Candidate(0.0, 0, 0), quantized[others], exact[others])]
    fitted: dict[tuple[int, int], Correction] = {}
    for each in every:
        key = each.num_clusters, each.pca_dim
        if key not in fitted:
            fitted[key] = fit(quantized[some], exact[some], 1.0, *key, seed=seed)
        correction = blended(fitted[key], each.alpha)
        found.append(_judged(each, correction.apply(quantized[others]), exact[others]))
    return found


def best(found: Sequence[Judged]) -> Judged:
    """The one that agrees most often with the float network; of equal ones, the one of least error."""
    return min(found, key=lambda j: (-j.agreement, j.error))


def blended(correction: Correction, alpha: float) -> Correction:
    """The same correction with another alpha: nothing of the fit depends on it."""
    c = correction
    return Correction(c.mean, c.components, c.centres, c.gain, c.offset, alpha)


def _judged(candidate: Candidate, logits: Logits, exact: Logits) -> Judged:
    agreement = 100 * float((logits.argmax(1) == exact.argmax(1)).mean())
    return Judged(candidate, agreement, float(np.square(logits - exact, dtype=np.float64).mean()))
