"""LAPQ's interpolation by hand, its L_p errors by brute force, and the two searches on a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pow2quant import QuantPlan, config, plugins, simulate
from pow2quant.artifact import Table
from pow2quant.backends import conformance
from pow2quant.backends.base import Simulation
from pow2quant.backends.calibration import settled
from pow2quant.errors import ConfigError, DataError
from pow2quant.methods.aciq import with_moments
from pow2quant.methods.lapq import (
    Lapq,
    descend,
    divergence,
    interpolated,
    lp_errors,
    scaled,
    squared_error,
)
from pow2quant.methods.reconstruction import quantizing, walk
from pow2quant.models import digits_cnn
from pow2quant.pow2_constraints import Encoding, Format, IntGrid, Observed, choose, power_of_two
from tests.backends import BACKENDS


def encoding(*exponents: int, axis: int | None = 0, bits: int = 4) -> Encoding:
    scale = power_of_two(np.array(exponents if axis == 0 else exponents[0]))
    return Encoding(scale, np.zeros_like(scale, np.int64), IntGrid(bits, signed=True), axis)


def digits(weights: int, activations: int, free: bool = False) -> tuple[Simulation, list[Tensor]]:
    """An untrained network with batch norm statistics, calibrated on two batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = digits_cnn()
        batches = [torch.rand(n, 1, 8, 8) for n in (16, 8)]
        model.train()(batches[0])
    plan = QuantPlan.default(weights, activations)
    if free:
        roles = {role: replace(getattr(plan, role), power_of_2=False) for role in ("weight", "input", "output", "bias")}
        plan = replace(plan, **roles)
    sim = simulate(model.eval(), batches[0], plan)
    sim.calibrate(batches)
    return sim, batches


def mean_divergence(sim: Simulation, batches: list[Tensor], table: Table | None = None) -> float:
    """By running the simulation's model, with another table in the meantime."""
    before = sim.encodings()
    if table is not None:
        sim.load(settled(sim, table))
    with torch.no_grad():
        total = sum(float(divergence(sim.model(x), sim.network(x))) for x in batches)
    sim.load(before)
    return total / sum(map(len, batches))


# -- the equations -----------------------------------------------------------------------------------------------------


def test_interpolation_by_hand() -> None:
    """(p - 3)^2 + 1 is least at 3; what is least outside is so at the end; a parabola that opens downwards has none."""
    assert interpolated([2, 2.5, 4], [2, 1.25, 2]) == pytest.approx(3)
    assert interpolated([2, 3, 4], [1, 4, 9]) == 2
    assert interpolated([2, 3, 4], [3, 5, 2]) == 4


def test_interpolation_is_least_squares() -> None:
    """The residuals (1, -3, 3, -1) / 10 are orthogonal to 1, p and p^2."""
    norms = [2.0, 3.0, 4.0, 5.0]
    losses = [(p - 3.5) ** 2 + r / 10 for p, r in zip(norms, (1, -3, 3, -1), strict=True)]
    assert interpolated(norms, losses) == pytest.approx(3.5)


def test_lp_errors_by_hand() -> None:
    """Step 1: 0.5, 0.25 and 3 are off (9 saturates at 7, 2 by 2): errors 0.5, 0.25, 2; step 2: 0.5, 0.25, 1."""
    x = np.array([[0.5, 0.25, 9.0]], np.float32)
    found = lp_errors(x, [encoding(0, axis=None), encoding(1, axis=None)], 3.0)
    assert found == pytest.approx(np.array([[0.125 + 0.015625 + 8], [0.125 + 0.015625 + 1]]))


def test_larger_p_clips_less() -> None:
    x = np.random.default_rng(0).laplace(size=(4, 4096)).astype(np.float32)
    candidates = [encoding(*[k] * 4) for k in range(-6, 3)]
    best = [lp_errors(x, candidates, p).argmin(0) for p in (1.0, 2.0, 4.0)]
    assert (best[0] < best[1]).any()
    assert (best[1] < best[2]).any()
    assert all((a <= b).all() for a, b in pairwise(best))
    assert (power_of_two(best[1] - 6) == choose("mse", Observed.of(x, 0), Format(4, True, axis=0)).scale).all()


