"""Calibration on the aimet backend against AIMET's own `compute_encodings`, on the same data in one run.

    python benchmarks/aimet_cost.py [NAME …] [--size 64] [--rounds 3]

Process CPU time on one thread, the median of interleaved rounds, 8 batches of 32 images. Needs aimet-torch.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import torch
from cost import BATCH, BATCHES, interleaved
from families import images, with_statistics

from pow2quant import models, simulate


def measure(name: str, size: int, rounds: int) -> None:
    """Prints one network's ratio."""
    from aimet_torch import QuantizationSimModel
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.model_preparer import prepare_model

    torch.manual_seed(0)
    model = with_statistics(models.build(f"torchvision:{name}"), images(8, size, 1))
    batches = images(BATCHES * BATCH, size, 2).split(BATCH)
    ours = simulate(model, batches[0], backend="aimet")
    network = prepare_model(model)
    fold_all_batch_norms(network, batches[0].shape, dummy_input=batches[0])
    theirs = QuantizationSimModel(network, batches[0])

    def forward(module: torch.nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                module(batch)

    tasks = {
        "FP32 forward": lambda: forward(model),
        "AIMET's compute_encodings": lambda: theirs.compute_encodings(forward),
        "ours, on AIMET": lambda: ours.calibrate(batches),
    }
    base, reference, own = interleaved(tasks, rounds).values()
    ratio = own / reference
    print(f"{name}: AIMET {reference / base:.2f}, ours {own / base:.2f} FP32 passes; ours / AIMET = {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    for name in options.names:
        measure(name, options.size, options.rounds)


if __name__ == "__main__":
    main()
