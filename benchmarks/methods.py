"""Chains of methods at several widths: accuracy, its paired difference to the float network, SQNR of the logits.

    python benchmarks/methods.py --network models.py:cifar10_resnet20 --weights resnet20.safetensors --data cifar10
        --data-path DIR [--chains none output_mse+bias_correction …] [--widths 8:8 4:8 4:4] [--per-tensor]
        [--free-scales] [--calibration-batches 8] [--test-batches N] [--backend custom]

Networks and weights are your own. Only the simulation runs: that its bits are those of onnxruntime is what `ptq` shows.
Prints a markdown row per chain and width; the interval is that of 95 %.
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from pow2quant import datasets, models, prepare, simulate
from pow2quant.backends.base import Simulation
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.config import DataConfig, QuantPlan, parameters
from pow2quant.plugins import resolve


def plan(widths: str, per_tensor: bool, free: bool) -> QuantPlan:
    """`4:8` is 4-bit weights and 8-bit activations."""
    weight, activation = (int(bits) for bits in widths.split(":"))
    made = QuantPlan.default(weight, activation, per_tensor)
    roles = {role: getattr(made, role) for role in ("weight", "input", "output", "bias")}
    return QuantPlan(**{role: replace(spec, power_of_2=not free) for role, spec in roles.items()})


def simulated(model: nn.Module, chain: str, plan: QuantPlan, batches: Sequence[Tensor], backend: str) -> Simulation:
    """The network after the methods of `a+b+c`."""
    torch.manual_seed(0)
    names = [] if chain == "none" else chain.split("+")
    methods = [parameters(resolve("methods", name), {}, name) for name in names]
    network = fold_batch_norm(prepare(model, batches[0][:1]))
    for method in methods:
        if hasattr(method, "rewrite"):
            more = {"plan": plan} if "plan" in inspect.signature(method.rewrite).parameters else {}
            network = method.rewrite(network, batches, **more)
    sim = simulate(network, batches[0][:1], plan, backend)
    sim.calibrate(batches)
    for method in methods:
        if hasattr(method, "apply"):
            method.apply(sim, batches)
    return sim


@torch.inference_mode()
def logits(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([model(x.clone()) for x in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-path")
    parser.add_argument("--chains", nargs="+", default=["none", "output_mse", "output_mse+bias_correction"])
    parser.add_argument("--widths", nargs="+", default=["8:8", "4:8", "4:4"], metavar="W:A")
    parser.add_argument("--per-tensor", action="store_true")
    parser.add_argument("--free-scales", action="store_true")
    parser.add_argument("--calibration-batches", type=int, default=8)
    parser.add_argument("--test-batches", type=int)
    parser.add_argument("--backend", default="custom")
    options = parser.parse_args()
    data = datasets.load(DataConfig(dataset=options.data, path=options.data_path))
    model = models.build(options.network, weights=options.weights).eval()
    calibration = [x for x, _ in islice(data.calibration, options.calibration_batches)]
    test, labels = zip(*islice(data.test, options.test_batches), strict=True)
    truth, expected = torch.cat(labels), logits(model, test)
    hits = (expected.argmax(1) == truth).float()
    print(f"float: {100 * hits.mean():.2f} % of {len(truth)}\n")
    print("| widths | chain | accuracy | difference | SQNR dB | seconds |\n|---|---|---|---|---|---|", flush=True)
    for widths in options.widths:
        for chain in options.chains:
            started = time.monotonic()
            chosen = plan(widths, options.per_tensor, options.free_scales)
            sim = simulated(model, chain, chosen, calibration, options.backend)
            seconds = time.monotonic() - started
            got = logits(sim.model, test)
            own = (got.argmax(1) == truth).float()
            difference = 100 * (own - hits)
            interval = 1.96 * difference.std() / len(truth) ** 0.5
            sqnr = 10 * torch.log10(expected.square().sum() / (got - expected).square().sum())
            print(
                f"| {widths} | {chain} | {100 * own.mean():.2f} | {difference.mean():+.2f} ± {interval:.2f} | "
                f"{sqnr:.1f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
