"""ACIQ's equations against the paper's constants, integration, samples and brute force; widths per channel."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor

from pow2quant import QuantPlan, config, runs, simulate
from pow2quant.backends.base import Simulation
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError, EncodingError
from pow2quant.methods.aciq import (
    FAMILIES,
    Aciq,
    Fit,
    allocate,
    analytic,
    clipping,
    expected_mse,
    fold_correction,
    moments_correction,
)
from pow2quant.methods.reconstruction import is_rounded
from pow2quant.models import digits_cnn
from pow2quant.pow2_constraints import Encoding, Format, IntGrid, Observed, power_of_two

RNG = np.random.default_rng(0)
DENSITIES = {
    "laplace": lambda x: np.exp(-np.abs(x)) / 2,
    "gauss": lambda x: np.exp(-x * x / 2) / np.sqrt(2 * np.pi),
}
SAMPLES = {"laplace": RNG.laplace(size=1 << 18), "gauss": RNG.normal(size=1 << 18)}


def digits(plan: QuantPlan, backend: str = "custom") -> tuple[Simulation, list[Tensor]]:
    """An untrained network with batch norm statistics, calibrated on two batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = digits_cnn()
        batches = [torch.rand(n, 1, 8, 8) for n in (16, 8)]
        model.train()(batches[0])
    sim = simulate(model.eval(), batches[0], plan, backend)
    sim.calibrate(batches)
    return sim, batches


@torch.no_grad()
def widen(sim: Simulation, batches: list[Tensor]) -> None:
    """Makes channels of the first layer unequal."""
    sim.parameter("conv1.weight")[:4] *= 8
    sim.calibrate(batches)


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "bits", "published"),
    [
        *(("laplace", m, alpha) for m, alpha in ((2, 2.83), (3, 3.89), (4, 5.03))),
        *(("gauss", m, alpha) for m, alpha in ((2, 1.71), (3, 2.15), (4, 2.55))),
    ],
)
def test_clipping_has_the_papers_constants(family: str, bits: int, published: float) -> None:
    """To the two digits that are printed there, some rounded and some cut off."""
    assert clipping(bits, FAMILIES[family]) == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clipping_is_where_the_expected_error_is_least(family: str, bits: int) -> None:
    alpha = np.linspace(0.1, 15, 14901)
    error = expected_mse(2 * alpha / 2**bits, -alpha, alpha, 1.0, FAMILIES[family])
    assert clipping(bits, FAMILIES[family]) == pytest.approx(alpha[error.argmin()], abs=0.001)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("t", [-2.0, -0.5, 0.0, 0.7, 3.0])
def test_tails_are_the_integrals(family: str, t: float) -> None:
    f = FAMILIES[family]
    expected, _ = quad(lambda x: (x - t) ** 2 * DENSITIES[family](x), t, np.inf)
    assert f.tail(np.array(t)) == pytest.approx(expected, rel=1e-6)
    if t >= 0:
        step = 1e-6
        slope = (f.tail(np.array(t + step)) - f.tail(np.array(t - step))) / (2 * step)
        assert f.slope(t) == pytest.approx(float(slope), abs=1e-6)


