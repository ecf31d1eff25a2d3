"""CIFAR-10, the whole test set: ternary weights trained by each rule, first and last layer at 8 bits, activations too.

    python benchmarks/ternary.py --data-path DIR --network models.py:cifar10_resnet20 --weights resnet20.safetensors
        [--rules twn ttq learned] [--epochs 12] [--rate 1e-3] [--ends conv1 fc] [--output runs/ternary-cifar10]

DIR holds `cifar-10-batches-py/` or `cifar10.npz`; networks and weights are your own. Every rule has the same epochs,
the same seed and so the same batches: 512 calibration images, batches of 64, folded batch norm, distillation from the
float network, the rate warms up for a tenth of the steps; the last epoch is kept. Prints a markdown row per rule: zeros
is their share among the ternary weights; packed, the bytes of the integer pack's parameters. A run that was interrupted
continues when the same command is given again. `--precision bfloat16` is faster on processors that compute with it, and
half as fast on others. Exit status 1 when any output element differs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pow2quant import qat
from pow2quant.adapters import onnx_qdq
from pow2quant.config import RunConfig, with_values
from pow2quant.integer.lower import lower
from pow2quant.integer.pack import export_integers
from pow2quant.integer.ternary import Ternary


def row(folder: Path, rule: str, epochs: int) -> int:
    """Prints what a finished run is; returns how many elements differ among its executors."""
    report = json.loads((folder / "report.json").read_text())
    artifact = onnx_qdq.from_qdq(onnx_qdq.load(folder / "model.onnx"))
    weights = [step.weight for step in lower(artifact).steps if hasattr(step, "weight")]
    codes = [found.codes for weight in weights if (found := Ternary.of(weight)) is not None]
    pack = export_integers(artifact, folder / "export" / "integers", samples=1)
    packed = sum(path.stat().st_size for path in (pack / "parameters").glob("*.bin"))
    size = (folder / "model_float.onnx").stat().st_size
    differing = sum(a["differing"] for a in report["validation"])
    zeros = sum(int((c == 0).sum()) for c in codes) / sum(c.size for c in codes)
    accuracies = " | ".join(f"{report[f'{key}_accuracy']:.2f}" for key in ("initial", "final", "onnxruntime"))
    print(
        f"| {rule} | {epochs} | {report['training']['seconds'] / 60:.1f} | {accuracies} | {len(codes)} of "
        f"{len(weights)} | {zeros:.1%} | {packed:,} ({size / packed:.1f}x) | "
        f"{differing} of {report['validation'][0]['elements']:,} |",
        flush=True,
    )
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--rules", nargs="+", default=["twn", "ttq", "learned"])
    parser.add_argument("--ends", nargs="+", default=["conv1", "fc"], help="layers that keep 8 bits")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch-norm", default="folded", choices=["live", "folded"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--distillation", type=float, default=0.8, help="as `training.distillation`")
    parser.add_argument("--temperature", type=float, default=2.0, help="as `training.temperature`")
    parser.add_argument("--features", type=float, default=0.0, help="as `training.feature_distillation`")
    parser.add_argument("--relative-steps", action="store_true", help="as `training.relative_steps`")
    parser.add_argument("--backend", default="custom")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-eval-batches", type=int)
    parser.add_argument("--output", type=Path, default=Path("runs/ternary-cifar10"))
    options = parser.parse_args()
    print("| rule | epochs | minutes | float | final | onnxruntime | ternary layers | zeros | packed | differing |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    differing = 0
    for rule in options.rules:
        values = {
            "backend": options.backend,
            "device": options.device,
            "seed": options.seed,
            "model.name": options.network,
            "model.weights": options.weights,
            "data.dataset": "cifar10",
            "data.path": options.data_path,
            "quantization.weight.bitwidth": 2,
            "quantization.overrides": {name: {"weight": {"bitwidth": 8}} for name in options.ends},
            "ptq.calibration_batches": 8,
            "ptq.max_eval_batches": options.max_eval_batches,
            "ptq.methods": [],
            "training.ternary": rule,
            "training.mode": "full",
            "training.batch_norm": options.batch_norm,
            "training.epochs": options.epochs,
            "training.learning_rate": options.rate,
            "training.scheduler": {"type": "OneCycleLR", "pct_start": 0.1},
            "training.weight_decay": 1e-4,
            "training.batch_size": 64,
            "training.distillation": options.distillation,
            "training.temperature": options.temperature,
            "training.feature_distillation": options.features,
            "training.relative_steps": options.relative_steps,
            "training.precision": options.precision,
            "training.checkpoint_minutes": 5.0,
        }
        folder = options.output / f"{rule}-{options.epochs}-{options.rate:g}-seed{options.seed}"
        if not folder.exists():
            qat(with_values(RunConfig(), values), folder, resume=True)
        differing += row(folder, rule, options.epochs)
    raise SystemExit(0 if differing == 0 else 1)


if __name__ == "__main__":
    main()
