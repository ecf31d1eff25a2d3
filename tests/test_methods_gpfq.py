"""GPFQ's path by hand, against the algorithm as it is written, and what its parameters do to a network."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant import QuantPlan, config, simulate
from pow2quant.backends import conformance
from pow2quant.backends.base import Simulation
from pow2quant.errors import ConfigError
from pow2quant.methods.gpfq import (
    REGULARIZERS,
    Gpfq,
    Grid,
    follow_gram,
    follow_path,
    hard_threshold,
    nearest,
    soft_threshold,
    stochastic,
)
from pow2quant.methods.reconstruction import error_moments, is_rounded, quantizing, walk
from pow2quant.models import digits_cnn
from pow2quant.pow2_constraints import Encoding


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def grid(scale: float | Tensor, low: int = -8, high: int = 7) -> Grid:
    return Grid(torch.as_tensor(scale, dtype=torch.float64), torch.tensor(low), torch.tensor(high))


def digits(plan: QuantPlan) -> tuple[Simulation, list[Tensor]]:
    """An untrained network with batch norm statistics, calibrated on two batches."""
    torch.manual_seed(3)
    model = digits_cnn()
    batches = [torch.rand(n, 1, 8, 8) for n in (16, 8)]
    model.train()(batches[0])
    sim = simulate(model.eval(), batches[0], plan)
    sim.calibrate(batches)
    return sim, batches


def output_errors(sim: Simulation, batches: list[Tensor]) -> dict[str, float]:
    """The mean squared error of every layer, each with the part in front quantized."""
    errors = {}
    with torch.no_grad():
        for step in walk(sim, batches):
            results = (step.run(x, quantizing(sim.encodings())) for x in step.inputs)
            errors[step.layer.module] = float(error_moments(results, step.targets)[1].mean())
    return errors


# -- the equations -----------------------------------------------------------------------------------------------------


def test_the_path_by_hand() -> None:
    """X_1 = X~_1 = (1, 1), X_2 = (1, 3), X~_2 = (0, 2), integers, w = (1.4, 0.6).

    q_1 = Q(1.4) = 1 leaves u = (0.4, 0.4); u + 0.6 (1, 3) = (1, 2.2) gives <X~_2, .> / 4 = 1.1, so q_2 = 1.
    For w = (1.4, 1.2): (1.6, 4) gives 2, where plain rounding has 1.
    """
    w = torch.tensor([[1.4, 0.6], [1.4, 1.2]], dtype=torch.float64)
    x = torch.tensor([[1.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    x_q = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    assert follow_path(w, x, x_q, nearest, grid(1)).tolist() == [[1, 1], [1, 2]]
    assert follow_gram(w, x_q.T @ x_q, x_q.T @ x, nearest, grid(1)).tolist() == [[1, 1], [1, 2]]


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("draw", [nearest, stochastic])
def test_gram_matrices_give_the_path_of_the_algorithm(regularizer: str, draw: object) -> None:
    """Groups of neurons of one step each, a feature that is always 0 and one that is only in the quantized part."""
    w = torch.randn(3, 5, 20, dtype=torch.float64)
    x = torch.randn(3, 64, 20, dtype=torch.float64)
    x_q = x + torch.randn_like(x) / 4
    x_q[..., 7], x[..., 11] = 0, 0
    alphabet = grid(0.2 + torch.rand(3, 5, dtype=torch.float64))
    found = []
    for gram in (False, True):
        torch.manual_seed(1)

        def codes(z: Tensor) -> Tensor:
            return draw(REGULARIZERS[regularizer](z, 0.75))  # type: ignore[operator, no-any-return]

        if gram:
            found.append(follow_gram(w, x_q.mT @ x_q, x_q.mT @ x, codes, alphabet))
        else:
            found.append(follow_path(w, x, x_q, codes, alphabet))
    assert torch.equal(*found)
    assert (found[0] == -8).any() or (found[0] == 7).any(), "otherwise nothing saturates"


def test_the_path_makes_up_for_what_happened_to_its_input() -> None:
    """An input that was stretched by a quarter: plain rounding passes it on."""
    w, x = torch.randn(8, 32, dtype=torch.float64), torch.rand(256, 32, dtype=torch.float64)
    alphabet = grid(0.5)
    plain = nearest(w / 0.5).clamp(-8, 7)
    codes = follow_path(w, x, x * 1.25, nearest, alphabet)
    errors = [float(((x @ w.T - x * 1.25 @ (0.5 * q).T) ** 2).mean()) for q in (codes, plain)]
    assert errors[0] < errors[1] / 5


def test_thresholds_by_hand() -> None:
    z = torch.tensor([-2.0, -0.75, -0.5, 0.0, 0.8, 1.4])
    assert soft_threshold(z, 0.75).tolist() == pytest.approx([-1.25, 0, 0, 0, 0.05, 0.65])
    assert hard_threshold(z, 0.75).tolist() == pytest.approx([-2, 0, 0, 0, 0.8, 1.4])


def test_soft_threshold_is_the_least_of_the_regularized_step() -> None:
    """Q(s(z)) is the code q of least (z - q)^2 / 2 + lambda |q|, by brute force over the alphabet."""
    z, alphabet = torch.linspace(-6, 6, 997, dtype=torch.float64), torch.arange(-8.0, 8.0, dtype=torch.float64)
    cost = (z[:, None] - alphabet).square() / 2 + 0.75 * alphabet.abs()
    assert torch.equal(nearest(soft_threshold(z, 0.75)), alphabet[cost.argmin(1)])


def test_stochastic_rounding_is_right_on_average() -> None:
    z = torch.tensor([-1.25, -1.0, 0.0, 0.5, 2.9]).repeat(20000, 1)
    codes = stochastic(z)
    assert ((codes == z.floor()) | (codes == z.ceil())).all()
    torch.testing.assert_close(codes.mean(0), z[0], atol=0.02, rtol=0)


# -- the method --------------------------------------------------------------------------------------------------------


def test_every_layer_is_nearer_to_float_and_on_its_grid() -> None:
    sim, batches = digits(QuantPlan.default(3, 8))
    before, table = output_errors(sim, batches), sim.encodings()
    Gpfq(retain_rate=1).apply(sim, batches)
    after = output_errors(sim, batches)
    assert sim.encodings() == table
    assert all(is_rounded(sim, layer) for layer in sim.placement.layers)
    assert all(after[name] < before[name] for name in before)


def test_the_first_layer_by_the_algorithm_as_it_is_written() -> None:
    sim, batches = digits(QuantPlan.default(3, 8))
    weight, encoding = sim.parameter("conv1.weight").detach().clone(), sim.encodings()["conv1.weight"]
    Gpfq(retain_rate=1).apply(sim, batches)
    x = torch.cat(batches)
    both = [F.unfold(v, 3, padding=1).mT.flatten(0, 1).double() for v in (x, quantized_input(sim, x))]
    scale = torch.from_numpy(encoding.scale.copy()).double()
    codes = follow_path(weight.flatten(1).double(), *both, nearest, grid(scale, -4, 3))
    assert torch.equal(sim.parameter("conv1.weight").flatten(1), (codes * scale[:, None]).float())


def quantized_input(sim: Simulation, x: Tensor) -> Tensor:
    return torch.from_numpy(sim.encodings()["x"].fake_quantize(x.numpy()))


@pytest.mark.parametrize("regularizer", ["L0", "L1"])
def test_more_lambda_more_zeros(regularizer: str) -> None:
    zeros = []
    for lambda_ in (0.0, 1.0, 2.0):
        sim, batches = digits(QuantPlan.default(4, 8))
        Gpfq(regularizer=regularizer, lambda_=lambda_).apply(sim, batches)
        weights = [sim.parameter(y.weight.name) for y in sim.placement.layers if y.weight is not None]
        zeros.append(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))
    assert zeros[0] + 0.04 < zeros[1]
    assert zeros[1] + 0.04 < zeros[2]


@pytest.mark.parametrize("per_tensor", [False, True])
def test_scalars_choose_the_nearest_power_of_two(per_tensor: bool) -> None:
    sim, batches = digits(QuantPlan.default(4, 8, per_tensor))
    weights = {y.module: sim.parameter(f"{y.module}.weight").detach().clone() for y in sim.placement.layers}
    before = sim.encodings()
    Gpfq(conv_scalar=0.7).apply(sim, batches)
    for name, weight in weights.items():
        largest = weight.flatten(1).abs().amax(1).numpy()
        radius = np.float64(0.7) * (np.median(largest) if per_tensor else largest)
        expected = np.rint(np.log2(radius / 8))
        encoding = sim.encodings()[f"{name}.weight"]
        if isinstance(sim.network.get_submodule(name), nn.Linear):
            assert encoding == before[f"{name}.weight"], "linear layers have a scalar of their own"
        else:
            assert (encoding.exponent == expected).all()


def test_free_scales_are_not_snapped() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    batch = torch.rand(32, 3, 2, 2)
    sim = simulate(model, batch, conformance.FREE)
    sim.calibrate([batch])
    radius = 0.5 * sim.parameter("1.weight").detach().abs().amax(1).double().numpy()
    Gpfq(linear_scalar=0.5).apply(sim, [batch])
    assert (sim.encodings()["1.weight"].scale == (radius / 128).astype(np.float32)).all()


def test_fewer_images_than_features() -> None:
    """Then X is followed itself; with as many images again, the Gram matrix gives the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 7))
    few = torch.rand(16, 3, 4, 4)
    found = []
    for batches in ([few], [few, few, few, few]):
        sim = simulate(model, few, QuantPlan.default(3, 8))
        sim.calibrate([few])
        Gpfq().apply(sim, batches)
        found.append(sim.parameter("1.weight").detach())
    assert torch.equal(*found)