def test_losses_by_hand() -> None:
    """Probabilities (1/2, 1/2) against (3/4, 1/4): KL = ln 2 - ln 3 / 2 for each of two; it is 0 for equal ones."""
    half, quarter = torch.tensor([[0.0, 0.0]] * 2), torch.tensor([[np.log(3.0), 0.0]] * 2)
    assert float(divergence(quarter, half)) == pytest.approx(2 * (np.log(2) - np.log(3) / 2), rel=1e-5)
    assert float(divergence(half + 1, half)) == pytest.approx(0, abs=1e-6)
    assert squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])) == 5


def test_descent_by_hand() -> None:
    """From k = 0 to the least of (k - 3)^2, and of (k + 2)^2; the third site does not move."""
    table = {"a": encoding(0, axis=None), "b": encoding(0, 1), "c": encoding(5, axis=None)}
    for target in (3, -2, 0):

        def loss(t: Mapping[str, Encoding], target: int = target) -> float:
            return float((t["a"].exponent - target) ** 2)

        found, least = descend(table, ("a", "b"), loss, loss(table))
        assert found == {"a": encoding(target, axis=None), "b": encoding(target, target + 1), "c": table["c"]}
        assert least == 0


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_finishes_a_walk_is_what_the_backend_computes(backend: str) -> None:
    """From every layer on, to the last bit: two results, a concatenation, a module that is called twice."""
    batches = [conformance.batch(), conformance.batch(4, 2)]
    sim: Simulation = plugins.resolve("backends", backend)(conformance.prepared(), batches[0], conformance.LOW_BITS)
    sim.calibrate(batches)
    with torch.no_grad():
        expected = [sim.model(x) for x in batches]
        for step in walk(sim, batches):
            for found, results in zip(step.finish(quantizing(sim.encodings())), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, results, strict=True))


def test_no_single_step_of_an_exponent_would_help() -> None:
    sim, batches = digits(3, 3)
    losses = [mean_divergence(sim, batches)]
    for passes in (0, 20):
        Lapq(passes=passes, bias_correction=False).apply(sim, batches)
        losses.append(mean_divergence(sim, batches))
    assert losses[2] < losses[1]
    assert losses[2] < losses[0]
    table = sim.encodings()
    assert all(e.is_power_of_two for e in table.values())
    for site in sim.sites:
        if site.role in ("weight", "output"):
            near = [scaled(table, [site.name], factor) for factor in (0.5, 2.0)]
            assert all(mean_divergence(sim, batches, moved) >= losses[2] - 1e-7 for moved in near), site.name


def test_the_chosen_p_is_the_best_of_those_that_were_looked_at() -> None:
    """Layer-wise encodings of least squared error are among them."""
    sim, batches = digits(3, 3)
    weight = sim.parameter("conv1.weight").detach().numpy()
    Lapq(passes=0).apply(sim, batches)
    found, grid = sim.encodings()["conv1.weight"], Format(3, symmetric=True, axis=0)
    shares = [choose("minmax", Observed.of(weight * np.float32(0.5**i), 0), grid) for i in range(12)]
    assert (np.stack([e.scale for e in shares]) == found.scale).any(0).all()


def test_powell_keeps_the_best_of_its_evaluations() -> None:
    losses = []
    for evaluations in (0, 60):
        sim, batches = digits(3, 3, free=True)
        Lapq(evaluations=evaluations).apply(sim, batches)
        losses.append(mean_divergence(sim, batches))
    assert losses[1] <= losses[0]
    assert not all(e.is_power_of_two for e in sim.encodings().values())


