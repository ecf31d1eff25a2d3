"""The float network or a teacher inside the loss, and the moving average of the weights."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pow2quant import datasets, models
from pow2quant.backends.base import SILENT, Simulation
from pow2quant.config import DataConfig, QuantPlan, RunConfig, TrainingConfig, load, with_values
from pow2quant.errors import ConfigError, Pow2QuantError
from pow2quant.methods.reconstruction import blocks
from pow2quant.runs import simulate, start
from pow2quant.tasks.choosing import task_of
from pow2quant.tasks.classification import Classification
from pow2quant.three_steps import qat
from pow2quant.training import distilling
from pow2quant.training.averaging import Average
from pow2quant.training.distilling import divergence
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
    sim: Simulation,
    data: datasets.Data,
    network: nn.Module,
    config: TrainingConfig,
    folder: Path | None = None,
    teacher: nn.Module | None = None,
) -> Trainer:
    parameters = {name: sim.parameter(name) for name in dict(sim.network.named_parameters())}
    return Trainer(sim, parameters, data, network, config, Classification([(10,)]), teacher, folder=folder)


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
        loss = trainer.distillation.loss([result], [x])
        loss.backward()
    errors = []
    for end in ends:
        value = trainer.distillation.watched[sim.placement.quantized[end.name].name].detach()
        errors.append(float((value - exact[end.name]).square().sum() / exact[end.name].square().sum()))
    assert len(errors) > 3
    assert float(loss.detach()) == pytest.approx(3 * sum(errors) / len(errors), rel=1e-5)
    assert torch.equal(value, result)
    assert all(float(t.grad.abs().sum()) > 0 for t in trainer.tensors if t.ndim > 1)


@pytest.mark.parametrize("features", [0.0, 3.0])
def test_a_teacher_takes_the_place_of_the_float_network_s_logits_alone(
    data: datasets.Data, network: nn.Module, features: float
) -> None:
    """Features are still those of the float network."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    before = [t.clone() for t in teacher.state_dict().values()]
    config = replace(SHORT, distillation=0.5, temperature=2.0, feature_distillation=features)
    losses = []
    for one in (teacher, None):
        trainer = trainer_of(simulated(network, data), data, network, config, teacher=one)
        with trainer.training(), torch.no_grad():
            result = trainer.sim.model(data.train[0][0])
            losses.append(float(trainer.distillation.loss([result], [data.train[0][0]])))
    with torch.no_grad():
        logits = [one(data.train[0][0]) for one in (teacher, network)]
    differences = [0.5 * float(divergence(result, one, 2.0)) for one in logits]
    assert losses[0] - losses[1] == pytest.approx(differences[0] - differences[1], rel=1e-4)
    assert losses[0] > losses[1]
    trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values(), strict=True))


NETWORKS = """
import torch
from torch import nn


def wide(num_classes=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, num_classes))


def hundred():
    return wide(100)
"""


def configured(tmp_path: Path, name: str = "wide", weights: str | None = None, **training: object) -> RunConfig:
    (tmp_path / "networks.py").write_text(NETWORKS)
    values = {
        "ptq.methods": [],
        "ptq.calibration_batches": 2,
        "ptq.max_eval_batches": 1,
        "training.epochs": 1,
        "training.distillation": 1.0,
        "training.teacher": {"name": f"{tmp_path}/networks.py:{name}", "weights": weights},
    }
    return with_values(RunConfig(), values | {f"training.{key}": value for key, value in training.items()})


@pytest.mark.parametrize("pixels", [False, True])
def test_a_run_learns_from_the_teacher_that_its_configuration_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    configuration = configured(tmp_path)
    values = {"training.teacher.name": "networks.py:wide"} | ({"data.input": "pixels"} if pixels else {})
    runs = [
        qat(with_values(configuration, values), tmp_path / "taught"),
        qat(with_values(configuration, values | {"training.teacher": None}), tmp_path / "alone"),
    ]
    losses = [
        json.loads((run.folder / "training_metrics.json").read_text())["epochs"][-1]["loss"] for run in runs if run
    ]
    assert losses[0] > 2 * losses[1], "it knows nothing, the network's own logits are near"
    kept = load(tmp_path / "taught" / "config.yaml").training.teacher
    assert kept is not None
    assert kept.name == f"{tmp_path}/networks.py:wide"


