"""Ternary weights: the papers' equations worked by hand and against brute force, and what becomes of them in files."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pow2quant import config, datasets, models, runs
from pow2quant.adapters.onnx_qdq import from_qdq, load
from pow2quant.backends import conformance
from pow2quant.config import TERNARY, DataConfig, QuantPlan, RunConfig, TensorSpec, TrainingConfig, with_values
from pow2quant.errors import ConfigError
from pow2quant.integer.ternary import Ternary as Integers
from pow2quant.methods.ternary import (
    APART,
    RULES,
    Levels,
    Ternary,
    binary,
    encoding_of,
    mean_beyond,
    nearest_exponent,
    optimal,
    rows_of,
    ttq,
    ttq_threshold,
    twn,
    twn_threshold,
)
from pow2quant.plugins import resolve
from pow2quant.pow2_constraints import Encoding
from pow2quant.training.ternary import TernaryExponents, threshold_gradient, ttq_gradients
from pow2quant.training.trainer import Trainer
from tests.backends import BACKENDS
from tests.test_training import simulated, trainer_of

ROW = torch.tensor([[0.9, -0.6, 0.5, -0.2, 0.1, 0.0, 0.3, -1.0]])  # E|w| = 0.45
random_rows = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.from_numpy(np.random.default_rng(seed).normal(0, 2.0, (3, 40)).astype(np.float32))
)


def error(rows: Tensor, values: Tensor) -> Tensor:
    return (rows.double() - values.double()).square().sum(1)


def test_twn_by_hand() -> None:
    """Delta = 0.7 * 0.45 = 0.315 leaves 0.9, 0.6, 0.5 and 1, of mean 0.75: as far from 2^-1 as from 2^0."""
    assert twn_threshold(ROW).item() == pytest.approx(0.315)
    assert mean_beyond(ROW, torch.tensor([0.315])).item() == pytest.approx(0.75)
    levels = twn(ROW)
    assert levels.codes(ROW).tolist() == [[1, -1, 1, 0, 0, 0, 0, -1]]
    assert levels.values(torch.tensor([[5.0, 0.31, -0.32]])).abs().tolist() == [[1.0, 0.0, 1.0]]


def test_ttq_by_hand() -> None:
    """t max|w| = 0.05: positive 0.9, 0.5, 0.1 and 0.3, of mean 0.45; negative 0.6, 0.2 and 1, of mean 0.6."""
    assert ttq_threshold(ROW).item() == pytest.approx(0.05)
    assert mean_beyond(ROW, torch.tensor([0.05]), 1).item() == pytest.approx(0.45)
    assert mean_beyond(ROW, torch.tensor([0.05]), -1).item() == pytest.approx(0.6)
    levels = ttq(torch.cat([ROW, ROW.clamp_min(0) / 4 + ROW.clamp_max(0)]))
    assert levels.b.tolist() == [-1, -3]  # the second row's threshold is 0.05, of 0.225, 0.125, 0.025 and 0.075
    assert levels.a.tolist() == [-1, -1]
    assert levels.values(ROW.repeat(2, 1))[1].tolist() == [0.125, -0.5, 0.125, -0.5, 0.125, 0, 0.125, -0.5]


def test_binary_by_hand() -> None:
    """E|w| = 0.45 is nearest to 2^-1."""
    assert binary(ROW).values(ROW).tolist() == [[0.5, -0.5, 0.5, -0.5, 0.5, 0.0, 0.5, -0.5]]


@pytest.mark.parametrize(("magnitude", "k"), [(1.0, 0), (1.49, 0), (1.5, 1), (0.74, -1), (0.75, 0), (3.1, 2)])
def test_the_nearest_power_of_two(magnitude: float, k: int) -> None:
    assert nearest_exponent(torch.tensor(magnitude)).item() == k


@settings(max_examples=40)
@given(random_rows)
def test_no_other_power_of_two_is_better_for_the_threshold(rows: Tensor) -> None:
    for made in (twn(rows), binary(rows)):
        mine = error(rows, made.values(rows))
        for k in range(-8, 6):
            assert (mine <= error(rows, made.codes(rows) * 2.0**k) + 1e-6).all()


@settings(max_examples=25)
@given(random_rows, st.sampled_from([1.0, 0.3, 0.03, 0.0]))
def test_no_other_pair_within_reach_is_better_for_ttqs_threshold(rows: Tensor, share: float) -> None:
    rows = rows.clamp_min(0) * share + rows.clamp_max(0)
    made = ttq(rows)
    assert ((made.a - made.b).abs() <= APART).all()
    codes, mine = made.codes(rows), error(rows, made.values(rows))
    for a, b in product(range(-9, 5), repeat=2):
        if abs(a - b) <= APART:
            other = torch.where(codes > 0, 2.0**b, torch.where(codes < 0, -(2.0**a), 0.0))
            assert (mine <= error(rows, other) + 1e-6).all()


@settings(max_examples=25)
@given(random_rows)
def test_optimal_is_the_least_error_of_all_thresholds_and_powers(rows: Tensor) -> None:
    mine = error(rows, optimal(rows).values(rows))
    for row, least in zip(rows, mine, strict=True):
        for threshold, k in product(row.abs().tolist(), range(-7, 5)):
            values = row.sign() * (row.abs() >= threshold) * 2.0**k
            assert least <= error(row[None], values[None]) + 1e-6


def test_a_channel_far_below_the_others_is_noise() -> None:
    rows = torch.stack([torch.ones(8), torch.full((8,), 2.0**-30), torch.zeros(8)])
    for rule in RULES.values():
        levels = rule(rows)
        assert levels.a.tolist() == levels.b.tolist() == [0, -16, -16]
        assert levels.values(rows).tolist() == [[1.0] * 8, [0.0] * 8, [0.0] * 8]


def test_the_common_grid_has_as_many_bits_as_the_codes_need() -> None:
    for a, b, bits in [(0, 0, 2), (1, 0, 2), (2, 0, 3), (0, 1, 3), (0, 2, 4), (-7, -5, 4)]:
        made = encoding_of(torch.tensor([float(a)]), torch.tensor([float(b)]), None)
        assert (made.grid.bits, int(made.exponent)) == (bits, min(a, b))
        values = np.array([-(2.0**a), 0, 2.0**b], np.float32)
        np.testing.assert_array_equal(made.fake_quantize(values), values)
    made = encoding_of(torch.tensor([1.0, -3.0]), torch.tensor([0.0, -1.0]), 0)
    assert (made.grid.bits, made.exponent.tolist(), made.axis) == (4, [0, -3], 0)


# -- the method --------------------------------------------------------------------------------------------------------


def plan(**changes: object) -> QuantPlan:
    weight = {"bits": 2, "symmetric": True, "per_channel": True, **changes}
    return QuantPlan(TensorSpec(**weight), *(TensorSpec(8, symmetric=False),) * 2, TensorSpec(32, symmetric=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_lie_on_the_levels_of_each_channel_and_layers_of_8_bits_stay(rule: str, backend: str) -> None:
    batch = conformance.batch()
    chosen = plan()
    named = next(y.module for y in resolve("backends", backend)(conformance.prepared(), batch, chosen).placement.layers)
    assert chosen.weight is not None
    wide = {"weight": TensorSpec(8, symmetric=True, per_channel=True)}
    chosen = QuantPlan(chosen.weight, chosen.input, chosen.output, chosen.bias, ((named, wide),))
    sim = resolve("backends", backend)(conformance.prepared(), batch, chosen)
    sim.calibrate([batch])
    before = {y.module: sim.parameter(f"{y.module}.weight").detach().clone() for y in sim.placement.layers}
    Ternary(rule).apply(sim, [batch])
    for layer in sim.placement.layers:
        assert layer.weight is not None
        weight, encoding = sim.parameter(layer.weight.name).detach(), sim.encodings()[layer.weight.name]
        assert torch.equal(weight, before[layer.module]) == (layer.module == named)
        if layer.module == named:
            assert encoding.grid.bits == 8
            continue
        codes = rows_of(torch.from_numpy(encoding.quantize(weight.numpy())), layer.axis)
        assert Integers.of(codes.numpy()) is not None
        np.testing.assert_array_equal(encoding.fake_quantize(weight.numpy()), weight.numpy())
        assert encoding.grid.width <= 4


def test_one_scale_for_the_tensor_and_a_free_scale() -> None:
    batch = conformance.batch()
    sim = resolve("backends", "custom")(conformance.prepared(), batch, plan(per_channel=False))
    sim.calibrate([batch])
    Ternary("twn").apply(sim, [batch])
    for layer in sim.placement.layers:
        assert layer.weight is not None
        assert len(sim.parameter(layer.weight.name).abs().unique()) <= 2
    sim = resolve("backends", "custom")(conformance.prepared(), batch, plan(power_of_2=False))
    sim.calibrate([batch])
    with pytest.raises(ConfigError, match=r"\.weight: ternary weights are powers of two"):
        Ternary().apply(sim, [batch])


def test_a_wrong_rule_is_said() -> None:
    with pytest.raises(ConfigError, match=r"methods\.ternary\.rule: \"twm\" is not legal; legal: one of binary"):
        config.parameters(Ternary, {"rule": "twm"}, "ptq.methods.ternary")


@pytest.mark.parametrize("rule", ["twn", "ttq"])
def test_all_executors_agree_on_a_ternary_network(rule: str, tmp_path: Path) -> None:
    values = {
        "quantization.weight.bitwidth": 2,
        "quantization.overrides": {"conv1": {"weight": {"bitwidth": 8}}, "fc": {"weight": {"bitwidth": 8}}},
        "ptq.methods": [{"ternary": {"rule": rule}}],
        "ptq.calibration_batches": 4,
        "ptq.max_eval_batches": 4,
    }
    result = runs.ptq(with_values(RunConfig(), values), tmp_path / "run")
    assert result.agrees
    assert len(result.agreements) >= 4
    sizes = {t.name: len(t.raw_data) for t in load(tmp_path / "run" / "model.onnx").graph.initializer}
    artifact = from_qdq(load(tmp_path / "run" / "model.onnx"))
    for tensor in artifact.model.graph.initializer:
        if tensor.name.endswith("conv2.weight"):
            assert sizes[f"{tensor.name}_quantized"] == -(-np.prod(tensor.dims) // 2)  # int4


# -- integers ----------------------------------------------------------------------------------------------------------


def test_integers_are_taken_for_ternary_only_where_they_are() -> None:
    made = Integers.of(np.array([[-4, 0, 1, 1], [0, 2, 0, 2], [0, 0, 0, 0], [-1, 1, -1, 1]]))
    assert made is not None
    assert made.codes.tolist() == [[-1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [-1, 1, -1, 1]]
    assert (made.negative.tolist(), made.positive.tolist()) == ([2, 0, 0, 0], [0, 1, 0, 0])
    assert made.packed().tolist() == [[0b01010011], [0b01000100], [0], [0b01110111]]
    for other in ([[3, 0]], [[1, 2]], [[-1, -2]], [[1, 0], [6, 6]]):
        assert Integers.of(np.array(other)) is None


# -- training ----------------------------------------------------------------------------------------------------------


def test_ttqs_gradients_by_hand() -> None:
    """Levels -2, 0 and 0.5: a scale gets the sum of its side, a weight its scale over the largest magnitude."""
    rows = torch.tensor([[0.8, -0.1, -0.4, 0.6]])
    codes = torch.tensor([[1.0, 0.0, -1.0, 1.0]])
    grad = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    passed, a, b = ttq_gradients(grad, rows, codes, torch.tensor([1.0]), torch.tensor([-1.0]))
    torch.testing.assert_close(passed, torch.tensor([[0.5 / 0.8, 10.0, 100 * 2 / 0.8, 1000 * 0.5 / 0.8]]))
    torch.testing.assert_close(a, torch.tensor([-100.0 * 2]))
    torch.testing.assert_close(b, torch.tensor([1001.0 * 0.5]))


def test_the_gradient_of_a_threshold_by_hand() -> None:
    """0.9 and -0.8 are beyond two thresholds; of the others, 0.4 and -0.1 count, with their signs and half of 2^1."""
    rows, grad = torch.tensor([[0.9, -0.8, 0.4, -0.1]]), torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    found = threshold_gradient(grad, rows, torch.tensor([0.3]), torch.tensor([1.0]))
    torch.testing.assert_close(found, torch.tensor([-(100.0 - 1000.0) * 2 / 2]))


@given(st.floats(0.1, 0.9), st.integers(-3, 3))
def test_the_gradient_of_a_threshold_is_the_slope_of_the_loss(threshold: float, k: int) -> None:
    """The weights fill [-2, 2] evenly, and the loss is the sum of the ternary weights' magnitudes."""
    rows = torch.linspace(-2, 2, 200_001, dtype=torch.float64)[None]
    grad = rows.sign()
    t, exponent = torch.tensor([threshold], dtype=torch.float64), torch.tensor([float(k)], dtype=torch.float64)
    above, below = (float((grad * Levels(t * f, exponent, exponent).values(rows)).sum()) for f in (1.05, 0.95))
    found = float(threshold_gradient(grad, rows, t, exponent))
    assert found == pytest.approx((above - below) / 0.1, abs=8 * 2.0**k / 0.1)  # thresholds fall between weights


