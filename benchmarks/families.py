"""Torchvision's families with random weights: does every executor give the simulation's bits?

    python benchmarks/families.py [NAME …] [--weight-bits 8] [--activation-bits 8] [--size 224] [--inputs 8]

Batch norm statistics are estimated on the calibration images, which are smoothed noise: random weights make any image
as good as any other. Prints one line per network; exit status 1 when a supported network differs anywhere.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant import models
from pow2quant.adapters import onnx_qdq
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.config import QuantPlan
from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.prepare import prepare
from pow2quant.integer.certificate import certify
from pow2quant.plugins import resolve
from pow2quant.runs import executors, simulation_executor
from pow2quant.validation.agreement import compare

FAMILIES = [
    "alexnet",
    "vgg11_bn",
    "resnet18",
    "squeezenet1_1",
    "densenet121",
    "inception_v3",
    "googlenet",
    "shufflenet_v2_x1_0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "mnasnet0_5",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
]


def images(count: int, size: int, seed: int) -> Tensor:
    """Smoothed noise, (count, 3, size, size), roughly normalized."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 8, size // 8, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bilinear") + 0.3 * fine


def with_statistics(model: nn.Module, batch: Tensor) -> nn.Module:
    """Sets every batch norm's statistics to those of one batch."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        model(batch)
    return model.eval()


def try_one(name: str, options: argparse.Namespace) -> bool:
    """One network; prints its line and says whether nothing differs."""
    torch.manual_seed(0)
    started = time.perf_counter()
    size = 299 if name.startswith("inception") and options.size == 224 else options.size
    model = with_statistics(models.build(f"torchvision:{name}"), images(8, size, 1))
    calibration, test = images(8, size, 2).split(4), images(options.inputs, size, 3).split(4)
    try:
        network = fold_batch_norm(prepare(model, calibration[0]))
        plan = QuantPlan.default(options.weight_bits, options.activation_bits)
        sim = resolve("backends", options.backend)(network, calibration[0], plan)
    except UnsupportedModelError as error:
        print(f"{name:20s} unsupported: {error}")
        return True
    sim.calibrate(calibration)
    artifact = sim.export(calibration[0])
    certificate, left_out = certify(artifact), dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        path = onnx_qdq.export_qdq(artifact, Path(folder))
        found = compare(
            simulation_executor(sim, options.backend, torch.device("cpu")),
            executors(path, None, left_out),
            ([x.numpy()] for x in test),
            artifact,
            proof=certificate,
        )
    differing = " ".join(f"{a.differing}/{a.elements}" for a in found)
    missing = "; ".join(f"left out: {executor}: {reason}" for executor, reason in left_out.items())
    first = next((a.first_diverging for a in found if a.first_diverging), None)
    proved = sum(layer.proved for layer in certificate.layers)
    print(
        f"{name:20s} differing {differing:22s} nodes proved {proved}/{len(certificate.layers)}  "
        f"{time.perf_counter() - started:5.1f} s  {first or missing}",
        flush=True,
    )
    return all(a.agrees for a in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=FAMILIES)
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--inputs", type=int, default=8)
    parser.add_argument("--backend", default="custom")
    options = parser.parse_args()
    results = [try_one(name, options) for name in options.names]
    raise SystemExit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
