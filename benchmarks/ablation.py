"""What the functions of a trained network cost as integers, in points of accuracy: Softmax, the norms, GELU, ...

    python benchmarks/ablation.py --network models.py:cifar10_vit --weights vit.safetensors --data cifar10
        --data-path DIR [--bits 8:8] [--chain bias_correction] [--test-batches 16]

Prints a markdown table of paired differences on the test images, with 95 % intervals. *integers*: the network against
the same one that computes this kind in float between the same quantizers; *rounding*: against the one that leaves the
results of this kind float. What is lost in all stands in the first line.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from methods import Bench, add_network, logits, plan, widths
from torch import Tensor

from pow2quant.artifact import Site
from pow2quant.backends.base import Simulation
from pow2quant.frontends.modules.exact import Exact


def kinds(sim: Simulation) -> dict[str, list[tuple[str, Exact]]]:
    """The modules with an integer definition, by the name of their class."""
    found: dict[str, list[tuple[str, Exact]]] = defaultdict(list)
    for name, module in sim.model.named_modules():
        if isinstance(module, Exact) and module.ends is not None:
            found[type(module).__name__].append((name, module))
    return dict(found)


def in_float(sim: Simulation, modules: list[tuple[str, Exact]], images: list[Tensor]) -> Tensor:
    """Logits where these modules compute in float between their quantizers."""
    ends = [module.ends for _, module in modules]
    for _, module in modules:
        object.__setattr__(module, "ends", None)
    try:
        return logits(sim.model, images)
    finally:
        for (_, module), kept in zip(modules, ends, strict=True):
            object.__setattr__(module, "ends", kept)


def not_rounded(sim: Simulation, modules: list[tuple[str, Exact]], images: list[Tensor]) -> Tensor:
    """Logits where the results of these modules stay float."""
    names = {f"{name}.output" for name, _ in modules}

    def tap(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
        return x if site.name in names else quantized

    with sim.intercept(tap):
        return logits(sim.model, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network(parser)
    parser.add_argument("--bits", default="8:8", metavar="W:A")
    parser.add_argument("--chain", default="bias_correction")
    options = parser.parse_args()
    bench = Bench(options)
    sim, _, _ = bench.chains.simulation(options.chain, plan(*widths(options.bits), per_tensor=False, free=False))
    images = list(bench.test)

    def hits(found: Tensor) -> Tensor:
        return (found.argmax(1) == bench.truth).double() * 100

    def change(found: Tensor, before: Tensor) -> str:
        apart = hits(found) - hits(before)
        return f"{apart.mean():+.2f} ± {1.96 * apart.std() / len(apart) ** 0.5:.2f}"

    whole = logits(sim.model, images)
    float_accuracy, accuracy = (hits(x).mean() for x in (bench.expected, whole))
    bits = options.bits.replace(":", "A")
    print(f"{len(bench.truth):,} images, float {float_accuracy:.2f} %, W{bits} {accuracy:.2f} %\n")
    print("| function | modules | integers | rounding |\n|---|---|---|---|")
    print(f"| everything | | | {change(whole, bench.expected)} |", flush=True)
    for kind, modules in kinds(sim).items():
        with torch.no_grad():
            integers, rounding = (f(sim, modules, images) for f in (in_float, not_rounded))
        print(f"| {kind} | {len(modules)} | {change(whole, integers)} | {change(whole, rounding)} |", flush=True)


if __name__ == "__main__":
    main()
