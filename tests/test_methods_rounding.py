"""AdaRound, BRECQ and QDrop: the equations by hand, tiny cases against brute force, and what a run leaves behind."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pow2quant import QuantPlan, config, runs, simulate
from pow2quant.backends.base import Simulation
from pow2quant.backends.conformance import FREE
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError
from pow2quant.methods.adaround import AdaRound
from pow2quant.methods.qdrop import LearnedScale, QDrop
from pow2quant.methods.reconstruction import blocks, encode_activations, quantizing, walk
from pow2quant.methods.rounding import (
    SoftWeight,
    annealed,
    inverse,
    mixed,
    rectified_sigmoid,
    regularizer,
    soft_weights,
    write_weights,
)
from pow2quant.models import digits_cnn
from pow2quant.pow2_constraints import Encoding, IntGrid
from tests.backends import BACKENDS

QUICK = 20
PLAN = QuantPlan.default(4, 4)


def digits(plan: QuantPlan = PLAN) -> tuple[Simulation, list[Tensor]]:
    """An untrained network with batch norm statistics, calibrated on two batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = digits_cnn()
        batches = [torch.rand(n, 1, 8, 8) for n in (16, 8)]
        model.train()(batches[0])
    sim = simulate(model.eval(), batches[0], plan)
    sim.calibrate(batches)
    return sim, batches


def weights(sim: Simulation) -> dict[str, Tensor]:
    names = [layer.weight.name for layer in sim.placement.layers if layer.weight is not None]
    return {name: sim.parameter(name).detach().clone() for name in names}


# -- the equations -----------------------------------------------------------------------------------------------------


def test_the_rectified_sigmoid_by_hand() -> None:
    """h(0) = 1.2 / 2 - 0.1; sigmoid(ln 11) = 11/12, so h(ln 11) = 1; sigmoid(ln 2) = 2/3, so h(ln 2) = 0.7."""
    v = torch.tensor([0.0, math.log(11), -math.log(11), math.log(2), 9.0, -9.0])
    torch.testing.assert_close(rectified_sigmoid(v), torch.tensor([0.5, 1.0, 0.0, 0.7, 1.0, 0.0]))
    h = torch.linspace(0, 1, 11)
    torch.testing.assert_close(rectified_sigmoid(inverse(h)), h)


def test_the_regularizer_by_hand() -> None:
    """h = 1/4 gives 1 - (1/2)^beta, h = 1/2 gives 1, both ends give 0."""
    h = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert regularizer(h, 2).item() == 1.75
    assert regularizer(h, 4).item() == 1.9375
    assert regularizer(torch.tensor([0.0, 1.0, 1.0]), 20).item() == 0


def test_beta_goes_from_start_to_end_by_half_a_cosine() -> None:
    assert [annealed(share, 20, 2) for share in (0, 0.5, 1)] == [20, 11, 2]
    assert annealed(1 / 3, 20, 2) == pytest.approx(2 + 18 * 0.75)


def test_a_soft_weight_by_hand() -> None:
    """Scales 1/2 and 2, codes from -4 to 3; the last of each row saturates."""
    weight = torch.tensor([[0.6, -0.3, 1.0, 9.0], [3.0, -0.5, 0.0, -9.0]])
    grid = IntGrid(3, signed=True)
    soft = SoftWeight(weight, Encoding(np.array([0.5, 2], np.float32), np.zeros(2, np.int64), grid, 0))
    start = torch.tensor([[0.6, -0.3, 1.0, 1.5], [3.0, -0.5, 0.0, -8.0]])
    torch.testing.assert_close(soft.at(rectified_sigmoid(soft.v)), start)
    up, down = (soft.at(torch.full((2, 4), h)).tolist() for h in (1.0, 0.0))
    assert up == [[1.0, 0.0, 1.5, 1.5], [4, 0, 2, -8]]
    assert down == [[0.5, -0.5, 1.0, 1.5], [2, -2, 0, -8]]
    torch.nn.init.constant_(soft.v, -0.1)
    assert soft.rounded().tolist() == down


