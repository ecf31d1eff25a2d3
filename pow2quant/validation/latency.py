"""How long onnxruntime takes for one sample on one thread: the float file against the quantized one."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.validation import ort

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUDGET = 2.0
"""Seconds that all measured calls may take together."""

CALLS = range(3, 51)
"""How often each file is run: at least, and at most."""

clock = time.perf_counter if sys.platform == "win32" else time.thread_time
"""Of this thread, which computes alone: what else the machine does counts little. Windows' ticks are too coarse."""


def measure(files: dict[str, Path], sample: list[NDArray[np.float32]]) -> dict[str, Any]:
    """Medians in seconds of one call with all optimizations, by the files' names, run in turn; and how it was measured.

    sample: the graph inputs. Raises FileFormatError or DataError for a file that cannot be run.
    """
    runs = {name: _prepared(path, sample) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    spent = 0.0
    while (n := len(times[next(iter(times))])) < CALLS[0] or (n < CALLS[-1] and spent < BUDGET):
        for name, run in runs.items():
            started = clock()
            run()
            times[name].append(clock() - started)
            spent += times[name][-1]
    return {
        **{name: float(np.median(values)) for name, values in times.items()},
        "calls": len(times[next(iter(times))]),
        "threads": 1,
        "batch": len(sample[0]),
        "shape": list(sample[0].shape),
    }


def _prepared(path: Path, sample: list[NDArray[np.float32]]) -> Any:
    from onnxruntime import InferenceSession

    options = ort.options(optimized=True)
    options.intra_op_num_threads = 1
    session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {i.name: x for i, x in zip(session.get_inputs(), sample, strict=True)}
    session.run(None, feed)  # the first call allocates
    return lambda: session.run(None, feed)
