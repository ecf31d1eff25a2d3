"""GPTQ against least squares column by column, its error against the quadratic form, and what it does to a network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pow2quant import QuantPlan, simulate
from pow2quant.methods.gpfq import Grid, grid_of
from pow2quant.methods.gptq import Gptq, Moments, Rows
from pow2quant.methods.reconstruction import is_rounded, walk
from pow2quant.models import DIGITS_WEIGHTS, digits_cnn, load_weights

DAMPING = 0.01


def correlated(seed: int, groups: int, count: int, width: int) -> tuple[Tensor, Tensor]:
    """X and X~, (groups, count, width): what enters a layer, and the same with errors."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
    exact = torch.randn(groups, count, width, generator=generator, dtype=torch.float64) @ mix + 0.5
    return exact, exact + 0.2 * torch.randn(exact.shape, generator=generator, dtype=torch.float64)


def problem(
    seed: int, correction: float = 0.5, groups: int = 2, rows: int = 3, width: int = 5
) -> tuple[Rows, Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(groups, rows, width, generator=generator, dtype=torch.float64)
    moments = Moments.of([correlated(seed, groups, 40, width), correlated(seed + 2, groups, 20, width)])
    return Rows.of(weight, moments, DAMPING, correction), weight, moments


def grid(scale: float) -> Grid:
    return Grid(torch.tensor(scale, dtype=torch.float64), torch.tensor(-4), torch.tensor(3))


def damped(moments: Moments) -> Tensor:
    ridge = DAMPING * moments.gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    return moments.gram + ridge[:, None, None] * torch.eye(moments.gram.shape[-1], dtype=torch.float64)


@given(st.integers(0, 10_000))
def test_moments_are_those_of_all_samples_together(seed: int) -> None:
    parts = [correlated(seed, 2, 40, 3), correlated(seed + 2, 2, 20, 3)]
    exact, quantized = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    found = Moments.of(parts)
    for g in range(2):
        about = [x[g] - x[g].mean(0) for x in (exact, quantized)]
        assert torch.allclose(found.gram[g], about[1].T @ about[1] / 60, atol=1e-10)
        assert torch.allclose(found.cross[g], about[0].T @ about[1] / 60, atol=1e-10)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_target_is_the_best_float_row_on_the_quantized_input(seed: int, correction: float) -> None:
    """The gradient of E|w (c x + (1 - c) x~) - v x~|^2 + ridge |v - w|^2 is 0 in v; without correction v is w."""
    rows, weight, moments = problem(seed, correction)
    ordered = torch.empty_like(rows.target).scatter(-1, rows.order[:, None].expand_as(rows.target), rows.target)
    ridge = damped(moments) - moments.gram
    aim = correction * moments.cross + (1 - correction) * moments.gram
    assert torch.allclose(ordered @ (moments.gram + ridge), weight @ (aim + ridge), atol=1e-8)
    assert correction > 0 or torch.allclose(ordered, weight, atol=1e-8)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.25, 0.5, 1.0]))
def test_every_column_is_rounded_after_least_squares_of_the_rest(seed: int, scale: float) -> None:
    """The definition: with the codes so far fixed, what is left minimises the quadratic form; the next is rounded."""
    rows, _, moments = problem(seed)
    codes, error = rows.rounded(grid(scale))
    h = damped(moments)
    for g, row in np.ndindex(2, 3):
        order = rows.order[g]
        hessian, target = h[g][order][:, order], rows.target[g, row]
        fixed = torch.zeros(0, dtype=torch.float64)
        for t in range(len(order)):
            rest = target[t:] + torch.linalg.solve(hessian[t:, t:], hessian[t:, :t] @ (target[:t] - fixed))
            fixed = torch.cat([fixed, (rest[:1] / scale).round().clamp(-4, 3) * scale])
        assert torch.equal(codes[g, row][order] * scale, fixed)
        off = target - fixed
        assert float(error[g, row]) == pytest.approx(float(off @ hessian @ off), rel=1e-6, abs=1e-9)


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    eye = torch.eye(4, dtype=torch.float64)[None]
    zero = torch.zeros(1, 4, dtype=torch.float64)
    weight = torch.tensor([[[0.3, -0.6, 1.2, 0.74]]], dtype=torch.float64)
    codes, _ = Rows.of(weight, Moments(eye, eye, zero, zero), DAMPING, 1.0).rounded(grid(0.5))
    assert codes.tolist() == [[[1, -1, 2, 1]]]


