"""What cluster affine correction gains on finished runs: the mean of several splits, and its standard error.

    python benchmarks/cat.py RUN… [--splits 5] [--fitted 1024] [--test-batches N]
        [--alpha 0.2 0.4 0.6 0.8 1.0] [--num-clusters 1 4 16] [--pca-dim 5]

Every split has images of its own: `--fitted` calibration images that no other split has, and a part of the test images.
Alpha, clusters and dimensions are chosen by a quarter of the fitted images, without labels; a split in which no
correction is better than none gains 0. `fixed` rows leave the choice out. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import math
import statistics
from itertools import islice
from pathlib import Path

import numpy as np

from pow2quant import runs
from pow2quant.logits import cat
from pow2quant.logits.choose import Candidate, best, candidates, judged


def logits(run: Path, needed: int, test_batches: int | None) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Labels, float and quantized logits: of the first `needed` calibration images, and of the test images."""
    job, sim = runs.reopened(run)
    batches = math.ceil(needed / job.config.data.batch_size)
    calibration = runs.responses(job, sim, islice(job.data.calibration, batches))
    tests = runs.responses(job, sim, islice(job.data.test, test_batches))
    return tuple(tuple(np.concatenate(p) for p in zip(*part, strict=True)) for part in (calibration, tests))


def gain(fit: tuple[np.ndarray, ...], test: tuple[np.ndarray, ...], chosen: Candidate, seed: int) -> float:
    """Points of top-1 that a correction, fitted to some images, gains on others."""
    if not chosen.alpha:
        return 0.0
    made = cat.fit(fit[2], fit[1], *chosen, seed=seed)
    hits = [(logits.argmax(1) == test[0]).mean() for logits in (made.apply(test[2]), test[2])]
    return 100 * float(hits[0] - hits[1])


def row(name: str, what: str, top1: float, gains: list[float]) -> str:
    mean, error = statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    says = "no clear difference" if abs(mean) <= 2 * error or not mean else "helps" if mean > 0 else "does harm"
    each = " ".join(f"{g:+.2f}" for g in gains)
    return f"| {name} | {what} | {top1:.2f} | {mean:+.2f} ± {error:.2f} | {each} | {says} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--fitted", type=int, default=1024)
    parser.add_argument("--test-batches", type=int)
    parser.add_argument("--alpha", nargs="+", type=float, default=[0.2, 0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--num-clusters", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--pca-dim", nargs="+", type=int, default=[5])
    options = parser.parse_args()
    every = candidates(options.alpha, options.num_clusters, options.pca_dim)
    fixed = [c for c in every if c.alpha == options.alpha[-1]]
    print("| run | correction | quantized top-1 | gain, points | each split | |\n|---|---|---|---|---|---|", flush=True)
    for run in options.runs:
        calibration, tests = logits(run, options.splits * options.fitted, options.test_batches)
        own = [np.arange(options.fitted) + i * options.fitted for i in range(options.splits)]
        parts = np.array_split(np.random.default_rng(0).permutation(len(tests[0])), options.splits)
        fits = [tuple(x[o] for x in calibration) for o in own]
        shares = [tuple(x[p] for x in tests) for p in parts]
        taken = [best(judged(fit[2], fit[1], every, seed)).candidate for seed, fit in enumerate(fits)]
        top1 = 100 * float((tests[2].argmax(1) == tests[0]).mean())
        words = ", ".join(f"{c.alpha:g}/{c.num_clusters}/{c.pca_dim}" if c.alpha else "none" for c in taken)
        found = [gain(f, t, c, s) for s, (f, t, c) in enumerate(zip(fits, shares, taken, strict=True))]
        print(row(run.name, f"chosen: {words}", top1, found), flush=True)
        for each in fixed:
            found = [gain(f, t, each, s) for s, (f, t) in enumerate(zip(fits, shares, strict=True))]
            print(row(run.name, f"fixed: {each.alpha:g}/{each.num_clusters}/{each.pca_dim}", top1, found), flush=True)


if __name__ == "__main__":
    main()
