"""CIFAR-10, the whole test set: what training wins back at several widths, and whether every executor agrees.

    python benchmarks/qat.py --data-path DIR --network models.py:cifar10_resnet20 --weights resnet20.safetensors
        [--runs 8:8:weights:1:1e-4 4:8:weights:3:1e-4 4:4:full:10:2.5e-4 …] [--exponents tqt|lsq|fixed]
        [--before "align: {rounds: 1}, gptq, bias_correction"] [--overrides "{fc: {output: {bitwidth: 8}}}"] [--sums 8]
        [--teacher models.py:cifar10_resnet56 --teacher-weights resnet56.safetensors]
        [--output runs/qat-cifar10]

DIR holds `cifar-10-batches-py/` or `cifar10.npz`; networks and weights are your own. A run is
WEIGHT BITS:ACTIVATION BITS:MODE:EPOCHS:LEARNING RATE; the rate warms up for a tenth of the steps. 512 calibration
images; `weights` starts from the default methods, `full` from the chain `--before`; batches of 64, folded batch norm,
no loss but distillation from the float network, or from `--teacher`. `--overrides` are `quantization.overrides`: by
default the logits have 8 bits, as with 4 bits the two largest of them are often equal. `--exponents fixed` leaves
exponents where the methods put them, and takes less time. The last epoch is kept: no choice is made on test images.
Prints a markdown row per run; the SQNR is that of the logits after training, in dB. A run that was interrupted
continues when the same command is given again. `--precision bfloat16` is faster on processors that compute with it, and
half as fast on others. Settings are chosen with the images of `held_back.py`. Exit status 1 when any output element
differs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from pow2quant import qat
from pow2quant.config import RunConfig, with_values

BEFORE = "lapq: {bias_correction: false}, qdrop: {iterations: 400}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument(
        "--runs",
        nargs="+",
        default=[
            *("8:8:weights:1:1e-4", "4:8:weights:3:1e-4"),
            *("4:4:full:10:2.5e-4", "3:3:full:10:2.5e-4", "2:4:full:10:5e-4"),
        ],
        metavar="W:A:MODE:EPOCHS:RATE",
    )
    parser.add_argument("--before", default=BEFORE, metavar="CHAIN", help="methods in front of full training")
    parser.add_argument("--overrides", default="{fc: {output: {bitwidth: 8}}}", metavar="YAML")
    parser.add_argument("--sums", type=int, help="bits of sums and of what they add, as `quantization.sums`")
    parser.add_argument("--exponents", default="tqt", choices=["tqt", "lsq", "fixed"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--teacher", help="as `training.teacher.name`: whose logits are imitated, with its weights")
    parser.add_argument("--teacher-weights", help="as `training.teacher.weights`")
    parser.add_argument("--features", type=float, default=0.0, help="as `training.feature_distillation`")
    parser.add_argument("--mixing", choices=["cutmix", "mixup"], help="as `training.mixing`")
    parser.add_argument("--average", type=float, default=0.0, help="as `training.average`")
    parser.add_argument("--relative-steps", action="store_true", help="as `training.relative_steps`")
    parser.add_argument("--batch-norm", default="folded", choices=["live", "folded"])
    parser.add_argument("--backend", default="custom")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/qat-cifar10"))
    options = parser.parse_args()
    if options.teacher_weights and not options.teacher:
        parser.error("name the network of --teacher-weights with --teacher")
    print("| widths | mode | epochs | minutes | float | PTQ | after training | onnxruntime | SQNR | differing |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    agrees = True
    for run in options.runs:
        weight, activation, mode, epochs, rate = run.split(":")
        values = {
            "backend": options.backend,
            "device": options.device,
            "seed": options.seed,
            "model.name": options.network,
            "model.weights": options.weights,
            "data.dataset": "cifar10",
            "data.path": options.data_path,
            "quantization.weight.bitwidth": int(weight),
            "quantization.output.bitwidth": int(activation),
            "quantization.overrides": yaml.safe_load(options.overrides),
            "quantization.sums": options.sums,
            "ptq.calibration_batches": 8,
            "ptq.methods": yaml.safe_load(f"[{options.before}]") if mode == "full" else None,
            "training.mode": mode,
            "training.exponents": options.exponents,
            "training.epochs": int(epochs),
            "training.learning_rate": float(rate),
            "training.scheduler": {"type": "OneCycleLR", "pct_start": 0.1},
            "training.weight_decay": 1e-4,
            "training.batch_size": 64,
            "training.distillation": 1.0,
            "training.temperature": 4.0,
            "training.precision": options.precision,
            "training.batch_norm": options.batch_norm,
            "training.feature_distillation": options.features,
            "training.mixing": options.mixing,
            "training.average": options.average,
            "training.relative_steps": options.relative_steps,
            "training.teacher": options.teacher and {"name": options.teacher, "weights": options.teacher_weights},
        }
        folder = options.output / f"{run.replace(':', '-')}-{options.exponents}-seed{options.seed}"
        if not folder.exists() and qat(with_values(RunConfig(), values), folder, resume=True) is None:
            continue  # another process of torchrun's leads, and prints the row
        r = json.loads((folder / "report.json").read_text())
        differing = sum(a["differing"] for a in r["validation"])
        accuracies = " | ".join(f"{r[f'{k}_accuracy']:.2f}" for k in ("initial", "ptq", "final", "onnxruntime"))
        minutes = r["training"]["seconds"] / 60
        print(
            f"| W{weight}A{activation} | {mode} | {epochs} | {minutes:.1f} | "
            f"{accuracies} | {r['final_sqnr_db']:.2f} | {differing} of {r['validation'][0]['elements']:,} |",
            flush=True,
        )
        agrees &= differing == 0
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    main()
