"""Every recipe of configs/recipes on a network and its data: accuracy, size, and whether all executors agree.

    python benchmarks/recipes.py --network models.py:cifar10_resnet20 --weights resnet20.safetensors --data cifar10
        --data-path DIR [--recipe NAME …] [--iterations N] [--calibration-batches 8] [--test-batches N]

Networks and weights are your own. `iterations` shortens what learns. Prints a markdown row per recipe: top-1, per cent,
of the float network, the simulation and onnxruntime, the simulation's difference from float in points, kB of the QDQ
file, differing output elements in all executors together, what is claimed, and minutes. Exit status 1 if any differs.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from pow2quant import config as configuration
from pow2quant import runs
from pow2quant.cli.console import Console
from pow2quant.config import Choice, RunConfig
from pow2quant.study.search import search
from pow2quant.three_steps import qat

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "recipes"


def shortened(config: RunConfig, iterations: int | None) -> RunConfig:
    """With so many iterations of every method that learns."""
    if iterations is None or config.ptq.methods is None:
        return config
    methods = tuple(
        Choice(name, {**values, "iterations": iterations}) if name in ("adaround", "qdrop") else Choice(name, values)
        for name, values in config.ptq.methods
    )
    return replace(config, ptq=replace(config.ptq, methods=methods))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-path")
    parser.add_argument("--recipe", nargs="+", default=sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--calibration-batches", type=int, default=8)
    parser.add_argument("--test-batches", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    values = {
        "model.name": options.network,
        "model.weights": options.weights,
        "data.dataset": options.data,
        "data.path": options.data_path,
        "ptq.calibration_batches": options.calibration_batches,
        "ptq.max_eval_batches": options.test_batches,
        "seed": options.seed,
    }
    print("| recipe | float | simulated | onnxruntime | difference | kB | differing | claim | minutes |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    agrees = True
    for name in options.recipe:
        config = configuration.with_values(configuration.load(RECIPES / f"{name}.yaml"), values)
        config = shortened(config, options.iterations)
        with tempfile.TemporaryDirectory() as folder:
            target, console = Path(folder) / "run", Console(quiet=True)
            if config.search.constraints:
                result = search(config, target, progress=console).result
            elif config.training != RunConfig().training:
                trained = qat(config, target, progress=console)
                assert trained is not None
                result = trained
            else:
                result = runs.ptq(config, target, progress=console)
        r = result.report
        differing = sum(a.differing for a in result.agreements)
        row = [
            name,
            *(f"{r[f'{key}_accuracy']:.2f}" for key in ("initial", "final", "onnxruntime")),
            f"{r['total_improvement']:+.2f}",
            f"{r['model_size_bytes']['quantized'] / 1e3:.1f}",
            f"{differing} in {len(result.agreements)} executors",
            r["validation"][0]["claim"],
            f"{r['duration_seconds'] / 60:.1f}",
        ]
        print(f"| {' | '.join(row)} |", flush=True)
        agrees &= result.agrees
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    main()