def test_mixing_takes_either_value_and_all_of_one_at_the_ends() -> None:
    torch.manual_seed(0)
    x = torch.randn(10_000)
    xq = x.round()
    assert torch.equal(mixed(xq, x, 1), xq)
    assert torch.equal(mixed(xq, x, 0), x)
    assert torch.equal(mixed(torch.arange(9), torch.arange(9), 0.5), torch.arange(9)), "tokens"
    some = mixed(xq, x, 0.3)
    assert ((some == xq) | (some == x)).all()
    assert (some == xq).float().mean().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("free", [False, True])
def test_the_gradient_of_a_learned_scale_by_hand(free: bool) -> None:
    """Codes 0 to 3: 0.3 s is rounded down, 1.75 s up, 5 s saturates; the incoming gradients are 1, 2 and 10.

    So s * dL/ds = s * (1 * -0.3 + 2 * 0.25 + 10 * 3), and d/dtheta is ln 2 times that.
    """
    s = 1.5 if free else 2.0
    learned = LearnedScale(Encoding(np.float32(s), np.int64(0), IntGrid(2, signed=False)), torch.device("cpu"))
    x = torch.tensor([0.3, 1.75, 5.0]).mul(s).requires_grad_()
    learned.quantize(x).backward(torch.tensor([1.0, 2.0, 10.0]))  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert learned.theta.grad is not None
    assert x.grad.tolist() == [1, 2, 0]
    assert learned.theta.grad.item() == pytest.approx(math.log(2) * s * 30.2, rel=1e-5)


@pytest.mark.parametrize(("scale", "after"), [(2.0, 2.0), (1.5, 1.5 * 2**0.4)])
def test_a_learned_scale_under_the_constraint_and_free(scale: float, after: float) -> None:
    """theta + 0.4 is still nearest to the exponent that it was."""
    before = Encoding(np.float32(scale), np.int64(2), IntGrid(4, signed=False))
    learned = LearnedScale(before, torch.device("cpu"))
    for theta in (1e20, -1e20, float("nan")):
        learned.theta.data.fill_(theta)
        with pytest.raises(ConfigError, match="lower lr_activation"):
            learned.encoding()
    learned.reset()
    assert learned.encoding().scale == pytest.approx(scale)
    with torch.no_grad():
        learned.theta += 0.4
    now = learned.encoding()
    assert now.scale == pytest.approx(after)
    assert now.is_power_of_two == before.is_power_of_two
    assert (now.zero_point, now.grid) == (before.zero_point, before.grid)


# -- against brute force -----------------------------------------------------------------------------------------------


def test_adaround_finds_nearly_the_best_of_all_roundings() -> None:
    """Eight weights, 256 roundings; the inputs are correlated, so that rounding to nearest is far from the best."""
    torch.manual_seed(1)
    model = nn.Linear(4, 2)
    x = torch.rand(256, 1) + torch.rand(256, 4) / 4
    sim = simulate(model, x, QuantPlan.default(3, 8))
    sim.calibrate([x])
    site = sim.placement.layers[0].weight
    assert site is not None
    (step,) = walk(sim, [x])
    scale = torch.tensor(sim.encodings()[site.name].scale)[:, None]
    floor = (sim.parameter(site.name).detach() / scale).floor()

    def error(weight: Tensor) -> float:
        replaced = step.run(step.inputs[0], lambda s, value: weight if s == site else value)
        return float((replaced - step.targets[0]).detach().square().sum())

    ups = [torch.tensor(up, dtype=torch.float32).view(2, 4) for up in product((0, 1), repeat=8)]
    best = min(error((floor + up).clamp(-4, 3) * scale) for up in ups)
    nearest = error(quantizing(sim.encodings())(site, sim.parameter(site.name)))
    AdaRound(iterations=500, batch_size=64).apply(sim, [x])
    found = error(sim.parameter(site.name))
    assert nearest > 1.5 * best, "otherwise this shows nothing"
    assert found <= 1.05 * best


