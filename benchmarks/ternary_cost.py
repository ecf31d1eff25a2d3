"""What ternary weights save: bytes of the files, flash and time of the generated C, against the same network at 8 bits.

    python benchmarks/ternary_cost.py [torchvision:resnet18 …] [--weights FILE] [--size 32] [--classes 1000]
        [--rounds 9] [--flags "-std=c99 -O3"]

Networks are names or path/to/file.py:factory; without weights they have random ones, which changes no size. The first
and the last layer keep 8 bits, the others become ternary by the method `ternary`. Float: the ONNX file with batch norm
folded. Packed: all `.bin` files of the integer pack's parameters, and its program.json. Time: one image, one thread,
process CPU time, the median of interleaved rounds; `--rounds 0` leaves it out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from cost import interleaved

from pow2quant import models, runs
from pow2quant.adapters import onnx_qdq
from pow2quant.artifact import Artifact
from pow2quant.config import RunConfig, plan_of, with_values
from pow2quant.integer.emit_c import Source
from pow2quant.integer.lower import lower
from pow2quant.integer.pack import export_integers, sample_codes
from pow2quant.methods.ternary import Ternary
from pow2quant.validation.c99 import Library

IMAGES = 8


def quantized(model: torch.nn.Module, size: int, bits: int) -> Artifact:
    """The network at 8 bits, or with 2 but for its first and last layer."""
    torch.manual_seed(0)
    batch = torch.rand(4, 3, size, size)
    named = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    ends = {name: {"weight": {"bitwidth": 8}} for name in (named[0], named[-1])}
    values = {"quantization.weight.bitwidth": bits, "quantization.overrides": ends}
    sim = runs.simulate(model, batch[:1], plan_of(with_values(RunConfig(), values)))
    sim.calibrate([batch])
    if bits == 2:
        Ternary().apply(sim, [batch])
        sim.calibrate([batch], roles={"input", "output", "bias"})
    return sim.export(batch[:1])


def measure(name: str, options: argparse.Namespace) -> None:
    """Prints one network's rows."""
    model = models.build(name, num_classes=options.classes, weights=options.weights).eval()
    artifacts = {label: quantized(model, options.size, bits) for label, bits in (("8 bits", 8), ("ternary", 2))}
    libraries = {}
    base = 0
    for label, artifact in artifacts.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            onnx_qdq.save(artifact.model, path / "float.onnx")
            onnx_qdq.save(onnx_qdq.to_qdq(artifact), path / "quantized.onnx")
            pack = export_integers(artifact, path / "pack", samples=1)
            base = (path / "float.onnx").stat().st_size
            onnx = (path / "quantized.onnx").stat().st_size
            packed = sum(p.stat().st_size for kind in ("parameters", "constants") for p in (pack / kind).glob("*.bin"))
            program = (pack / "program.json").stat().st_size
        lowered = lower(artifact)
        flash = Source(lowered, "model").flash
        print(
            f"| {name} | {label} | {base:,} | {onnx:,} ({base / onnx:.2f}x) | {packed:,} ({base / packed:.2f}x) | "
            f"{packed + program:,} ({base / (packed + program):.2f}x) | {flash:,} ({base / flash:.2f}x) |",
            flush=True,
        )
        if options.rounds:
            libraries[label] = Library(lowered, options.flags.split()), sample_codes(lowered, IMAGES)
    if options.rounds:
        tasks = {label: lambda c=library, x=codes: c.run(x) for label, (library, codes) in libraries.items()}
        times = interleaved(tasks, options.rounds)
        milliseconds = ", ".join(f"{label} {t / IMAGES * 1e3:.3f} ms" for label, t in times.items())
        ratio = times["ternary"] / times["8 bits"]
        print(f"{name}, {options.flags}: {milliseconds}: the ternary one takes {ratio:.2f} of the other's time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["torchvision:resnet18"])
    parser.add_argument("--weights")
    parser.add_argument("--classes", type=int)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--flags", default="-std=c99 -O3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | weights | float, bytes | ONNX | packed | with program.json | flash of the C |")
    print("|---|---|---|---|---|---|---|")
    for name in options.names:
        measure(name, options)


if __name__ == "__main__":
    main()