def test_an_input_that_is_always_zero_and_more_columns_than_a_block() -> None:
    exact, quantized = correlated(0, 1, 50, 300)
    for x in (exact, quantized):
        x[..., 7] = 0
    weight = torch.randn(1, 2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes, error = Rows.of(weight, Moments.of([(exact, quantized)]), DAMPING, 1.0).rounded(grid(0.5))
    assert torch.isfinite(codes).all()
    assert torch.isfinite(error).all()
    assert torch.equal(codes[0, :, 7], (weight[0, :, 7] / 0.5).round().clamp(-4, 3))


def test_inputs_that_hardly_vary_about_a_large_mean() -> None:
    """What float32 leaves of their covariance is noise, and may have negative eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    exact = 100 + 1e-4 * torch.randn(4, 200, 9, generator=generator)
    exact[1] = 100
    exact[2] = 0
    weight = torch.randn(4, 1, 9, generator=generator, dtype=torch.float64)
    rows = Rows.of(weight, Moments.of([(exact, exact)]), DAMPING, 0.5)
    codes, error = rows.rounded(grid(0.5))
    assert torch.isfinite(error).all()
    assert (codes * 0.5 - weight.clamp(-2, 1.5)).abs().max() < 1


# Networks


def digits(plan: QuantPlan) -> tuple[object, list[Tensor]]:
    network = digits_cnn()
    load_weights(network, DIGITS_WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(32, 1, 8, 8, generator=generator) for _ in range(2)]
    sim = simulate(network, batches[0], plan)
    sim.calibrate(batches)
    return sim, batches


@pytest.mark.parametrize("per_tensor", [False, True])
def test_weights_lie_on_their_grids_and_layers_come_closer(per_tensor: bool) -> None:
    def error(sim: object, batches: list[Tensor]) -> float:
        with torch.no_grad():
            pairs = [(sim.model(x), exact(x)) for x in batches]
        return float(sum((a - b).square().sum() for a, b in pairs))

    exact = digits_cnn()
    load_weights(exact, DIGITS_WEIGHTS)
    exact.eval()
    sim, batches = digits(QuantPlan.default(3, 8, per_tensor))
    before = error(sim, batches)
    Gptq(retain_rate=1.0).apply(sim, batches)
    assert all(is_rounded(sim, layer) for layer in sim.placement.layers)
    assert all(e.is_power_of_two for e in sim.encodings().values())
    assert error(sim, batches) < before / 2


def test_the_mean_of_every_layer_is_kept() -> None:
    sim, batches = digits(QuantPlan.default(3, 8))
    Gptq(retain_rate=1.0).apply(sim, batches)
    table = sim.encodings()
    for step in walk(sim, batches):
        weight, bias = (sim.parameter(f"{step.layer.module}.{p}").detach().double() for p in ("weight", "bias"))
        module = sim.network.get_submodule(step.layer.module)
        clone = nn.Conv2d if weight.ndim == 4 else nn.Linear
        assert isinstance(module, clone)
        copy = module.double()
        with torch.no_grad():
            copy.weight.copy_(weight)
            copy.bias.copy_(bias)
            made = torch.cat([copy(x.double()) for (x,) in step.inputs])
            module.float()
        aim = torch.cat(list(step.targets)).double()
        lattice = torch.from_numpy(np.array(table[f"{step.layer.module}.bias"].scale)).double()
        off = (made - aim).transpose(0, 1).flatten(1).mean(1).abs()
        assert (off <= lattice.max() + 1e-4 * aim.abs().mean()).all()


def test_exponents_stay_where_none_are_tried() -> None:
    sim, batches = digits(QuantPlan.default(4, 8))
    before = {n: e for n, e in sim.encodings().items() if n.endswith(".weight")}
    Gptq(exponents=0).apply(sim, batches)
    assert {n: e for n, e in sim.encodings().items() if n.endswith(".weight")} == before


def test_the_grid_of_one_scale_serves_every_row() -> None:
    sim, _ = digits(QuantPlan.default(4, 8, per_tensor=True))
    encoding = next(e for n, e in sim.encodings().items() if n.endswith(".weight"))
    found = grid_of(encoding, torch.zeros(1, 5, 3, dtype=torch.float64))
    assert found.scale.shape == (1, 5)
    assert (found.low == encoding.grid.qmin).all()
