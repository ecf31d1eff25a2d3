"""The generated C against onnxruntime's INT8 session: one image, one thread, and the C's sizes.

    python benchmarks/c_speed.py RUN [RUN …] [--rounds 15] [--flags "-std=c99 -O3 -march=native"]

RUN: a run's folder, or a QDQ file. Process CPU time, the median of interleaved rounds of 20 images; onnxruntime with
all optimizations. Also says how many output codes differ between the two.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import onnxruntime
from cost import interleaved

from pow2quant import run_folder
from pow2quant.adapters import onnx_qdq
from pow2quant.integer.emit_c import export_c
from pow2quant.integer.lower import lower
from pow2quant.integer.pack import sample_codes
from pow2quant.integer.run import dequantize
from pow2quant.validation.c99 import Library

IMAGES = 20


def measure(run: Path, rounds: int, flags: list[str]) -> None:
    """Prints one network's line."""
    file = run / run_folder.QDQ if run.is_dir() else run
    artifact = onnx_qdq.from_qdq(onnx_qdq.load(file))
    program = lower(artifact)
    with tempfile.TemporaryDirectory() as folder:
        written = export_c(artifact, Path(folder) / "c")
        lines = {p.name: p.read_text().count("\n") for p in written.glob("*.[ch]")}
        header = (written / "model.h").read_text().splitlines()
    sizes = {word: int(line.split()[2]) for line in header for word in ("RAM", "FLASH") if f"MODEL_{word} " in line}
    library = Library(program, flags)
    codes = sample_codes(program, IMAGES)
    start = time.perf_counter()
    mine = library.run(codes)
    compiling = time.perf_counter() - start
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    real = list(dequantize(program, dict(zip(program.inputs, codes, strict=True))).values())
    feeds = [{i.name: x[n : n + 1] for i, x in zip(session.get_inputs(), real, strict=True)} for n in range(IMAGES)]
    theirs = [np.concatenate(outputs) for outputs in zip(*(session.run(None, feed) for feed in feeds), strict=True)]
    values = dequantize(program, dict(zip(program.outputs, mine, strict=True))).values()
    differing = sum(int((a != b).sum()) for a, b in zip(values, theirs, strict=True))
    times = interleaved(
        {"c": lambda: library.run(codes), "ort": lambda: [session.run(None, feed) for feed in feeds]}, rounds
    )
    c, ort = (times[key] / IMAGES * 1e3 for key in ("c", "ort"))
    print(
        f"{run.name}: C {c:.3f} ms, onnxruntime {ort:.3f} ms: {c / ort:.2f} times as long; {program.work / 1e6:.1f} M "
        f"multiply-accumulates; RAM {sizes['RAM']:,} bytes, flash {sizes['FLASH']:,} bytes; model.c {lines['model.c']} "
        f"and kernels.h {lines['kernels.h']} lines; compiled in {compiling:.1f} s; {differing} of "
        f"{sum(y.size for y in theirs)} outputs differ",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--flags", default="-std=c99 -O3 -march=native")
    options = parser.parse_args()
    for run in options.runs:
        measure(run, options.rounds, options.flags.split())


if __name__ == "__main__":
    main()
