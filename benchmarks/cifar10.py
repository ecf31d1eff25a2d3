"""CIFAR-10, the whole test set: accuracy, SQNR and agreement of trained networks at several widths.

    python benchmarks/cifar10.py --data-path DIR --network models.py:cifar10_resnet20 --weights resnet20.safetensors
        [--widths 8:8 4:8 4:4] [--method output_mse …] [--mean … --std …] [--backend custom] [--per-tensor]

DIR holds `cifar-10-batches-py/` or `cifar10.npz`; networks and weights are your own. 512 calibration images. Prints a
markdown row per width: accuracies in per cent, the logits' SQNR in dB, differing output elements in each executor
(onnxruntime four times, the engine, the generated C), and what is proved. Exit status 1 when anything differs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from pow2quant import ptq
from pow2quant.config import RunConfig, with_values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--widths", nargs="+", default=["8:8", "4:8", "4:4"], metavar="W:A")
    parser.add_argument("--mean", type=float, nargs=3)
    parser.add_argument("--std", type=float, nargs=3)
    parser.add_argument("--backend", default="custom")
    parser.add_argument("--method", nargs="*", default=[], help="methods, in order; default: none")
    parser.add_argument("--per-tensor", action="store_true")
    parser.add_argument("--max-eval-batches", type=int)
    options = parser.parse_args()
    print("| network | widths | float | simulated | onnxruntime | SQNR dB | differing | claim |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    agrees = True
    for widths in options.widths:
        weight, activation = (int(w) for w in widths.split(":"))
        values = {
            "backend": options.backend,
            "model.name": options.network,
            "model.weights": options.weights,
            "data.dataset": "cifar10",
            "data.path": options.data_path,
            "quantization.weight.bitwidth": weight,
            "quantization.weight.per_channel": not options.per_tensor,
            "quantization.input.bitwidth": max(8, activation),
            "quantization.output.bitwidth": activation,
            "ptq.calibration_batches": 8,
            "ptq.methods": options.method,
            "ptq.max_eval_batches": options.max_eval_batches,
        }
        if options.mean:
            values |= {"data.mean": options.mean, "data.std": options.std}
        with tempfile.TemporaryDirectory() as folder:
            result = ptq(with_values(RunConfig(), values), Path(folder) / "run")
        r = result.report
        differing = " ".join(str(a.differing) for a in result.agreements)
        layers = r["certificate"]["sentence"].partition(" exact")[0]
        print(
            f"| {Path(options.weights).stem} | W{weight}A{activation} | {r['initial_accuracy']:.2f} | "
            f"{r['final_accuracy']:.2f} | {r['onnxruntime_accuracy']:.2f} | {r['final_sqnr_db']:.1f} | "
            f"{differing} of {result.agreements[0].elements:,} | {r['validation'][0]['claim']} ({layers}) |",
            flush=True,
        )
        agrees &= result.agrees
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    main()