class Twice(nn.Module):
    """A layer that is called twice, once under another name and with another bias, within one block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.twin = nn.Linear(3, 3), nn.Linear(3, 3)
        self.twin.weight = self.fc.weight
        nn.init.constant_(self.twin.bias, 40.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.twin(torch.tanh(self.fc(x)))


class Recurrent(nn.Module):
    """An LSTM, the first block, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def in_float_but_for_weights(network: nn.Module, x: Tensor, backend: str) -> Simulation:
    torch.manual_seed(5)
    weight = replace(PLAN.weight, bits=3)  # type: ignore[type-var]
    sim = simulate(network.eval(), x, replace(PLAN, weight=weight, input=None, output=None, bias=None), backend)
    sim.calibrate([x])
    return sim


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_layers_share_has_one_rounding(backend: str) -> None:
    """It is nearly the best of all that it could be."""
    torch.manual_seed(3)
    network, x = Twice(), torch.randn(64, 3)
    expected = network(x).detach()
    sim = in_float_but_for_weights(network, x, backend)
    table, weight = sim.encodings(), sim.parameter("fc.weight").detach().clone()
    assert table["fc.weight"] == table["twin.weight"]

    def error(values: Tensor) -> float:
        with torch.no_grad():
            for name in ("fc.weight", "twin.weight"):
                sim.parameter(name).copy_(values)
            return float((sim.model(x) - expected).square().sum())

    scale = torch.tensor(table["fc.weight"].scale)[:, None]
    floor = (weight / scale).floor()
    ups = torch.tensor(list(product((0.0, 1.0), repeat=9))).view(-1, 3, 3)
    best = min(error((floor + up).clamp(-4, 3) * scale) for up in ups)
    nearest = error(weight)
    AdaRound(iterations=400, batch_size=64, granularity="block").apply(sim, [x])
    found = sim.parameter("fc.weight").detach().clone()
    assert torch.equal(found, sim.parameter("twin.weight"))
    assert nearest > 1.5 * best, "otherwise this shows nothing"
    assert error(found) <= 1.1 * best


def test_a_weight_has_one_rounding_in_every_step() -> None:
    torch.manual_seed(1)
    x = torch.randn(16, 3, 2)
    sim = in_float_but_for_weights(Recurrent(), x, "custom")
    first = next(iter(walk(sim, [x], blocks(sim))))
    names = {layer.weight.name for layer in first.layers if layer.weight is not None}
    learned = soft_weights(sim, first)
    assert len(names) == 6, "two weights in three steps"
    assert learned.keys() == names
    assert len({id(weight) for weight in learned.values()}) == 2
    write_weights(sim, first, learned)
    assert all(torch.equal(sim.parameter(name), weight.rounded()) for name, weight in learned.items())


# -- the methods -------------------------------------------------------------------------------------------------------

METHODS = {
    "layer": AdaRound(iterations=QUICK),
    "block": AdaRound(iterations=QUICK, granularity="block"),
    "qdrop": QDrop(iterations=QUICK, lr_activation=0.1),
}


