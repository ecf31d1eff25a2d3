"""Analyses synthetic logits, by default 50,000 images of 1,000 classes, and prints the peak of its memory and its time.

    python benchmarks/logits_memory.py [--images 50000] [--classes 1000] [--fitted 1024] [--output DIR]

Prints one JSON document; `peak_mib` is the largest resident set of the whole process. Without --output, the CSV files
(1.5 GB in all) are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pow2quant.logits import cat
from pow2quant.logits.analysis import Analysis, Subject

BATCH = 64
STEP = np.float32(2.0**-4)


def batch(rng: np.random.Generator, images: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels; float logits, the label's larger; quantized ones, on a grid of 2^-4, smaller and with noise."""
    labels = rng.integers(classes, size=images)
    exact = rng.standard_normal((images, classes), np.float32) * 2
    exact[np.arange(images), labels] += 6
    quantized = np.round((0.7 * exact + rng.standard_normal(exact.shape, np.float32)) / STEP) * STEP
    return labels, exact, quantized.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--fitted", type=int, default=1_024)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    started = time.monotonic()
    _, exact, quantized = batch(rng, options.fitted, options.classes)
    correction = cat.fit(quantized, exact, 0.4, 16, min(50, options.classes // 2))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        analysis = Analysis(folder, Subject("synthetic", 4, 4), correction)
        left = options.images
        while left:
            size = min(BATCH, left)
            analysis.add(*batch(rng, size, options.classes))
            left -= size
        summary = analysis.finish()
        written = sum(path.stat().st_size for path in folder.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    found = {
        "images": options.images,
        "classes": options.classes,
        "peak_mib": round(peak, 1),
        "seconds": round(time.monotonic() - started, 1),
        "written_bytes": written,
        "gain": summary["networks"]["corrected"]["gain"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