def test_expected_mse_is_equation_5() -> None:
    """Laplace: 2 b^2 exp(-alpha / b) + alpha^2 / (3 2^(2M)), at b = 0.5, alpha = 2, M = 4."""
    expected = 2 * 0.25 * np.exp(-4) + 4 / (3 * 256)
    assert expected_mse(4 / 16, -2.0, 2.0, 0.5, FAMILIES["laplace"]) == pytest.approx(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_mse_is_that_of_a_sample(family: str) -> None:
    """Within 5 %, on a real 4-bit grid that is not symmetric about the density; behind a ReLU it is half."""
    x = SAMPLES[family]
    for scale, zero_point in ((0.5, 0), (0.25, 0), (0.5, 2)):
        encoding = Encoding(np.float32(scale), np.int64(zero_point), IntGrid(4, signed=True))  # type: ignore[arg-type]
        measured = np.square(x - encoding.fake_quantize(x)).mean()
        found = expected_mse(scale, encoding.minimum, encoding.maximum, 1.0, FAMILIES[family])
        assert found == pytest.approx(measured, rel=0.05)
    behind = np.maximum(x, 0)
    encoding = Encoding(np.float32(0.25), np.int64(0), IntGrid(4, signed=False))  # type: ignore[arg-type]
    measured = np.square(behind - encoding.fake_quantize(behind)).mean()
    half = expected_mse(0.25, -encoding.maximum, encoding.maximum, 1.0, FAMILIES[family]) / 2
    assert half == pytest.approx(measured, rel=0.05)


# -- the fit -----------------------------------------------------------------------------------------------------------


def fit(x: object, method: str = "auto", symmetric: bool = True, axis: int | None = None, bits: int = 4) -> Fit:
    return Fit.of(Observed.of(np.asarray(x), axis), method, bits, symmetric)


def test_fit_finds_spread_and_family_per_channel() -> None:
    found = fit(np.stack([3 * SAMPLES["laplace"], 0.5 * SAMPLES["gauss"]]), axis=0)
    assert found.laplace.tolist() == [True, False]
    assert found.spread == pytest.approx([3, 0.5], rel=0.01)
    assert found.alpha == pytest.approx([3 * 5.03, 0.5 * 2.55], rel=0.01)


def test_fit_of_shifted_data_is_about_their_mean() -> None:
    found = fit(SAMPLES["gauss"] + 3, symmetric=False)
    assert found.center == pytest.approx(3, abs=0.01)
    assert found.spread == pytest.approx(1, rel=0.01)
    assert not found.half


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_fit_behind_a_relu(shift: float) -> None:
    """A Laplace density keeps its tail wherever its center was; the clipping value is that of one bit more."""
    found = fit(np.maximum(SAMPLES["laplace"] + shift, 0), symmetric=False)
    assert found.half
    assert found.laplace.all()
    assert found.spread == pytest.approx(1, rel=0.01)
    assert found.alpha == pytest.approx(clipping(5, FAMILIES["laplace"]), rel=0.01)


def test_nothing_is_clipped_beyond_the_data() -> None:
    assert fit([-0.5, 0.25, 0.4], "laplace").alpha == pytest.approx(0.5)
    assert fit(np.zeros(8), "auto", symmetric=False).alpha == pytest.approx(0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_analytic_exponents_are_the_best_of_all(family: str, bits: int) -> None:
    """By brute force over all exponents that do not exceed the data's range."""
    x = RNG.laplace(size=(6, 200)).astype(np.float32) * 2.0 ** np.arange(-3, 3)[:, None]
    observed, form = Observed.of(x, 0), Format(bits, symmetric=True, axis=0)
    found = Fit.of(observed, family, bits, symmetric=True)
    encoding = analytic(observed, form, found)
    for c, row in enumerate(np.abs(x).max(1)):
        exponents = [k for k in range(-20, 8) if 2.0**k * 2 ** (bits - 1) < 2.01 * row]
        errors = [
            expected_mse(
                2.0**k, -(2.0 ** (k + bits - 1)), 2.0**k * (2 ** (bits - 1) - 1), found.spread[c], FAMILIES[family]
            )
            for k in exponents
        ]
        assert encoding.exponent[c] == exponents[int(np.argmin(errors))]


def test_analytic_free_scales_are_those_of_alpha() -> None:
    observed = Observed.of(np.maximum(SAMPLES["laplace"], 0).astype(np.float32))
    form = Format(4, symmetric=False, power_of_2=False)
    encoding = analytic(observed, form, Fit.of(observed, "laplace", 4, symmetric=False))
    assert encoding.maximum == pytest.approx(clipping(5, FAMILIES["laplace"]), rel=0.01)


def test_analytic_of_shifted_data_covers_both_sides() -> None:
    observed = Observed.of((SAMPLES["gauss"] + 1).astype(np.float32))
    encoding = analytic(observed, Format(4, symmetric=False), Fit.of(observed, "gauss", 4, symmetric=False))
    assert encoding.exponent == -1 or encoding.exponent == -2
    assert encoding.zero_point % 2 == 0
    assert abs(float(encoding.minimum + encoding.maximum) / 2 - 1) < 2 * float(encoding.scale)


# -- bits per channel --------------------------------------------------------------------------------------------------


def test_allocation_by_hand() -> None:
    """2^width is proportional to alpha^(2/3): 8 has 4 times as many steps as 1. At 3/2, 8 times as many."""
    assert allocate([1.0, 8.0], 4) == (3, 5)
    assert allocate([1.0, 8.0, 8.0, 1.0], 4) == (3, 5, 5, 3)
    assert allocate([1.0, 64.0], 4, 1.5) == (2, 6), "no less than 2 bits; eq. 10 has (1, 7)"
    assert allocate([1.0, 8.0, 3.0], 4, 0) == (4, 4, 4)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), st.integers(2, 16), st.floats(0, 1.5))
def test_allocation_keeps_the_average(alpha: list[float], bits: int, ratio: float) -> None:
    widths = allocate(alpha, bits, ratio)
    assert sum(widths) == bits * len(alpha)
    assert all(2 <= width <= 16 for width in widths)


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3))
def test_allocation_at_three_halves_has_the_least_error(alpha: list[float]) -> None:
    def error(widths: tuple[int, ...]) -> float:
        return sum(a * a / 4.0**w for a, w in zip(alpha, widths, strict=True))

    best = min(error(w) for w in product(range(2, 9), repeat=3) if sum(w) == 12)
    assert error(allocate(alpha, 4, 1.5)) == pytest.approx(best)


# -- moments -----------------------------------------------------------------------------------------------------------


def test_moments_by_hand() -> None:
    """w = (0, 2, 4) has mean 2 and norm sqrt(8) about it; w_q = (0, 1, 2) has 1 and sqrt(2)."""
    mu, xi = moments_correction(np.array([[0.0, 2.0, 4.0]]), np.array([[0.0, 1.0, 2.0]]))
    assert mu == pytest.approx(1)
    assert xi == pytest.approx(2)
    assert moments_correction(np.array([[0.1, 0.3]]), np.zeros((1, 2)))[1] == 1


