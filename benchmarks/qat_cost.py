"""What a training step costs, in FP32 training steps on the same batch, measured side by side in one run.

    python benchmarks/qat_cost.py [resnet18 …] [--size 64] [--batch 32] [--rounds 7]

Process CPU time on one thread, the median of interleaved rounds; a step is forward, backward and SGD. FP32 is the
network as users train it (batch norm live) and, second ratio, with batch norm folded, as it is in the quantized step.
Our full step is measured without compiled C, too. With aimet-torch installed: our step on its simulation, and its own
(its quantizers, its trained ranges). FP32 and AIMET's own run with channels first and last, and the faster one counts;
ours trains with channels last.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from importlib.util import find_spec
from unittest.mock import patch

import torch
from cost import interleaved
from families import images, with_statistics
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant import datasets, models
from pow2quant.backends import fake_quant
from pow2quant.backends.base import Simulation
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.config import Choice, QuantPlan, TrainingConfig
from pow2quant.frontends.prepare import prepare
from pow2quant.runs import simulate
from pow2quant.tasks.classification import Classification
from pow2quant.training.trainer import LAYOUT, Trainer

LAST = ", channels last"


def trainer_of(sim: Simulation, data: datasets.Data, network: nn.Module, mode: str) -> Trainer:
    """A trainer with SGD, so that the optimizer is no part of the comparison."""
    parameters = {name: sim.parameter(name) for name in dict(sim.network.named_parameters())}
    config = TrainingConfig(
        mode=mode, learning_rate=1e-6, optimizer=Choice("SGD"), scheduler=None, batch_size=len(data.train[0][0])
    )
    return Trainer(
        sim=sim,
        parameters=parameters,
        data=data,
        network=network,
        config=config,
        task=Classification([(data.num_classes,)]),
    )


def plain_step(model: nn.Module, batch: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of torch as everybody writes it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-6)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()

    return step


def in_both_layouts(label: str, model: nn.Module, batch: Tensor, labels: Tensor) -> dict[str, Callable[[], None]]:
    """Its step with channels first, and a copy's with channels last."""
    copy = deepcopy(model).to(memory_format=LAYOUT)
    last = batch.to(memory_format=LAYOUT)
    return {label: plain_step(model, batch, labels), label + LAST: plain_step(copy, last, labels)}


def quantized_step(trainer: Trainer, batch: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of ours."""

    return lambda: trainer.step(batch, labels)


def without_c(step: Callable[[], None]) -> Callable[[], None]:
    """The step where nothing can be compiled."""

    def plain() -> None:
        with patch.object(fake_quant, "fused", lambda x: None):
            step()

    return plain


def measure(name: str, size: int, batch_size: int, rounds: int) -> None:
    """Prints one network's ratios."""
    torch.manual_seed(0)
    model = with_statistics(models.build(f"torchvision:{name}"), images(8, size, 1))
    batch, labels = images(batch_size, size, 2), torch.arange(batch_size)
    data = datasets.Data([(batch, labels)], [(batch, labels)], [(batch, labels)], 1000, ("",) * 1000, batch.shape[1:])
    network = prepare(model, batch[:1])
    tasks = in_both_layouts("FP32", model.train(), batch, labels)
    tasks |= in_both_layouts("FP32, folded", fold_batch_norm(prepare(model, batch[:1])), batch, labels)
    backends = ["custom", *(["aimet"] if find_spec("aimet_torch") else [])]
    with ExitStack() as stack:
        for backend in backends:
            for mode in ("weights", "full"):
                sim = simulate(network, batch[:1], QuantPlan.default(8, 8), backend)
                sim.calibrate([batch])
                trainer = trainer_of(sim, data, network, mode)
                stack.enter_context(trainer.training())
                tasks[f"{backend}, {mode}"] = quantized_step(trainer, batch, labels)
        tasks["custom, full, without C"] = without_c(tasks["custom, full"])
        if "aimet" in backends:
            sim = simulate(network, batch[:1], QuantPlan.default(8, 8), "aimet")
            sim.calibrate([batch])
            tasks |= in_both_layouts("AIMET's own, full", sim.model, batch, labels)
        times = interleaved(tasks, rounds)
    for label in [label for label in times if label.endswith(LAST)]:
        first = label.removesuffix(LAST)
        times[first] = min(times[first], times.pop(label))
    print(f"{name}: FP32 step {times['FP32']:.3f} s for {batch_size} images at {size} x {size}")
    for label, seconds in list(times.items())[1:]:
        ratio, of_folded = seconds / times["FP32"], seconds / times["FP32, folded"]
        print(f"  {label:24s} {ratio:5.2f} of FP32, {of_folded:5.2f} of folded", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        measure(name, options.size, options.batch, options.rounds)


if __name__ == "__main__":
    main()
