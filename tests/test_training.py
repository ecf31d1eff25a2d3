"""Learned exponents, the training loop, and its checkpoints: equations against references, bits against bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pow2quant import datasets, models
from pow2quant.artifact import Site
from pow2quant.backends.base import Simulation
from pow2quant.config import BATCH_NORMS, Choice, DataConfig, QuantPlan, TrainingConfig
from pow2quant.errors import ConfigError, TrainingError
from pow2quant.pow2_constraints import Encoding, Observed, choose, power_of_two
from pow2quant.pow2_constraints.snap import Format
from pow2quant.runs import simulate
from pow2quant.tasks.classification import Classification
from pow2quant.training import checkpoint, distilling, learning, schedule
from pow2quant.training.batch_norm import MOMENTUM
from pow2quant.training.exponents import OSCILLATES, REACH, RULES, Exponents
from pow2quant.training.trainer import Trainer
from tests.backends import BACKENDS

SHORT = TrainingConfig(epochs=2, learning_rate=1e-3, batch_size=64, mode="full")


@pytest.fixture(scope="module")
def data() -> datasets.Data:
    return datasets.load(DataConfig(), 64)


@pytest.fixture(scope="module")
def network(data: datasets.Data) -> nn.Module:
    return models.trained_digits_cnn()


def simulated(network: nn.Module, data: datasets.Data, bits: int = 4, backend: str = "custom") -> Simulation:
    images = [x for x, _ in data.calibration][:4]
    sim = simulate(network, images[0][:1], QuantPlan.default(bits, bits), backend)
    sim.calibrate(images)
    return sim


def trainer_of(
    sim: Simulation, data: datasets.Data, network: nn.Module, config: TrainingConfig, **more: object
) -> Trainer:
    parameters = {name: sim.parameter(name) for name in dict(sim.network.named_parameters())}
    values = {"sim": sim, "parameters": parameters, "data": data, "network": network, "config": config, **more}
    return Trainer(task=Classification([(10,)]), **values)  # type: ignore[arg-type]


# -- exponents on a simulation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_gradient_descent_finds_the_exponents_of_the_smallest_error(rule, network, data):
    """From two exponents too low, per channel, to those that the exact search by squared error chooses."""
    sim = simulated(network, data)
    names = ["conv4.weight", "fc.weight"]
    best = {
        name: choose("mse", Observed.of(sim.parameter(name).detach().numpy(), 0), Format(4, True, axis=0))
        for name in names
    }
    away = {n: Encoding(power_of_two(e.exponent - 2), e.zero_point, e.grid, e.axis) for n, e in best.items()}
    sim.load({**sim.encodings(), **away})
    exponents = Exponents(sim, names, rule)
    optimizer = torch.optim.Adam(exponents.parameters(), 0.05)
    for _ in range(120):
        optimizer.zero_grad()
        for name in names:
            weight = sim.parameter(name).detach()
            (exponents.quantize(name, weight, False) - weight).square().sum().backward()
        optimizer.step()
        exponents.advance()
    for name, encoding in exponents.table().items():
        weight = sim.parameter(name).detach().numpy()
        start, end, least = (
            np.square(e.fake_quantize(weight) - weight).sum() for e in (away[name], encoding, best[name])
        )
        assert least <= end < 1.5 * least < start / 3
        assert np.abs(encoding.exponent - best[name].exponent).max() <= 1


@pytest.mark.parametrize("rule", RULES)
def test_an_exponent_that_oscillates_is_frozen_at_its_mean_and_others_are_not(rule, network, data):
    exponents = Exponents(simulated(network, data), ["fc.weight"], rule)
    start = exponents.k.clone()
    for turn in range(40):
        with torch.no_grad():
            exponents.values[0] = exponents.rule.middle(torch.tensor(float(turn % 4 != 0)))
        exponents.advance()
    assert exponents.frozen.tolist() == [True] + [False] * (len(start) - 1)
    assert exponents.frequency[1:].max() == 0 < OSCILLATES
    assert exponents.k[0] - start[0] in (0, 1)
    held = exponents.k.clone()
    with torch.no_grad():
        exponents.values[0] = exponents.rule.middle(torch.tensor(3.0))
    assert exponents.advance() == 0
    assert torch.equal(exponents.k, held)


def test_exponents_do_not_run_away(network, data):
    exponents = Exponents(simulated(network, data), ["fc.weight"], "tqt")
    with torch.no_grad():
        exponents.values += torch.linspace(-40, 40, len(exponents.values))
    exponents.advance()
    assert (exponents.k - exponents.calibrated).abs().max() == REACH


def test_a_scale_that_is_no_power_of_two_is_noticed(network, data):
    exponents = Exponents(simulated(network, data), ["fc.weight"], "tqt")
    exponents.calibrated += 0.25
    with pytest.raises(AssertionError, match="not the power of two"):
        exponents.refresh()


# -- live batch norm ---------------------------------------------------------------------------------------------------


def test_a_factor_is_multiplied_in_before_rounding_and_taken_out_again(network, data):
    """Q(f w) / f, and the gradients of that."""
    exponents = Exponents(simulated(network, data), ["conv4.weight"], "tqt")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 24, 3, 3, generator=generator).requires_grad_()
    grad = torch.randn(weight.shape, generator=generator)
    factor = 0.05 + torch.rand(48, generator=generator)
    result = exponents.quantize_scaled("conv4.weight", weight, factor, 0)
    result.backward(grad)
    own = weight.grad, exponents.parameters()[0].grad
    weight.grad = exponents.parameters()[0].grad = None
    factor = factor.view(48, 1, 1, 1)
    plain = exponents.quantize("conv4.weight", weight * factor, False) / factor
    plain.backward(grad)
    torch.testing.assert_close(result, plain)
    torch.testing.assert_close(own, (weight.grad, exponents.parameters()[0].grad), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_before_training_it_is_folded_to_what_ptq_made(backend, network, data):
    sim = simulated(network, data, 3, backend)
    before = {name: sim.parameter(name).detach().clone() for name in dict(sim.network.named_parameters())}
    table, images = sim.encodings(), next(iter(data.test))[0]
    expected = sim.model(images)
    trainer = trainer_of(sim, data, network, SHORT)
    assert sim.encodings() == table
    with trainer.training(), torch.no_grad():
        assert torch.equal(sim.model(images), expected)
    trainer.norms.fold()
    for name, value in before.items():
        torch.testing.assert_close(sim.parameter(name), value, rtol=0, atol=1e-6 if name.endswith("bias") else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unquantized_it_computes_what_the_float_network_computes_in_training(backend, network, data):
    """Logits, gradients and running means and variances."""
    sim = simulated(network, data, 8, backend)
    trainer = trainer_of(sim, data, network, SHORT)
    trainer.learning.active = frozenset()
    pairs = {"conv1": "bn1", "depthwise": "bn2", "pointwise": "bn3", "conv4": "bn4"}
    reference: Any = copy.deepcopy(network).train()
    with torch.no_grad():
        for layer, norm in pairs.items():
            own, theirs = trainer.norms.get(layer), reference.get_submodule(norm)
            scale = own.weight / reference.get_submodule(layer).weight
            assert torch.allclose(scale, scale[:, :1, :1, :1])  # per channel, with the sign of gamma
            scale = scale[:, 0, 0, 0]
            own.gain.copy_(theirs.weight.abs())
            own.shift.copy_(theirs.bias)
            own.mean.copy_(theirs.running_mean * scale)
            own.variance.copy_(theirs.running_var * scale**2)
            theirs.momentum = MOMENTUM
    images, labels = next(iter(data.calibration))
    with trainer.training(), trainer.norms.on_batches(True):
        logits = sim.model(images)
    nn.functional.cross_entropy(logits, labels).backward()
    expected = reference(images)
    nn.functional.cross_entropy(expected, labels).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    for layer, norm in pairs.items():
        own, theirs = trainer.norms.get(layer), reference.get_submodule(norm)
        sign = theirs.weight.sign()
        torch.testing.assert_close(own.gain.grad, theirs.weight.grad * sign, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(own.shift.grad, theirs.bias.grad, rtol=1e-2, atol=1e-4)
        scale = (own.weight / reference.get_submodule(layer).weight)[:, 0, 0, 0].detach()
        torch.testing.assert_close(own.mean, theirs.running_mean * scale, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(own.variance, theirs.running_var * scale**2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_left_in_the_simulation_is_what_was_measured_last(backend, network, data):
    sim = simulated(network, data, 4, backend)
    trainer = trainer_of(sim, data, network, replace(SHORT, freeze_batch_norm=1.0))
    images = next(iter(data.test))[0]
    trainer.run()
    with trainer.training(), torch.no_grad():
        expected = sim.model(images)
    trainer._keep()
    sim.calibrate((), roles={"bias"})
    assert torch.equal(sim.model(images), expected)
    assert not torch.equal(trainer.norms.get("conv4").mean, torch.zeros(48))


def test_a_channel_whose_batch_norm_gives_zero_can_be_trained(network, data):
    dead: Any = copy.deepcopy(network)
    with torch.no_grad():
        dead.bn4.weight[3] = 0.0
    sim = simulated(dead, data)
    trainer = trainer_of(sim, data, dead, replace(SHORT, epochs=1))
    trainer.run()
    assert all(bool(torch.isfinite(p).all()) for p in trainer.learned)
    assert sim.parameter("conv4.weight")[3].abs().max() > 0


def test_one_value_per_channel_is_normalized_with_the_running_statistics(network, data):
    layer = trainer_of(simulated(network, data), data, network, SHORT).norms.get("conv4")
    assert layer is not None
    values, before = torch.randn(1, 48, generator=torch.Generator().manual_seed(0)), layer.mean.clone()
    expected = layer.gain * (values - layer.mean) / torch.sqrt(layer.variance + layer.eps) + layer.shift
    torch.testing.assert_close(layer.normalize(values), expected)
    assert torch.equal(layer.mean, before)


def test_a_network_without_batch_norm_is_trained_as_ever(data):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10))
    results = [
        finished(trainer_of(simulated(plain, data), data, plain, replace(SHORT, epochs=1, batch_norm=kind)))
        for kind in BATCH_NORMS
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_convolutions_of_volumes_are_trained(data):
    torch.manual_seed(0)
    layers = (nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 8, (1, 3, 3)), nn.BatchNorm3d(8), nn.ReLU())
    volumes = nn.Sequential(*layers, nn.Flatten(), nn.Linear(288, 10)).eval()
    trainer = trainer_of(simulated(volumes, data), data, volumes, replace(SHORT, learning_rate=3e-3))
    history = trainer.run()
    assert history[-1].accuracy > history[0].accuracy + 20


# -- the loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["weights", "full"])
def test_scales_are_powers_of_two_after_every_step_and_the_network_learns(backend, mode, network, data):
    sim = simulated(network, data, 2, backend)
    trainer = trainer_of(sim, data, network, replace(SHORT, mode=mode, learning_rate=1e-2))
    seen: list[int] = []
    advance = trainer.exponents.advance

    def checked() -> int:
        flips = advance()
        for encoding in trainer.exponents.table().values():
            seen.append(int(encoding.exponent.size))
        return flips

    trainer.exponents.advance = checked  # type: ignore[method-assign]
    history = trainer.run()
    assert len(seen) == 2 * len(data.train) * len(list(trainer.exponents))
    assert trainer.best["accuracy"] > history[0].accuracy + 2
    table = sim.encodings()
    assert all(e.is_power_of_two for e in table.values())
    assert {s.name for s in sim.sites if s.role in ("weight", "output", "input")} <= table.keys()


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
def test_the_first_twenty_steps_are_the_same_on_both_backends(batch_norm, network, data):
    pytest.importorskip("aimet_torch")
    states = []
    for backend in ("custom", "aimet"):
        config = replace(SHORT, batch_norm=batch_norm, freeze_batch_norm=0.25)  # behind step 10 of 42
        trainer = trainer_of(simulated(network, data, 4, backend), data, network, config)
        with trainer.training():
            for _, (images, labels) in zip(range(20), trainer.batches(), strict=False):
                trainer.step(images, labels)
        states.append([*trainer.learned, trainer.exponents.k])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("active", [True, False])
def test_quantizers_compute_the_relus_in_front_of_them_with_the_same_bits(active, network, data, monkeypatch):
    found, (batch, labels) = [], next(iter(data.train))
    for tops in (learning.TOPS, {}):
        monkeypatch.setattr(learning, "TOPS", tops)
        trainer = trainer_of(simulated(network, data), data, network, TrainingConfig(mode="full"))
        if not active:
            trainer.learning.active = frozenset()
        with trainer.training():
            left = [m for m in trainer.sim.model.modules() if isinstance(m, (nn.ReLU, nn.ReLU6))]
            for _ in range(3):
                trainer.step(batch, labels)
        again = [m for m in trainer.sim.model.modules() if isinstance(m, (nn.ReLU, nn.ReLU6))]
        found.append(([t.detach().clone() for t in trainer.learned], trainer.losses.total, len(left), len(again)))
    (mine, loss, fused, back), (plain, plain_loss, unfused, same) = found
    assert all(map(torch.equal, mine, plain))
    assert loss == plain_loss
    assert fused < unfused == back == same


def test_images_of_one_channel_are_laid_out_as_all_others(network, data):
    trainer = trainer_of(simulated(network, data), data, network, TrainingConfig())
    (placed,) = trainer._placed(torch.zeros(4, 1, 8, 8))
    assert placed.stride() == (64, 1, 8, 1)


def finished(trainer: Trainer, resume: bool = False) -> list[Tensor]:
    trainer.run(resume)
    return [*(p.detach() for p in trainer.learned), torch.tensor(trainer.best["accuracy"])]


OFTEN = replace(SHORT, checkpoint_minutes=1e-9, distillation=0.5, gradual_epochs=1)


@pytest.fixture(scope="module")
def whole(network: nn.Module, data: datasets.Data) -> list[Tensor]:
    return finished(trainer_of(simulated(network, data), data, network, OFTEN))


@pytest.mark.parametrize("stop", [1, 13, 21, 30])
def test_a_resumed_training_gives_the_bits_of_an_uninterrupted_one(stop, whole, network, data, tmp_path):
    interrupted = trainer_of(simulated(network, data), data, network, OFTEN, folder=tmp_path)
    step, steps = interrupted.step, iter(range(1000))

    def killed(images: Tensor, labels: Tensor) -> None:
        if next(steps) == stop:
            raise KeyboardInterrupt
        step(images, labels)

    interrupted.step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    resumed = finished(trainer_of(simulated(network, data), data, network, OFTEN, folder=tmp_path), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_checkpoint_of_another_configuration_is_refused_and_the_difference_named(network, data, tmp_path):
    sim = simulated(network, data)
    trainer_of(sim, data, network, replace(SHORT, epochs=1), folder=tmp_path, identity="a: 1\nb: 2").run()
    with pytest.raises(ConfigError, match=r"'b: 2', now 'b: 3'"):
        trainer_of(sim, data, network, SHORT, folder=tmp_path, identity="a: 1\nb: 3").run(resume=True)
    other = simulated(network, data)
    anew = trainer_of(other, data, network, replace(SHORT, epochs=1), folder=tmp_path, identity="a: 1\nb: 3")
    assert [epoch.epoch for epoch in anew.run(resume=True, overwrite=True)] == [0, 1]


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 1e3}, {"criterion": Choice("{file}:nan")}],
    ids=["learning rate far too high", "NaN"],
)
def test_divergence_stops_training_and_keeps_the_last_good_checkpoint(changes, network, data, tmp_path):
    file = tmp_path / "loss.py"
    file.write_text("def nan(logits, labels):\n    return logits.sum() * float('nan')\n")
    if "criterion" in changes:
        changes = {"criterion": Choice(changes["criterion"].name.format(file=file))}
    folder = tmp_path / "kept"
    trainer = trainer_of(simulated(network, data), data, network, replace(SHORT, **changes), folder=folder)
    with pytest.raises(TrainingError, match=r"diverged in epoch 1.*checkpoint\.safetensors.*learning_rate"):
        trainer.run()
    kept = checkpoint.load(folder / "checkpoint.safetensors")
    assert all(bool(torch.isfinite(p).all()) for p in kept["parameters"])


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_epoch_is_kept_or_the_last_and_patience_ends_training(keep, network, data, tmp_path):
    """A loss that for two epochs asks for the right class, and then for the next one, whatever the processor rounds."""
    steps = 2 * len(data.train)
    file = tmp_path / "loss.py"
    file.write_text(
        "from itertools import count\nfrom torch.nn import functional as F\nseen = count()\n"
        f"def turning(logits, labels):\n    wrong = next(seen) >= {steps}\n"
        "    return F.cross_entropy(logits, (labels + wrong) % 10)\n"
    )
    config = replace(SHORT, epochs=9, patience=2, mode="weights", keep=keep, criterion=Choice(f"{file}:turning"))
    config = replace(config, learning_rate=0.003, scheduler=None)
    trainer = trainer_of(simulated(network, data, 2), data, network, config)
    history = trainer.run()
    accuracies = [e.accuracy for e in history]
    assert len(history) == trainer.best["epoch"] + 3 <= 5, "history begins with epoch 0, before training"
    assert trainer.best["accuracy"] == max(accuracies) > accuracies[-1]
    with trainer.training():
        assert trainer.accuracy() == (max(accuracies) if keep == "best" else accuracies[-1])


def test_warm_up_is_float_and_then_the_share_of_quantized_sites_grows(network, data):
    config = replace(SHORT, epochs=5, warmup_epochs=1, gradual_epochs=2)
    trainer = trainer_of(simulated(network, data), data, network, config)
    seen: dict[int, set[str]] = {epoch: set() for epoch in range(5)}

    def recording(quantize: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recorded(name: str, *rest: Any) -> Tensor:
            seen[trainer.epoch].add(name)
            return quantize(name, *rest)

        return recorded

    exponents = trainer.exponents
    exponents.quantize = recording(exponents.quantize)  # type: ignore[method-assign]
    exponents.quantize_scaled = recording(exponents.quantize_scaled)  # type: ignore[method-assign]
    history = trainer.run()
    shares = [epoch.quantized for epoch in history[1:]]
    assert shares == sorted(shares)
    assert shares[0] == 0 < shares[1] < shares[2] < 1 == shares[3] == shares[4]
    assert seen[1] < seen[2] < seen[3] == seen[4] == set(trainer.exponents)
    assert trainer.best["epoch"] in (0, 4, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": Choice("SGD", {"momentum": 0.9}), "learning_rate": 0.01, "gradient_clip": 1.0},
        {"scheduler": Choice("StepLR", {"step_size": 1, "gamma": 0.1}), "exponents": "fixed"},
        {"scheduler": Choice("OneCycleLR"), "exponents": "lsq"},
        {"scheduler": Choice("ReduceLROnPlateau"), "distillation": 1.0, "temperature": 3.0},
        {"criterion": Choice("CrossEntropyLoss", {"label_smoothing": 0.1}), "precision": "bfloat16"},
        {"scheduler": None, "freeze_exponents": 0.1, "freeze_batch_norm": 1.0},
        {"batch_norm": "folded", "keep": "best"},
        {"mixing": "cutmix", "distillation": 1.0, "temperature": 3.0},
    ],
    ids=str,
)
def test_every_option_trains_and_resumes(changes, network, data, tmp_path):
    config = replace(SHORT, **changes)
    whole = trainer_of(simulated(network, data, 3), data, network, config)
    expected = finished(whole)
    assert whole.best["accuracy"] > whole.history[0].accuracy
    half = trainer_of(simulated(network, data, 3), data, network, config, folder=tmp_path)
    with half.training():
        half._measure(None, 0.0)
        half._train_epoch()
    resumed = finished(trainer_of(simulated(network, data, 3), data, network, config, folder=tmp_path), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed, strict=True))


def test_rates_follow_the_schedule(network, data):
    trainer = trainer_of(simulated(network, data), data, network, SHORT)
    rates = [epoch.learning_rate for epoch in trainer.run()]
    assert rates == pytest.approx([1e-3, 5e-4, 0.0], abs=1e-9)
    steps = replace(SHORT, scheduler=Choice("StepLR", {"step_size": 1, "gamma": 0.1}))
    assert [e.learning_rate for e in trainer_of(simulated(network, data), data, network, steps).run()] == pytest.approx(
        [1e-3, 1e-4, 1e-5]
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer": Choice("Adamm")}, "training.optimizer: 'Adamm' is unknown"),
        ({"optimizer": Choice("AdamW", {"beta": 1})}, "training.optimizer: AdamW: .*'beta'"),
        ({"optimizer": Choice("AdamW", {"lr": 1})}, "training.optimizer: lr is set by training.learning_rate"),
        ({"optimizer": Choice("SGD", {"momentum": float("nan")})}, "training.optimizer: momentum: nan is not legal"),
        ({"scheduler": Choice("Cosine")}, "training.scheduler: 'Cosine' is unknown"),
        ({"scheduler": Choice("StepLR")}, "training.scheduler: StepLR: .*step_size"),
        ({"criterion": Choice("CrossEntropy")}, "training.criterion: 'CrossEntropy' is unknown"),
    ],
)
def test_wrong_names_and_parameters_are_said(changes, expected, network, data):
    with pytest.raises(ConfigError, match=expected):
        trainer_of(simulated(network, data), data, network, replace(SHORT, **changes))


def test_distillation_is_the_divergence_of_softened_distributions():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 5, 7, generator=generator)
    p, q = ((x / 3).softmax(1).double() for x in (teacher, logits))
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert float(distilling.divergence(logits, teacher, 3.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(distilling.divergence(logits, logits, 2.0)) == 0


def test_the_share_of_quantized_sites():
    config = TrainingConfig(warmup_epochs=2, gradual_epochs=3)
    assert [schedule.quantized_share(config, e) for e in range(7)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    sites = [Site(f"{i}.weight", "weight") for i in range(10)]
    assert schedule.active(sites, config, 3) == {f"{i}.weight" for i in range(5)}
