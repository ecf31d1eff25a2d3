"""What the drop-in and the aimet backend cost against AIMET's own, on the same data in one run.

    python benchmarks/aimet_cost.py [NAME …] [--size 64] [--rounds 3]

Process CPU time on one thread, the median of interleaved rounds: importing, constructing, loading an encodings file
(named after torch modules, written by AIMET), and calibration on 8 batches of 32 images. Prints a markdown row per
network, ratios to AIMET's own. Needs aimet-torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cost import BATCH, BATCHES, interleaved
from families import images, with_statistics

from pow2quant import QuantizationSimModel, models, simulate

IMPORTS = {
    "AIMET": "from aimet_torch import QuantizationSimModel",
    "aimet": "from pow2quant.backends.aimet.constrained import tools; tools()",
    "custom": "import pow2quant; pow2quant.QuantizationSimModel",
}


def import_times(rounds: int) -> dict[str, float]:
    """CPU seconds of a fresh interpreter that imports the class, by whose it is."""
    found: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds):
        for name, code in IMPORTS.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=dict(os.environ))
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {name: median(times) for name, times in found.items()}


def measure(name: str, size: int, rounds: int) -> None:
    """Prints one network's ratios."""
    import aimet_torch
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.model_preparer import prepare_model

    torch.manual_seed(0)
    model = with_statistics(models.build(f"torchvision:{name}"), images(8, size, 1))
    batches = images(BATCHES * BATCH, size, 2).split(BATCH)
    network = prepare_model(model)
    fold_all_batch_norms(network, batches[0].shape, dummy_input=batches[0])

    def forward(module: torch.nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                module(batch)

    makers: dict[str, Callable[[], Any]] = {
        "AIMET": lambda: aimet_torch.QuantizationSimModel(network, batches[0]),
        "aimet": lambda: QuantizationSimModel(network, batches[0], backend="aimet"),
        "custom": lambda: QuantizationSimModel(network, batches[0]),
    }
    constructing = interleaved(makers, rounds)
    sims = {whose: make() for whose, make in makers.items()}
    sims["AIMET"].compute_encodings(lambda module: module(batches[0]))
    with tempfile.TemporaryDirectory() as folder:
        sims["AIMET"].save_encodings_to_json(folder, "e")
        file = str(Path(folder) / "e.json")
        loading = interleaved(
            {
                "AIMET": lambda: sims["AIMET"].load_encodings(file),
                "aimet": lambda: sims["aimet"].load_encodings(file, snap=True),
                "custom": lambda: sims["custom"].load_encodings(file, strict=False, snap=True),
            },
            rounds,
        )
    ours = simulate(model, batches[0], backend="aimet")
    calibrating = interleaved(
        {
            "AIMET": lambda: sims["AIMET"].compute_encodings(forward),
            "aimet": lambda: sims["aimet"].compute_encodings(forward),
            "aimet, our placement": lambda: ours.calibrate(batches),
            "custom": lambda: sims["custom"].compute_encodings(forward),
        },
        rounds,
    )
    for task, times in (("construct", constructing), ("load a JSON file", loading), ("calibrate", calibrating)):
        report(f"{name}: {task}", times)


def report(task: str, times: dict[str, float]) -> None:
    """Prints AIMET's seconds, and ours as ratios."""
    ratios = ", ".join(
        f"{whose} {seconds / times['AIMET']:.2f}" for whose, seconds in times.items() if whose != "AIMET"
    )
    print(f"| {task} | {times['AIMET']:.3f} s | {ratios} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    print("| task | AIMET | ours / AIMET |\n|---|---|---|")
    report("import", import_times(options.rounds))
    for name in options.names:
        measure(name, options.size, options.rounds)


if __name__ == "__main__":
    main()
