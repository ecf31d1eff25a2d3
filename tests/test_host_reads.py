"""Training on another device: no step waits for it.

The `meta` device has shapes and no values: whatever reads one there, by `.item()`, `float`, `bool`, `.tolist()`,
`.cpu()` or `.numpy()`, fails. So these tests need no GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pow2quant import datasets
from pow2quant.config import Choice, QuantPlan, TrainingConfig
from pow2quant.errors import TrainingError
from pow2quant.frontends.prepare import prepare
from pow2quant.methods.adaround import AdaRound
from pow2quant.methods.qdrop import QDrop, learned_scales
from pow2quant.methods.reconstruction import blocks, quantizing, walk
from pow2quant.methods.rounding import SoftWeight
from pow2quant.runs import simulate
from pow2quant.tasks.classification import Classification
from pow2quant.training.losses import EVERY, Losses
from pow2quant.training.trainer import Trainer

META = torch.device("meta")


class Network(nn.Module):
    """Convolutions with batch norm, a residual sum, a depthwise one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last((x + self.depthwise(x)).mean((2, 3)))


def batch() -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def calibrated(bits: int = 4, *, power_of_2: bool = True):
    torch.manual_seed(0)
    network = prepare(Network().eval(), batch()[:1])
    plan = QuantPlan(weight_bits=bits)
    plan = replace(plan, output=replace(plan.output, power_of_2=power_of_2))
    sim = simulate(network, batch()[:1], plan, "custom")
    sim.calibrate([batch()])
    return sim, network


def trainer_on_meta(config: TrainingConfig, bits: int = 4) -> Trainer:
    sim, network = calibrated(bits)
    for model in (sim.model, network):
        model.to(META)
    labels = torch.arange(8) % 4
    data = datasets.Data([(batch(), labels)], [(batch(), labels)], [(batch(), labels)], 4, ("",) * 4, (3, 6, 6))
    parameters = {name: sim.parameter(name) for name in dict(sim.network.named_parameters())}
    return Trainer(sim, parameters, data, network, config, Classification([(4,)]), device=META)


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, 4),
        ({"exponents": "lsq", "distillation": 0.5, "gradient_clip": 1.0}, 4),
        ({"mode": "weights", "exponents": "fixed", "batch_norm": "frozen"}, 4),
        ({"feature_distillation": 1.0, "average": 0.9, "freeze_exponents": 0.0}, 4),
        ({"ternary": "ttq"}, 2),
        ({"ternary": "learned", "optimizer": Choice("SGD", {"momentum": 0.9})}, 2),
    ],
)
def test_no_training_step_reads_from_the_device(changes, bits):
    config = replace(TrainingConfig(mode="full", batch_size=8, epochs=2 * EVERY), **changes)
    trainer = trainer_on_meta(config, bits)
    with trainer.training():
        for _ in range(2):
            trainer.step(batch(), torch.arange(8) % 4)
    with pytest.raises(RuntimeError, match="meta"):
        trainer.losses.read()


@pytest.mark.parametrize("power_of_2", [True, False])
def test_no_iteration_of_adaround_and_qdrop_reads_from_the_device(power_of_2):
    sim, _ = calibrated(power_of_2=power_of_2)
    table = sim.encodings()
    sim.model.to(META)
    learning = AdaRound(iterations=4), QDrop(iterations=4)
    parts = 0
    for step in walk(sim, [batch()], blocks(sim)):
        weights = {y.weight.name: SoftWeight(sim.parameter(y.weight.name), table[y.weight.name]) for y in step.layers}
        scales = learned_scales(sim, step)
        learning[0].learn(step, weights, quantizing(table))
        learning[1].learn(step, weights, learning[1]._dropping(sim, scales), [s.theta for s in scales.values()], 0.01)
        parts += len(scales)
    assert parts > 1


def test_losses_of_another_device_are_read_now_and_then_and_say_which_step_diverged():
    def diverged(what: str, ago: int) -> TrainingError:
        return TrainingError(f"{what}, {ago} steps ago")

    fine = [torch.zeros(3)]
    losses = Losses(1.0, diverged, META)
    for _ in range(EVERY - 2):
        losses.add(torch.tensor(2.0), fine, 4)
    assert losses.samples == 0
    losses.add(torch.tensor(torch.nan), fine, 4)
    with pytest.raises(TrainingError, match="the loss is nan, 1 steps ago"):
        losses.add(torch.tensor(1.0), fine, 4)
    assert (losses.total, losses.samples) == (8.0 * (EVERY - 2), 4 * (EVERY - 2))
    at_once = Losses(1.0, diverged, torch.device("cpu"))
    at_once.add(torch.tensor(2.0), fine, 4)
    assert (at_once.total, at_once.samples, at_once.smoothed) == (8.0, 4, 2.0)
    with pytest.raises(TrainingError, match="a gradient is not finite, 0 steps ago"):
        at_once.add(torch.tensor(2.0), [torch.tensor([0.0, torch.inf])], 4)
