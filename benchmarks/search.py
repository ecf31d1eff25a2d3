"""Mixed precision against uniform widths: the same methods, images and seed, differences of the same images.

    python benchmarks/search.py --network models.py:cifar10_resnet20 --weights resnet20.safetensors --data cifar10
        --data-path DIR [--config FILE.yaml] [--average-bits 4 5.2] [--uniform 3 4 5 6 8] [--like-uniform 6]
        [--activation-bits 8] [--sensitivity kl] [--method …] [--calibration-batches 8] [--test-batches N]

Networks and weights are your own. Plans are those of the integer program alone, without a look at the test images:
least predicted loss at an average of so many weight bits, or at the size of a uniform width. Prints a markdown row per
plan: bytes as `pow2quant search` counts them, accuracy in per cent, and its difference in points from the float network
and from the uniform width of the same average (rounded down), each with the interval of 95 %.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from pow2quant import config as configuration
from pow2quant.cli.console import Console
from pow2quant.config import RunConfig
from pow2quant.study.candidates import uniform
from pow2quant.study.search import Search


@torch.inference_mode()
def hits(model: nn.Module, work: Search, limit: int | None) -> Tensor:
    """1 for every test image that is classified as its label says, (N,)."""
    return torch.cat([(model(x.clone()).argmax(1) == y).float() for x, y in islice(work.job.data.test, limit)])


def interval(own: Tensor, other: Tensor) -> str:
    difference = 100 * (own - other)
    return f"{difference.mean():+.2f} ± {1.96 * difference.std() / len(own) ** 0.5:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-path")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--average-bits", nargs="*", default=[])
    parser.add_argument("--uniform", nargs="*", default=["3", "4", "5", "6", "8"])
    parser.add_argument("--like-uniform", nargs="*", default=[], help="plans of the size of these uniform widths")
    parser.add_argument("--activation-bits", type=int)
    parser.add_argument("--candidates", nargs="+", default=["2", "3", "4", "5", "6", "8"])
    parser.add_argument("--sensitivity", nargs="+", default=["kl"])
    parser.add_argument("--sensitivity-batches", type=int, default=4)
    parser.add_argument("--method", nargs="*", help="methods, in order; default: those of `ptq`")
    parser.add_argument("--calibration-batches", type=int, default=8)
    parser.add_argument("--test-batches", type=int)
    parser.add_argument("--backend", default="custom")
    options = parser.parse_args()
    values = {
        "backend": options.backend,
        "model.name": options.network,
        "model.weights": options.weights,
        "data.dataset": options.data,
        "data.path": options.data_path,
        "quantization.output.bitwidth": options.activation_bits,
        "quantization.input.bitwidth": options.activation_bits and max(8, options.activation_bits),
        "ptq.calibration_batches": options.calibration_batches,
        "ptq.methods": options.method,
        "ptq.max_eval_batches": 1,
        "search.objective": "accuracy",
        "search.constraints": ["average_bits=16"],
        "search.candidates": list(dict.fromkeys([*options.candidates, *options.uniform])),
        "search.sensitivity": options.sensitivity[0],
        "search.sensitivity_batches": options.sensitivity_batches,
    }
    base = configuration.load(options.config) if options.config else RunConfig()
    config = configuration.with_values(base, {key: value for key, value in values.items() if value is not None})
    work = Search.start(config, Console())
    exact = hits(work.job.model, work, options.test_batches)
    print(f"float: {100 * exact.mean():.2f} % of {len(exact)}\n")
    print("| plan | kB | bits | accuracy | against float | against uniform |\n|---|---|---|---|---|---|", flush=True)
    done: dict[str, Tensor] = {}

    def show(name: str, plan: dict[str, str], against: str | None) -> None:
        sim = work.simulations.get(("weight", name)) or work.quantized(work.job_of(plan))
        own = hits(sim.model, work, options.test_batches)
        done[name] = own
        size, bits = (work.problem.value(quantity, plan) for quantity in ("size", "average_bits"))
        compared = "" if against not in done else f"{interval(own, done[str(against)])} (W{against})"
        row = [name, f"{size / 1e3:.1f}", f"{bits:.2f}", f"{100 * own.mean():.2f}", interval(own, exact), compared]
        print(f"| {' | '.join(row)} |", flush=True)

    for width in options.uniform:
        show(width, uniform(work.groups, "weight", width), None)
    for metric in options.sensitivity:
        if metric != options.sensitivity[0]:
            work.measure(metric)
        for bits in options.average_bits:
            plan = work.problem.least("loss", {"average_bits": float(bits)})
            show(f"{metric}, {bits} bits", plan or {}, str(int(float(bits))))
        for width in options.like_uniform:
            size = work.problem.value("size", uniform(work.groups, "weight", width))
            plan = work.problem.least("loss", {"size": size})
            show(f"{metric}, size of W{width}", plan or {}, width)


if __name__ == "__main__":
    main()
