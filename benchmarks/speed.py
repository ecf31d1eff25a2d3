"""What quantizing gains: the INT8 file against FP32 in onnxruntime, and the files' sizes.

    python benchmarks/speed.py [--size 224] [--rounds 15]

One thread, process CPU time, the median of interleaved runs of one image; both files are run with all optimizations.
Also says whether the quantized file's outputs equal the simulation's, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import onnxruntime
import torch
from families import images, with_statistics

from pow2quant import models, simulate
from pow2quant.adapters import onnx_qdq


def session(path: Path) -> Any:
    """All optimizations, one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def cpu_seconds(run: Any, feed: dict[str, np.ndarray]) -> float:
    """Process CPU time of one inference."""
    start = time.process_time()
    run(None, feed)
    return time.process_time() - start


def measure(name: str, size: int, rounds: int, folder: Path) -> None:
    """Prints one network's line."""
    torch.manual_seed(0)
    model = with_statistics(models.build(f"torchvision:{name}"), images(8, size, 1))
    calibration = images(16, size, 2).split(4)
    sim = simulate(model, calibration[0])
    sim.calibrate(calibration)
    artifact = sim.export(calibration[0])
    quantized = onnx_qdq.export_qdq(artifact, folder / name)
    full = folder / name / "model_float.onnx"
    onnx_qdq.save(artifact.model, full)
    sessions = {"float": session(full), "int8": session(quantized)}
    feed = {artifact.model.graph.input[0].name: images(1, size, 3).numpy()}
    with torch.no_grad():
        expected = sim.model(images(1, size, 3)).numpy()
    differing = int((sessions["int8"].run(None, feed)[0] != expected).sum())
    times: dict[str, list[float]] = {key: [] for key in sessions}
    for _ in range(rounds):
        for key, runtime in sessions.items():
            times[key].append(cpu_seconds(runtime.run, feed))
    fp32, int8 = (median(times[key]) * 1e3 for key in sessions)
    sizes = full.stat().st_size / quantized.stat().st_size
    print(
        f"{name:14s} FP32 {fp32:7.2f} ms, INT8 {int8:7.2f} ms: {fp32 / int8:.2f} times faster; "
        f"file {sizes:.2f} times smaller; {differing} of {expected.size} outputs differ",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names:
            measure(name, options.size, options.rounds, Path(folder))


if __name__ == "__main__":
    main()