def test_batch_size_is_how_many_images_are_used() -> None:
    found = []
    for method, images in ((Gpfq(batch_size=20), None), (Gpfq(), 20), (Gpfq(), None)):
        sim, batches = digits(QuantPlan.default(3, 8))
        used = batches if images is None else list(torch.cat(batches)[:images].split(16))
        torch.manual_seed(0)
        method.apply(sim, used)
        found.append(sim.parameter("conv1.weight").detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_chance_follows_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        sim, batches = digits(QuantPlan.default(3, 8))
        torch.manual_seed(seed)
        Gpfq(stochastic=True).apply(sim, batches)
        found.append(sim.parameter("conv1.weight").detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_rounded_weights_and_transposed_convolutions_stay() -> None:
    batch = torch.rand(8, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 3))
    sim = simulate(model, batch, QuantPlan.default(3, 8))
    sim.calibrate([batch])
    encoding = sim.encodings()["4.weight"]
    assert isinstance(encoding, Encoding)
    with torch.no_grad():
        last = sim.parameter("4.weight")
        last.copy_(torch.from_numpy(encoding.fake_quantize(last.numpy())))
    before = {name: sim.parameter(f"{name}.weight").detach().clone() for name in "024"}
    Gpfq().apply(sim, [batch])
    assert [name for name in "024" if not torch.equal(sim.parameter(f"{name}.weight"), before[name])] == ["0"]


def test_parameters_from_yaml() -> None:
    assert config.parameters(Gpfq, {"regularizer": "L0", "conv_scalar": 1.2}, "gpfq") == Gpfq(
        regularizer="L0", conv_scalar=1.2
    )
    with pytest.raises(ConfigError, match=r"gpfq\.regularizer: .* legal: one of"):
        config.parameters(Gpfq, {"regularizer": "L2"}, "gpfq")


def test_what_is_followed_is_the_float_network() -> None:
    """Not what another method has made of the weights, as ACIQ does."""
    found = []
    for factor in (1.0, 1.3):
        sim, batches = digits(QuantPlan.default(3, 8))
        with torch.no_grad():
            sim.parameter("conv1.weight").mul_(factor)
        Gpfq(retain_rate=1).apply(sim, batches)
        found.append(sim.parameter("conv1.weight").detach())
    assert torch.equal(*found)
