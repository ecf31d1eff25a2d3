"""What an evaluation was made on, and how sure its figures are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pow2quant.logits.paired import NORMAL_95, paired, wilson
from pow2quant.report.verdict import Change
from pow2quant.runs.job import Job
from pow2quant.runs.scores import FLOAT, Scores


def evaluation_of(job: Job, scores: Scores, change: Change | None, **executors: str) -> dict[str, Any]:
    """`evaluation` of report.json: how many images of how many, their classes, and intervals of 95 %.

    executors: by the names under which `intervals` has the leading metric of each, beside `float`.
    """
    known = {key: scores.per_sample(name) for key, name in {"float": FLOAT, **executors}.items()}
    sample = job.sample(scores.limit)
    return {
        "images": scores.samples,
        "of": sample.total or scores.samples,
        "classes": len(scores.classes) or None,
        "of_classes": job.data.num_classes or None,
        "interval": None if change is None or change.interval is None else list(change.interval),
        "intervals": {
            key: None if values is None else interval_of(values, scores.hits) for key, values in known.items()
        },
        "sample": sample.images or scores.digest.hexdigest(),
        "preprocessing": [*job.data.notes, *(f"warning: {text}" for text in job.data.warnings)],
    }


def interval_of(values: NDArray[np.float64], hits: bool) -> list[float]:
    """The 95 % interval of the mean of (N,) values. hits: whether they are shares, from 0 to 100 %."""
    if hits:
        return [round(100 * end, 4) for end in wilson(float(values.mean()) / 100, len(values))]
    mean, error = paired(values)
    return [float(f"{mean + sign * NORMAL_95 * error:.6g}") for sign in (-1, 1)]