def test_constraint_by_tensor() -> None:
    """Exponents of the weights, and free scales of the activations: each by its own search."""
    sim, batches = digits(3, 3, free=True)
    plan = QuantPlan.default(3, 3)
    assert plan.output is not None
    sim = simulate(sim.network, batches[0], replace(plan, output=replace(plan.output, power_of_2=False)))
    sim.calibrate(batches)
    losses = []
    for passes, evaluations in ((0, 0), (1, 0), (1, 60)):
        Lapq(passes=passes, evaluations=evaluations, bias_correction=False).apply(sim, batches)
        losses.append(mean_divergence(sim, batches))
    assert losses[2] < losses[1] < losses[0]
    table = sim.encodings()
    free = {s.role for s in sim.sites if not table[s.name].is_power_of_two}
    assert free <= {"output", "bias"}
    assert "output" in free


def test_correction_belongs_to_the_chosen_encodings() -> None:
    sim, batches = digits(3, 3)
    weights = {y.weight.name: sim.parameter(y.weight.name).detach().clone() for y in sim.placement.layers if y.weight}
    Lapq().apply(sim, batches)
    for name, weight in weights.items():
        assert (sim.parameter(name).detach().numpy() == with_moments(weight.numpy(), sim.encodings()[name])).all()
        assert not torch.equal(sim.parameter(name), weight)


def test_tensors_that_share_an_encoding_still_do() -> None:
    batches = [conformance.batch(), conformance.batch(4, 2)]
    sim: Simulation = plugins.resolve("backends", "custom")(conformance.prepared(), batches[0], conformance.LOW_BITS)
    sim.calibrate(batches)
    before = sim.encodings()
    Lapq(loss="mse").apply(sim, batches)
    table = sim.encodings()
    assert sim.placement.leaders, "otherwise nothing is shared"
    assert all(table[name] == table[leader] for name, leader in sim.placement.leaders.items())
    assert table["x"] == before["x"]
    for layer in sim.placement.layers:
        assert layer.input is not None
        assert layer.weight is not None
        if layer.bias is not None:
            expected = table[layer.input.name].scale * table[layer.weight.name].scale
            assert (table[layer.bias.name].scale == expected).all()


def test_rounded_weights_keep_their_grid() -> None:
    sim, batches = digits(3, 4)
    table = sim.encodings()
    with torch.no_grad():
        weight = sim.parameter("conv4.weight")
        weight.copy_(torch.from_numpy(table["conv4.weight"].fake_quantize(weight.numpy())))
    Lapq().apply(sim, batches)
    assert sim.encodings()["conv4.weight"] == table["conv4.weight"]
    assert sim.encodings() != table


def test_the_loss_of_the_search_is_the_models() -> None:
    sim, batches = digits(4, 4)
    notes: list[str] = []

    class Notes:
        def track(self, items, title, total=None):  # type: ignore[no-untyped-def]
            yield from items

        def note(self, text: str) -> None:
            notes.append(text)

    Lapq(passes=1).apply(sim, batches, Notes())
    assert float(notes[-1].rpartition(" ")[2]) == pytest.approx(mean_divergence(sim, batches), abs=1e-5)


@torch.no_grad()
def test_results_without_classes_need_another_loss() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch = torch.rand(8, 3, 4, 4)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 1))
    sim = simulate(model, batch, QuantPlan.default(2, 3))
    sim.calibrate([batch])
    before = squared_error(sim.model(batch), sim.network(batch))
    with pytest.raises(ConfigError, match=r"lapq\.loss: divergence compares .*\(8, 1\).*; legal here: mse"):
        Lapq().apply(sim, [batch])
    Lapq(loss="mse").apply(sim, [batch])
    assert squared_error(sim.model(batch), sim.network(batch)) < before
    with pytest.raises(DataError, match="calibration data are empty"):
        Lapq().apply(sim, [])


def test_parameters_from_yaml() -> None:
    assert config.parameters(Lapq, {"loss": "mse", "passes": 3}, "lapq") == Lapq(loss="mse", passes=3)
    with pytest.raises(ConfigError, match=r"lapq\.loss: .* legal: one of"):
        config.parameters(Lapq, {"loss": "mae"}, "lapq")