@pytest.fixture(scope="module")
def data() -> datasets.Data:
    return datasets.load(DataConfig(), 64)


@pytest.fixture(scope="module")
def network(data: datasets.Data) -> nn.Module:
    return models.trained_digits_cnn()


def trainer(network: nn.Module, data: datasets.Data, rule: str, backend: str = "custom", **more: object) -> Trainer:
    sim = simulated(network, data, 2, backend)
    folder = more.pop("folder", None)
    values = {"epochs": 2, "learning_rate": 5e-3, "batch_size": 64, "mode": "full", "ternary": rule, **more}
    return trainer_of(sim, data, network, TrainingConfig(**values), folder=folder)  # type: ignore[arg-type]


def is_ternary(weight: Tensor, encoding: Encoding, axis: int | None) -> bool:
    codes = rows_of(torch.from_numpy(encoding.quantize(weight.detach().numpy())), axis).numpy()
    return Integers.of(codes) is not None and bool(
        (encoding.fake_quantize(weight.detach().numpy()) == weight.detach().numpy()).all()
    )


@pytest.mark.parametrize("rule", TERNARY)
def test_every_step_computes_with_levels_that_are_powers_of_two_and_the_end_is_on_the_grid(rule, network, data):  # type: ignore[no-untyped-def]
    made = trainer(network, data, rule)
    axes = {y.weight.name: y.axis for y in made.sim.placement.layers if y.weight is not None}
    advance, seen = made.exponents.advance, 0

    def checked() -> int:
        nonlocal seen
        flips = advance()
        table = made.exponents.table()
        for name, axis in axes.items():
            weight = made.exponents.quantize(name, made.sim.parameter(name).detach(), False)
            assert is_ternary(weight, table[name], axis)
            assert torch.equal(made.exponents.scale(name), torch.from_numpy(table[name].scale.copy()))
            seen += 1
        return flips

    made.exponents.advance = checked  # type: ignore[method-assign]
    first = {name: made.sim.parameter(name).detach().clone() for name in axes}
    made.run()
    assert seen == 2 * len(data.train) * len(axes)
    for name, axis in axes.items():
        assert is_ternary(made.sim.parameter(name), made.sim.encodings()[name], axis)
        assert not torch.equal(first[name], made.sim.parameter(name))
        assert made.sim.encodings()[name].grid.width <= 4
    assert bool(made.exponents.frozen.all())