def test_folding_brings_the_rounded_moments_nearer() -> None:
    weight = RNG.laplace(size=(32, 144)) + RNG.normal(size=(32, 1)) / 3
    encoding = Encoding(power_of_two(np.zeros(32, np.int64)), np.zeros(32, np.int64), IntGrid(3, signed=True), 0)

    def quantize(x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return encoding.fake_quantize(x).astype(np.float64)

    folded = fold_correction(weight, quantize)
    (mu, xi), (mu_before, xi_before) = (moments_correction(weight, quantize(w)) for w in (folded, weight))
    assert np.abs(mu).mean() < np.abs(mu_before).mean() / 4
    assert np.abs(xi - 1).mean() < np.abs(xi_before - 1).mean() / 4


def test_folding_keeps_weights_that_need_none() -> None:
    weight = np.array([[1.0, -2.0, 3.0], [0.0, 0.0, 0.0]])
    assert (fold_correction(weight, np.rint) == weight).all()


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["laplace", "gauss", "auto"])
def test_encodings_are_those_of_the_fits(method: str) -> None:
    sim, batches = digits(QuantPlan.default(4, 4))
    before, weight = sim.encodings(), sim.parameter("conv1.weight").detach().clone()
    with torch.no_grad():
        values = torch.cat([sim.network.get_submodule("conv1")(x).relu() for x in batches]).numpy()
    Aciq(aciq_method=method, bias_correction=False).apply(sim, batches)
    after = sim.encodings()
    observed = Observed.of(values)
    expected = analytic(observed, Format(4, symmetric=False), Fit.of(observed, method, 4, symmetric=False))
    names = [s.name for s in sim.sites if s.role == "output"]
    assert after[names[0]] == expected
    observed = Observed.of(weight.numpy(), 0)
    expected = analytic(observed, Format(4, symmetric=True, axis=0), Fit.of(observed, method, 4, symmetric=True))
    assert after["conv1.weight"] == expected
    assert after["x"] == before["x"], "the input keeps its encoding"
    assert torch.equal(sim.parameter("conv1.weight"), weight)


def test_correction_is_written_into_the_float_weights() -> None:
    sim, batches = digits(QuantPlan.default(3, 8, per_tensor=True))
    weights = {y.weight.name: sim.parameter(y.weight.name).detach().clone() for y in sim.placement.layers if y.weight}
    Aciq().apply(sim, batches)
    errors = []
    for name, weight in weights.items():
        encoding = sim.encodings()[name]
        means = [encoding.fake_quantize(w.detach().numpy()).mean() for w in (sim.parameter(name), weight)]
        errors.append([abs(m - float(weight.mean())) for m in means])
    assert np.mean(errors, 0)[0] < np.mean(errors, 0)[1] / 2


def test_rounded_weights_keep_their_grid() -> None:
    sim, batches = digits(QuantPlan.default(3, 8))
    widen(sim, batches)
    table = sim.encodings()
    with torch.no_grad():
        weight = sim.parameter("conv4.weight")
        weight.copy_(torch.from_numpy(table["conv4.weight"].fake_quantize(weight.numpy())))
    Aciq(mix_ratio=1).apply(sim, batches)
    after = sim.encodings()
    assert after["conv4.weight"] == table["conv4.weight"]
    assert isinstance(after["conv1.weight"].grid.bits, tuple)
    (layer,) = (y for y in sim.placement.layers if y.module == "conv4")
    assert is_rounded(sim, layer)


def test_mixed_widths_agree_in_every_executor(tmp_path: Path) -> None:
    values = {
        "quantization.weight.bitwidth": 3,
        "ptq.calibration_batches": 4,
        "ptq.max_eval_batches": 2,
        "ptq.methods": [{"aciq": {"mix_ratio": 1.5}}],
    }
    run = runs.ptq(config.with_values(RunConfig(), values), tmp_path / "run")
    assert run.agrees
    details = run.report["final_quantization_details"]
    widths = [d["bitwidth"] for name, d in details.items() if name.endswith(".weight")]
    mixed = [w for w in widths if isinstance(w, tuple)]
    assert mixed
    assert all(len(set(w)) > 1 and sum(w) == 3 * len(w) for w in mixed)
    assert all(w == 3 for w in widths if w not in mixed)


def test_aimet_has_one_width_per_tensor() -> None:
    pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")
    sim, batches = digits(QuantPlan.default(4, 8), "aimet")
    widen(sim, batches)
    with pytest.raises(EncodingError, match=r"conv1\.weight: the aimet backend simulates one width"):
        Aciq(mix_ratio=1).apply(sim, batches)


def test_parameters_from_yaml() -> None:
    assert config.parameters(Aciq, {"aciq_method": "auto", "mix_ratio": 1.0}, "aciq") == Aciq(
        aciq_method="auto", mix_ratio=1.0
    )
    with pytest.raises(ConfigError, match=r"aciq\.aciq_method: .* legal: one of"):
        config.parameters(Aciq, {"aciq_method": "cauchy"}, "aciq")
