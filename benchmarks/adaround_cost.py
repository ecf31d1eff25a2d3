"""AdaRound against AIMET's own, weights only, per channel: the same network, images, iterations and batch size.

    python benchmarks/adaround_cost.py --data-path DIR --network models.py:cifar10_resnet20 --weights WEIGHTS
        [--bits 4] [--iterations 200] [--aimet-iterations 200 …] [--batch-size 32] [--max-eval-batches N]

DIR holds CIFAR-10. 512 calibration images; scales by `mse`, free as AIMET's and 2^k. Process CPU seconds on one thread,
one run each, and the accuracy with rounded weights and float activations. AIMET returns soft weights, which lie on no
grid; they are rounded by the encodings that it writes beside them, as its simulation does. Needs aimet-torch.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from pow2quant import datasets, models, simulate
from pow2quant.config import DataConfig, QuantPlan
from pow2quant.methods.adaround import AdaRound

CALIBRATION_BATCHES = 16
AIMETS_BATCH_SIZE = 32
"""Images that AIMET draws in a step; it has no parameter for it."""


def timed(label: str, work: Callable[[], nn.Module], test: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Prints and returns the CPU seconds of `work`, whose result is scored."""
    torch.manual_seed(0)
    start = time.process_time()
    network = work()
    seconds = time.process_time() - start
    levels = max(len(set(row.tolist())) for p in network.parameters() if p.ndim > 1 for row in p.detach().flatten(1))
    with torch.no_grad():
        hits = torch.cat([network(x).argmax(1) == y for x, y in test])
    accuracy = 100 * hits.float().mean()
    print(f"{label}: {seconds:.1f} s, {accuracy:.2f} % of {len(hits):,}, {levels} levels a channel at most", flush=True)
    return seconds


@torch.no_grad()
def put_on_grid(network: nn.Module, encodings: Path, bits: int) -> None:
    """Every weight at the nearest code of its encoding, (C,) of them."""
    for name, channels in json.loads(encodings.read_text())["param_encodings"].items():
        weight = network.get_parameter(name)
        scale = torch.tensor([channel["scale"] for channel in channels]).view(-1, *[1] * (weight.ndim - 1))
        weight.copy_((weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--aimet-iterations", type=int, nargs="+", help="default: as many")
    parser.add_argument("--batch-size", type=int, default=AIMETS_BATCH_SIZE, help="ours")
    parser.add_argument("--max-eval-batches", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    data = datasets.load(DataConfig("cifar10", options.data_path, batch_size=32))
    calibration = [x for x, _ in islice(data.calibration, CALIBRATION_BATCHES)]
    test = list(islice(data.test, options.max_eval_batches))
    model = models.build(options.network, weights=options.weights).eval()

    def aimets(iterations: int) -> nn.Module:
        from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
        from aimet_torch.batch_norm_fold import fold_all_batch_norms
        from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config

        network = copy.deepcopy(model)
        fold_all_batch_norms(network, calibration[0].shape, dummy_input=calibration[0])
        parameters = AdaroundParameters(calibration, len(calibration), iterations)
        with tempfile.TemporaryDirectory() as folder:
            rounded = Adaround.apply_adaround(
                network,
                calibration[0],
                parameters,
                folder,
                "adaround",
                options.bits,
                default_config_file=get_path_for_per_channel_config(),
            )
            put_on_grid(rounded, Path(folder) / "adaround.encodings", options.bits)
        return rounded

    def ours(power_of_2: bool) -> nn.Module:
        plan = QuantPlan.default(options.bits)
        assert plan.weight is not None
        weight = replace(plan.weight, power_of_2=power_of_2)
        sim = simulate(model, calibration[0], QuantPlan(weight, None, None, None))
        sim.calibrate(calibration)
        AdaRound(options.iterations, batch_size=options.batch_size).apply(sim, calibration)
        return sim.model

    counts = options.aimet_iterations or [options.iterations]
    theirs = {n: timed(f"AIMET, {n} iterations", lambda n=n: aimets(n), test) for n in counts}
    for label, power_of_2 in (("free scales", False), ("2^k", True)):
        own = timed(f"ours, {label}, {options.iterations} iterations", lambda p=power_of_2: ours(p), test)
        print("; ".join(f"AIMET, {n} iterations / ours: {seconds / own:.2f}" for n, seconds in theirs.items()))


if __name__ == "__main__":
    main()