@pytest.mark.parametrize("rule", TERNARY)
def test_the_network_learns_and_learned_thresholds_move(rule: str, network: nn.Module, data: datasets.Data) -> None:
    made = trainer(network, data, rule, epochs=3, mode="weights", distillation=0.8, temperature=2.0)
    assert isinstance(made.exponents, TernaryExponents)
    before = made.exponents.factors.clone()
    history = made.run()
    assert history[-1].accuracy > history[0].accuracy + 20
    assert torch.equal(made.exponents.factors, before) == (rule != "learned")


@pytest.mark.parametrize("rule", ["ttq", "learned"])
def test_the_first_steps_are_the_same_on_both_backends(rule: str, network: nn.Module, data: datasets.Data) -> None:
    pytest.importorskip("aimet_torch")
    states = []
    for backend in ("custom", "aimet"):
        made = trainer(network, data, rule, backend)
        with made.training():
            for _, (images, labels) in zip(range(8), made.batches(), strict=False):
                made.step(images, labels)
        made._keep()
        states.append([*made.learned, made.exponents.k, made.sim.parameter("fc.weight").detach()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("rule", ["twn", "learned"])
def test_a_resumed_training_gives_the_bits_of_an_uninterrupted_one(rule, network, data, tmp_path):  # type: ignore[no-untyped-def]
    changes = {"gradual_epochs": 1, "keep": "best", "checkpoint_minutes": 1e-9}
    whole = trainer(network, data, rule, **changes)
    whole.run()
    interrupted = trainer(network, data, rule, folder=tmp_path, **changes)
    step, steps = interrupted.step, iter(range(1000))

    def killed(images: Tensor, labels: Tensor) -> None:
        if next(steps) == 27:
            raise KeyboardInterrupt
        step(images, labels)

    interrupted.step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    resumed = trainer(network, data, rule, folder=tmp_path, **changes)
    resumed.run(resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.learned, resumed.learned, strict=True))
    assert whole.sim.encodings() == resumed.sim.encodings()
    assert torch.equal(whole.sim.parameter("fc.weight"), resumed.sim.parameter("fc.weight"))


def test_both_powers_of_ttq_stay_within_reach(network: nn.Module, data: datasets.Data) -> None:
    made = trainer(network, data, "ttq").exponents
    with torch.no_grad():
        made.values[-10:] += 30
        made.values[-20:-10] -= 30
    made.advance()
    encoding = made.table()["fc.weight"]
    assert encoding.grid.width == 4
    assert (made.k - made.calibrated).abs().max() <= 4 + APART


@pytest.mark.parametrize(
    ("bits", "changes", "text"),
    [
        (8, {"ternary": "twn"}, "training.ternary: 'twn' needs weights of 2 bits and power_of_2"),
        (2, {"ternary": "ttq", "exponents": "fixed"}, "training.ternary: 'ttq' learns; legal training.exponents: tqt"),
    ],
)
def test_what_cannot_be_ternary_is_said(bits, changes, text, network, data):  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=text):
        trainer_of(simulated(network, data, bits), data, network, TrainingConfig(**changes))
