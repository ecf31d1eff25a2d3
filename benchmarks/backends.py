"""The two backends on one network, after each chain of methods: equal encodings, parameters and bits in every executor?

    python benchmarks/backends.py [--network NAME --weights FILE --data NAME --data-path DIR] [--plans …] [--chains …]

Without a network: torchvision's resnet18 and mobilenet_v2 with random weights at 64 x 64. Plans: w8a8, w4a8, w8a8t (per
tensor), w8a8s (symmetric activations). Chains as in methods.py. The executors are onnxruntime without and with all
optimizations, the engine and the generated C. Prints one line per network, plan and chain; exit status 1 when anything
differs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import torch
from chains import Chains
from families import images, with_statistics
from torch import Tensor, nn

from pow2quant import datasets, models
from pow2quant.adapters import onnx_qdq
from pow2quant.config import DataConfig, QuantPlan
from pow2quant.runs import executors, simulation_executor
from pow2quant.validation.agreement import compare


def plan(name: str) -> QuantPlan:
    """w8a8, w4a8, with t for per-tensor weights or s for symmetric activations."""
    weight, activation = (int(bits) for bits in name[1:].rstrip("ts").split("a"))
    made = QuantPlan.default(weight, activation, per_tensor=name.endswith("t"))
    assert made.input is not None
    assert made.output is not None
    if not name.endswith("s"):
        return made
    return replace(made, input=replace(made.input, symmetric=True), output=replace(made.output, symmetric=True))


def try_one(
    label: str, model: nn.Module, calibration: Sequence[Tensor], test: Sequence[Tensor], name: str, chain: str
) -> bool:
    """One network, plan and chain; prints its line and says whether nothing differs."""
    cpu = torch.device("cpu")
    chains = Chains(model, calibration)
    custom, aimet = (chains.simulation(chain, plan(name), backend)[0] for backend in ("custom", "aimet"))
    tables = custom.encodings(), aimet.encodings()
    unequal = sum(tables[0].get(key) != tables[1].get(key) for key in {*tables[0], *tables[1]})
    names = [key for key, _ in custom.network.named_parameters()]
    moved = sum(not torch.equal(custom.parameter(key), aimet.parameter(key)) for key in names)
    artifact = aimet.export(calibration[0])
    with tempfile.TemporaryDirectory() as folder:
        path = onnx_qdq.export_qdq(artifact, Path(folder))
        others = [simulation_executor(aimet, "aimet", cpu), *executors(path, None, {})]
        found = compare(simulation_executor(custom, "custom", cpu), others, ([x.numpy()] for x in test), artifact)
    differing = ", ".join(f"{a.executor} {a.differing}" for a in found)
    print(
        f"{label} {name}, {chain}: {unequal} of {len(tables[0])} encodings and {moved} of {len(names)} parameters "
        f"differ; of {found[0].elements:,} logits differ from custom: {differing}",
        flush=True,
    )
    return unequal == moved == 0 and all(a.agrees for a in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network")
    parser.add_argument("--weights")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-path")
    parser.add_argument("--plans", nargs="+", default=["w8a8", "w4a8", "w8a8t", "w8a8s"])
    parser.add_argument("--chains", nargs="+", default=["none"], metavar="CHAIN")
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    results = []
    both = list(product(options.plans, options.chains))
    if options.network:
        data = datasets.load(DataConfig(dataset=options.data, path=options.data_path))
        model = models.build(options.network, weights=options.weights)
        calibration = [x for x, _ in islice(data.calibration, 4)]
        test = [x for x, _ in islice(data.test, options.batches)]
        results = [try_one(options.network, model, calibration, test, *one) for one in both]
    else:
        for network in ("resnet18", "mobilenet_v2"):
            torch.manual_seed(0)
            model = with_statistics(models.build(f"torchvision:{network}"), images(8, 64, 1))
            calibration, test = images(64, 64, 2).split(16), images(64, 64, 3).split(16)
            results += [try_one(network, model, calibration, test, *one) for one in both]
    raise SystemExit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