def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_quantized(tmp_path: Path) -> None:
    for values, message in (
        (
            {"name": "hundred"},
            r"training.teacher: .*:hundred gives \(1, 100\) for a sample; the network gives \(1, 10\)",
        ),
        ({"distillation": 0.0}, "training.teacher: needs training.distillation above 0"),
        ({"weights": str(tmp_path / "none.pt")}, "none.pt"),
    ):
        with pytest.raises(Pow2QuantError, match=message):
            qat(configured(tmp_path, **values), tmp_path / "run")
        assert sorted(p.name for p in tmp_path.iterdir() if "run" in p.name) == []


def test_a_teacher_has_no_default() -> None:
    with pytest.raises(ConfigError, match=r"training.teacher.name: missing"):
        with_values(RunConfig(), {"training.teacher": {"num_classes": 10}})


def test_what_ptq_draws_does_not_depend_on_the_teacher(tmp_path: Path) -> None:
    job = start(configured(tmp_path), SILENT)
    state = torch.get_rng_state()
    assert job.teacher() is not None
    assert torch.equal(torch.get_rng_state(), state)


def rounded(loss: torch.Tensor) -> float:
    return round(float(loss), 4)


def distillation_of(task: str, shape: tuple[int, ...], probable: bool = False) -> distilling.Distillation:
    judged = task_of(task, None, None, [shape], probable)
    identity = nn.Identity()
    sim: Any = SimpleNamespace(network=identity)
    return distilling.Distillation(TrainingConfig(distillation=1.0), judged, identity, None, sim, torch.device("cpu"))


def test_one_output_for_two_classes_is_distilled_as_two_logits() -> None:
    student, teacher = torch.randn(6, 1), torch.randn(6, 1)
    both = [torch.cat([x, torch.zeros_like(x)], 1) for x in (student, teacher)]
    wanted = rounded(divergence(*both, 1.0))
    assert wanted > 0
    targets = torch.zeros(6, dtype=torch.int64)
    found = distillation_of("classification", (1,)).loss([student], [teacher], targets)
    assert rounded(found) == wanted
    assert rounded(distillation_of("classification", ()).loss([student[:, 0]], [teacher[:, 0]], targets)) == wanted
    probable = distillation_of("classification", (1,), probable=True)
    assert rounded(probable.loss([student.sigmoid()], [teacher.sigmoid()], targets)) == wanted
    maps, masks = [x.reshape(2, 1, 3, 1) for x in (student, teacher)], targets.reshape(2, 3, 1)
    assert rounded(distillation_of("segmentation", (1, 3, 1)).loss(maps[:1], maps[1:], masks)) == wanted


def test_distillation_is_over_classes_wherever_they_are_and_the_mean_of_pixels() -> None:
    student, teacher = torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    wanted = rounded(divergence(student.flatten(0, 1), teacher.flatten(0, 1), 1.0))
    masks = torch.zeros(4, 5, dtype=torch.int64)
    tokens = distillation_of("segmentation", (5, 3))
    assert rounded(tokens.loss([student], [teacher], masks)) == wanted
    assert rounded(tokens.loss([student.movedim(2, 1)], [teacher.movedim(2, 1)], masks)) == wanted


def test_every_result_is_distilled() -> None:
    pair = torch.randn(6, 3), 100 * torch.randn(6, 4)

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return pair

    found = distillation_of("classification", (3,))
    found.networks = [Two()]
    targets = torch.zeros(6, dtype=torch.int64)
    assert float(found.loss(pair, [pair[0]], targets)) == pytest.approx(0, abs=1e-6)
    assert float(found.loss([pair[0], 1.1 * pair[1]], [pair[0]], targets)) == pytest.approx(0.01, rel=1e-3)