@pytest.mark.parametrize("plan", [PLAN, replace(FREE, weight=replace(FREE.weight, bits=3))], ids=["2^k", "free"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_weight_is_the_code_below_or_above(method: AdaRound | QDrop, plan: QuantPlan) -> None:
    sim, batches = digits(plan)
    before, table = weights(sim), sim.encodings()
    torch.manual_seed(0)
    method.apply(sim, batches)
    moved = 0
    for name, weight in weights(sim).items():
        encoding = table[name]
        assert sim.encodings()[name] == encoding, "the grids of weights are frozen"
        assert np.array_equal(encoding.fake_quantize(weight), weight.numpy()), "on the grid"
        scale = encoding.along(encoding.scale, weight.shape)
        codes, quotient = np.rint(weight.numpy() / scale), before[name].numpy() / scale
        inside = (quotient > encoding.grid.qmin) & (quotient < encoding.grid.qmax)
        assert (np.abs(codes - quotient)[inside] < 1 + 1e-5).all()
        assert (codes == np.clip(quotient, encoding.grid.qmin, encoding.grid.qmax))[~inside].all()
        moved += int((codes != np.clip(np.rint(quotient), encoding.grid.qmin, encoding.grid.qmax)).sum())
    assert moved, "otherwise this is rounding to nearest"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_seed_decides(method: AdaRound | QDrop) -> None:
    def run(seed: int) -> list[Tensor]:
        sim, batches = digits()
        torch.manual_seed(seed)
        method.apply(sim, batches)
        return [*weights(sim).values()]

    first, again, other = run(0), run(0), run(1)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_rounded_weights_are_left_alone() -> None:
    sim, batches = digits()
    AdaRound(iterations=QUICK).apply(sim, batches)
    before, table = weights(sim), sim.encodings()
    AdaRound(iterations=QUICK, granularity="block").apply(sim, batches)
    QDrop(iterations=QUICK, lr_activation=0.0).apply(sim, batches)
    assert all(torch.equal(w, before[name]) for name, w in weights(sim).items())
    assert sim.encodings() == table


def test_qdrop_learns_exponents_back() -> None:
    """Every activation's exponent stands two too high; that of the pooling, which is in no block, stays there."""
    sim, batches = digits()
    good = sim.encodings()
    outputs = {s.name for s in sim.sites if s.role == "output"}
    high = {n: Encoding(good[n].scale * 4, good[n].zero_point, good[n].grid) for n in outputs}
    encode_activations(sim, high)
    torch.manual_seed(0)
    QDrop(iterations=120, lr_activation=0.1).apply(sim, batches)
    now = sim.encodings()
    assert {n: abs(int(now[n].exponent) - int(good[n].exponent)) <= 1 for n in outputs} == {
        n: n != "avgpool.output" for n in outputs
    }
    for layer in sim.placement.layers:
        assert layer.weight is not None
        assert layer.bias is not None
        assert layer.input is not None
        expected = now[layer.input.name].scale * now[layer.weight.name].scale
        assert np.array_equal(now[layer.bias.name].scale, expected), "biases follow"


@pytest.mark.parametrize("disabled", [False, True])
def test_head_and_stem_at_eight_bits(disabled: bool) -> None:
    sim, batches = digits(QuantPlan.default(3, 4))
    QDrop(iterations=QUICK, disable_8bit_head_stem=disabled).apply(sim, batches)
    table = sim.encodings()
    first, *between, last = sim.placement.layers
    assert first.weight is not None
    assert last.weight is not None
    assert last.input is not None
    wide = 3 if disabled else 8
    assert table[first.weight.name].grid.width == table[last.weight.name].grid.width == wide
    assert table[last.input.name].grid.width == (4 if disabled else 8)
    assert {table[y.weight.name].grid.width for y in between if y.weight is not None} == {3}


def test_a_float_layer_stays_float() -> None:
    batch = torch.rand(8, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    sim = simulate(model, batch, replace(QuantPlan.default(3, 8), overrides=(("2", {"weight": None}),)))
    sim.calibrate([batch])
    before = sim.parameter("2.weight").detach().clone()
    for method in (AdaRound(iterations=QUICK), QDrop(iterations=QUICK, disable_8bit_head_stem=False)):
        method.apply(sim, [batch])
    assert torch.equal(sim.parameter("2.weight"), before)
    assert all(p.grad is None for p in sim.model.parameters())


class Folding(nn.Module):
    """(N, 2, 3) -> (2 N, 2): each image becomes two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(-1, 3))


def test_a_layer_may_see_more_rows_than_there_are_images() -> None:
    x = torch.rand(8, 2, 3)
    sim = simulate(Folding(), x, PLAN)
    sim.calibrate([x])
    AdaRound(iterations=QUICK).apply(sim, [x])
    site = sim.placement.layers[0].weight
    assert site is not None
    assert torch.equal(quantizing(sim.encodings())(site, sim.parameter("fc.weight")), sim.parameter("fc.weight"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("iterations", 0, "an integer from 1 up"),
        ("warmup", 1.5, "a number from 0 to 1"),
        ("granularity", "network", "one of block, layer"),
    ],
)
def test_impossible_parameters(key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=f"ptq.methods.adaround.{key}: .* is not legal; legal: {words}"):
        config.parameters(AdaRound, {key: value}, "ptq.methods.adaround")


def test_no_executor_differs_afterwards(tmp_path: Path) -> None:
    values = {
        "quantization.weight.bitwidth": 4,
        "quantization.output.bitwidth": 4,
        "ptq.calibration_batches": 4,
        "ptq.methods": ["output_mse", {"qdrop": {"iterations": 100, "disable_8bit_head_stem": False}}],
    }
    run = runs.ptq(config.with_values(RunConfig(), values), tmp_path / "run")
    assert run.agrees
    assert run.report["final_accuracy"] > 90
    assert runs.validate(tmp_path / "run", max_batches=2).agrees
