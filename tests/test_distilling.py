"""The float network inside the loss, and the moving average of the weights."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from pow2quant import datasets, models
from pow2quant.backends.base import Simulation
from pow2quant.config import DataConfig, QuantPlan, TrainingConfig
from pow2quant.methods.reconstruction import blocks
from pow2quant.runs import simulate
from pow2quant.tasks.classification import Classification
from pow2quant.training.averaging import Average
from pow2quant.training.trainer import Trainer

SHORT = TrainingConfig(epochs=2, learning_rate=1e-3, mode="full", batch_norm="folded", distillation=1.0)


@pytest.fixture(scope="module")
def data() -> datasets.Data:
    whole = datasets.load(DataConfig(), 64)
    few = [list(islice(batches, 4)) for batches in (whole.calibration, whole.train, whole.test)]
    return replace(whole, calibration=few[0], train=few[1], test=few[2])


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return models.trained_digits_cnn()


def simulated(network: nn.Module, data: datasets.Data) -> Simulation:
    images = [x for x, _ in data.calibration]
    sim = simulate(network, images[0][:1], QuantPlan.default(3, 3))
    sim.calibrate(images)
    return sim


def trainer_of(
    sim: Simulation, data: datasets.Data, network: nn.Module, config: TrainingConfig, folder: Path | None = None
) -> Trainer:
    parameters = {name: sim.parameter(name) for name in dict(sim.network.named_parameters())}
    return Trainer(sim, parameters, data, network, config, Classification([(10,)]), folder=folder)


def test_the_average_is_that_of_its_equation_and_changes_places_with_the_weights() -> None:
    weights = [torch.tensor([1.0, -2.0]), torch.tensor([[4.0]])]
    average, expected = Average(weights, 0.6), [w.clone() for w in weights]
    for step in range(20):
        for w in weights:
            w.mul_(1.1).add_(0.3)
        average.advance()
        d = min(0.6, (1 + step) / (10 + step))
        expected = [d * e + (1 - d) * w for e, w in zip(expected, weights, strict=True)]
    last = [w.clone() for w in weights]
    with average.taken():
        torch.testing.assert_close(weights, expected)
    assert all(torch.equal(w, x) for w, x in zip(weights, last, strict=True))


def test_what_is_measured_and_kept_is_the_average(data: datasets.Data, network: nn.Module) -> None:
    plain, averaged = (
        trainer_of(simulated(network, data), data, network, replace(SHORT, epochs=1, average=average))
        for average in (0.0, 0.9)
    )
    for trainer in (plain, averaged):
        trainer.run()
    pairs = zip(plain.tensors, averaged.average.values, strict=True)  # these have changed places with the weights
    assert all(torch.equal(own, last) for own, last in pairs)
    pairs = zip(plain.tensors, averaged.tensors, strict=True)
    assert not any(torch.equal(own, average) for own, average in pairs if own.ndim > 1)
    assert averaged.history[-1].accuracy == averaged.accuracy()


def test_the_average_is_in_the_checkpoint(data: datasets.Data, network: nn.Module, tmp_path: Path) -> None:
    def trainer(folder: str) -> Trainer:
        (tmp_path / folder).mkdir(exist_ok=True)
        config = replace(SHORT, average=0.9)
        return trainer_of(simulated(network, data), data, network, config, tmp_path / folder)

    whole, cut, resumed = trainer("whole"), trainer("cut"), trainer("cut")
    whole.run()
    with cut.training():
        cut._measure(None, 0.0)
        cut._train_epoch()
    resumed.run(resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, resumed.tensors, strict=True))


def test_features_are_what_blocks_compute(data: datasets.Data, network: nn.Module) -> None:
    """The mean over the blocks of the error's energy by that of the float network; its gradient reaches every layer."""
    sim, (x, _) = simulated(network, data), data.train[0]
    trainer = trainer_of(sim, data, network, replace(SHORT, distillation=0.0, feature_distillation=3.0))
    ends = [part[-1] for part in blocks(sim)]
    exact: dict[str, torch.Tensor] = {}
    for end in ends:
        module = sim.network.get_submodule(str(end.target))
        module.register_forward_hook(lambda _, __, y, name=end.name: exact.setdefault(name, y))
    with torch.no_grad():
        sim.network(x)
    with trainer.training():
        result = sim.model(x)
        loss = trainer.distillation.loss(result, [x])
        loss.backward()
    errors = []
    for end in ends:
        value = trainer.distillation.watched[sim.placement.quantized[end.name].name].detach()
        errors.append(float((value - exact[end.name]).square().sum() / exact[end.name].square().sum()))
    assert len(errors) > 3
    assert float(loss.detach()) == pytest.approx(3 * sum(errors) / len(errors), rel=1e-5)
    assert torch.equal(value, result)
    assert all(float(t.grad.abs().sum()) > 0 for t in trainer.tensors if t.ndim > 1)
