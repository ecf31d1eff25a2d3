"""The power-of-two tax: what scales of 2^k cost against free ones, and what range alignment wins back.

    python benchmarks/tax.py --network models.py:cifar10_resnet20 --weights resnet20.safetensors --data cifar10
        --data-path DIR [--widths 8:8 4:8 4:4] [--chains none "output_mse, bias_correction"]
        [--calibration-batches 8] [--test-batches N] [--backend custom]

Networks and weights are your own. A markdown row per width and chain: top-1 in per cent and the logits' SQNR with free
scales, with 2^k, and with 2^k after `align`; then the paired difference of the last two, with its interval of 95 %.
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch
from chains import Chains
from methods import logits, plan, widths

from pow2quant import datasets, models
from pow2quant.config import DataConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-path")
    parser.add_argument("--widths", nargs="+", default=["8:8", "4:8", "4:4"], metavar="W:A")
    parser.add_argument("--chains", nargs="+", default=["none", "output_mse, bias_correction"])
    parser.add_argument("--calibration-batches", type=int, default=8)
    parser.add_argument("--test-batches", type=int)
    parser.add_argument("--backend", default="custom")
    options = parser.parse_args()
    data = datasets.load(DataConfig(dataset=options.data, path=options.data_path))
    model = models.build(options.network, weights=options.weights).eval()
    calibration = [x for x, _ in islice(data.calibration, options.calibration_batches)]
    test, labels = zip(*islice(data.test, options.test_batches), strict=True)
    truth, expected = torch.cat(labels), logits(model, test)
    print(f"float: {100 * (expected.argmax(1) == truth).float().mean():.2f} % of {len(truth)}\n")
    print("| widths | methods | free scales | 2^k | 2^k, aligned | won by it |\n|---|---|---|---|---|---|", flush=True)
    chains = Chains(model, calibration)
    for bits in options.widths:
        for chain in options.chains:
            aligned = "align" if chain == "none" else f"align, {chain}"
            hits, cells = [], []
            for methods, free in ((chain, True), (chain, False), (aligned, False)):
                chosen = plan(*widths(bits), per_tensor=False, free=free)
                got = logits(chains.simulation(methods, chosen, options.backend)[0].model, test)
                hits.append(100 * (got.argmax(1) == truth).float())
                sqnr = 10 * torch.log10(expected.square().sum() / (got - expected).square().sum())
                cells.append(f"{hits[-1].mean():.2f} ({sqnr:.1f} dB)")
            won = hits[2] - hits[1]
            interval = 1.96 * won.std() / len(truth) ** 0.5
            print(f"| {bits} | {chain} | {' | '.join(cells)} | {won.mean():+.2f} ± {interval:.2f} |", flush=True)


if __name__ == "__main__":
    main()
