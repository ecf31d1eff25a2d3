"""What quantizing costs, in FP32 forward passes over the same data, measured side by side in one run.

    python benchmarks/cost.py [--size 64] [--rounds 7]

Process CPU time on one thread, the median of interleaved rounds. Four ratios per network: calibration and snapping of
8 batches of 32 images with the default choosers, the same with `minmax`, the simulation's forward pass with frozen
weights, and bias correction, each against the float network (batch norm folded, as in the simulation; and as the user's
network is).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from families import images, with_statistics

from pow2quant import models
from pow2quant.backends.custom import CustomSimulation
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.config import QuantPlan
from pow2quant.frontends.prepare import prepare
from pow2quant.methods.bias_correction import BiasCorrection

BATCHES, BATCH = 8, 32


def cpu_seconds(function: Callable[[], object]) -> float:
    """Process CPU time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def interleaved(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each task, run in turns after one round that does not count."""
    times: dict[str, list[float]] = {label: [] for label in tasks}
    for turn in range(rounds + 1):
        for label, task in tasks.items():
            seconds = cpu_seconds(task)
            if turn:
                times[label].append(seconds)
    return {label: median(values) for label, values in times.items()}


def measure(name: str, size: int, rounds: int) -> None:
    """Prints one network's ratios."""
    torch.manual_seed(0)
    model = with_statistics(models.build(f"torchvision:{name}"), images(8, size, 1))
    batches = images(BATCHES * BATCH, size, 2).split(BATCH)
    network = fold_batch_norm(prepare(model, batches[0]))
    plan = QuantPlan.default()
    fast = replace(
        plan,
        weight=replace(plan.weight, range="minmax"),
        input=replace(plan.input, range="minmax"),
        output=replace(plan.output, range="minmax"),
    )
    default, fastest, frozen, corrected = (CustomSimulation(network, batches[0], p) for p in (plan, fast, plan, plan))
    frozen.calibrate(batches)
    corrected.calibrate(batches)

    def forward(module: torch.nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                module(batch)

    tasks: dict[str, Callable[[], object]] = {
        "float": lambda: forward(model),
        "folded": lambda: forward(network),
        "calibrate (default)": lambda: default.calibrate(batches),
        "calibrate (minmax)": lambda: fastest.calibrate(batches),
        "simulate": lambda: forward(frozen.model),
        "bias_correction": lambda: BiasCorrection().apply(corrected, batches),
    }
    times = interleaved(tasks, rounds)
    base, folded = times["float"], times["folded"]
    print(f"{name}: FP32 {base:.3f} s for {BATCHES} x {BATCH} images at {size} x {size}")
    for label in list(tasks)[1:]:
        print(f"  {label:20s} {times[label] / base:5.2f} of FP32, {times[label] / folded:5.2f} of folded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        measure(name, options.size, options.rounds)


if __name__ == "__main__":
    main()
