"""The walk through a network, and the two methods without learning, against hand-worked equations and brute force."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant import QuantPlan, simulate
from pow2quant.backends import conformance
from pow2quant.backends.base import Simulation
from pow2quant.errors import DataError
from pow2quant.methods.bias_correction import BiasCorrection, clipped_normal_mean, expected_shift, shift
from pow2quant.methods.bn_reestimation import BnReestimation, gain, norm_statistics
from pow2quant.methods.output_mse import OutputMse, least_error, rounding_noise
from pow2quant.methods.reconstruction import blocks, encode_weight, error_moments, layers, quantizing, walk
from pow2quant.models import digits_cnn
from pow2quant.plugins import names, resolve
from pow2quant.pow2_constraints import Encoding, IntGrid

GRID = IntGrid(4, signed=True)


def encoding(*scales: float, axis: int | None = 0) -> Encoding:
    return Encoding(np.array(scales if axis == 0 else scales[0], np.float32), 0, GRID, axis)  # type: ignore[arg-type]


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


# -- the walk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", sorted(names("backends")))
def test_what_the_walk_computes_is_what_the_backend_computes(backend: str) -> None:
    """To the last bit, also behind a layer that was changed on the way."""
    if backend == "aimet":
        pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")
    batches = [conformance.batch(), conformance.batch(4, 2)]
    sim = resolve("backends", backend)(conformance.prepared(), batches[0], conformance.LOW_BITS)
    sim.calibrate(batches)
    for step in walk(sim, batches):
        if step.layer.module == "depthwise":
            now = sim.encodings()["depthwise.weight"]
            encode_weight(sim, step.layer, Encoding(now.scale * 2, now.zero_point, now.grid, now.axis))
            assert not torch.equal(step.run(step.inputs[0], quantizing(sim.encodings())), step.targets[0])
    assert step.layer.module == "fc"
    with torch.no_grad():
        for batch, entering, target in zip(batches, step.inputs, step.targets, strict=True):
            assert torch.equal(step.run(entering, quantizing(sim.encodings())), sim.model(batch)[0])
            assert torch.equal(target, sim.network(batch)[0])


class Residual(nn.Module):
    """(N, 3, 8, 8) -> (N, 4): a stem, a block with a shortcut, one without, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.b, self.short = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.b(F.relu(self.a(x))) + self.short(x))
        x = self.d(F.relu(self.c(x))) + x
        return self.head(F.max_pool2d(x, 8).flatten(1))


def test_blocks_are_what_one_tensor_enters_and_leaves() -> None:
    sim = simulate(Residual(), torch.rand(2, 3, 8, 8))
    found = [[str(node.target) for node in part] for part in blocks(sim)]
    assert found == [
        ["stem", "relu"],
        ["a", "relu_1", "b", "short", "add", "relu_2"],
        ["c", "relu_3", "d", "add_1"],
        ["head"],
    ]
    assert [str(part[0].target) for part in layers(sim)] == ["stem", "a", "b", "short", "c", "d", "head"]


def test_a_block_has_quantized_inputs_and_float_targets() -> None:
    batch = torch.rand(4, 3, 8, 8)
    sim = simulate(Residual(), batch, QuantPlan.default(4, 4))
    sim.calibrate([batch])
    table = sim.encodings()
    steps = list(walk(sim, [batch], blocks(sim)))
    assert [len(step.layers) for step in steps] == [1, 3, 2, 1]
    for step, following in pairwise(steps[:3]):
        (result,) = (step.run(x, quantizing(table)) for x in step.inputs)
        assert torch.equal(result, following.inputs[0][0])
    with torch.no_grad():
        assert torch.equal(steps[-1].run(steps[-1].inputs[0], quantizing(table)), sim.model(batch))
        assert torch.equal(steps[-1].targets[0], sim.network(batch))


def test_a_step_is_differentiable() -> None:
    sim, batches = digits(QuantPlan.default(4, 8))
    step = next(walk(sim, batches))
    step.run(step.inputs[0], quantizing(sim.encodings())).square().sum().backward()  # type: ignore[no-untyped-call]
    gradient = sim.parameter("conv1.weight").grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_no_data_is_an_error() -> None:
    sim, _ = digits(QuantPlan.default())
    with pytest.raises(DataError, match="calibration data are empty"):
        next(walk(sim, []))


# -- the equations -----------------------------------------------------------------------------------------------------


def test_moments_by_hand() -> None:
    """Channel 0 errs by 1, -1, 3 and 1; channel 1 by 2 everywhere."""
    targets = [torch.tensor([[[0.0, 5.0], [1.0, 1.0]]]), torch.tensor([[[2.0, 7.0], [1.0, 1.0]]])]
    results = [t + e for t, e in zip(targets, torch.tensor([[[1.0, -1], [2, 2]], [[3, 1], [2, 2]]]), strict=True)]
    mean, square = error_moments(results, targets)
    assert mean.tolist() == [1, 2]
    assert square.tolist() == [3, 4]


def test_least_error_by_hand() -> None:
    candidates = [encoding(1, 1), encoding(0.5, 0.5), encoding(2, 2)]
    errors = np.array([[3.0, 1.0], [2.0, 1.0], [9.0, 0.5]])
    assert least_error(candidates, errors) == encoding(0.5, 2)
    assert least_error(candidates, np.ones((3, 2))) == encoding(1, 1), "the first of equals"
    tensors = [encoding(s, axis=None) for s in (1, 0.5, 2)]
    assert least_error(tensors, errors) == encoding(0.5, axis=None), "sums 4, 3 and 9.5"


def test_shift_by_hand() -> None:
    """y~ is (-1, 1, 3) where y is (-3, 0, 2): the mean error is 4/3; behind a ReLU, c = 1."""
    y_tilde, y = torch.tensor([[-1.0, 1.0, 3.0]]), torch.tensor([[-3.0, 0.0, 2.0]])
    assert shift(y_tilde, y).item() == pytest.approx(4 / 3)
    assert shift(y_tilde, y, (0, math.inf)).item() == pytest.approx(1)


def test_shift_makes_the_means_behind_a_clip_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(5, 1024, generator=generator) * 4 - torch.arange(5).view(5, 1)
    y_tilde = y + torch.randn(y.shape, generator=generator) + 0.5
    for ends in ((0, math.inf), (0, 6), (-2, 1)):
        c = shift(y_tilde, y, ends)
        means = [v.clamp(*ends).mean(1) for v in (y_tilde - c.float().view(5, 1), y)]
        torch.testing.assert_close(*means, atol=1e-4, rtol=0)


def test_the_mean_of_a_clipped_normal() -> None:
    """N(0, 1) behind a ReLU: 1 / sqrt(2 pi); others against a million samples; a deviation of zero is a constant."""
    mean, deviation = torch.tensor([0.0, 2, -3, 7, 1]).double(), torch.tensor([1.0, 3, 2, 4, 0]).double()
    assert clipped_normal_mean(mean, deviation, 0, torch.inf)[0].item() == pytest.approx((2 * np.pi) ** -0.5)
    x = mean + deviation * torch.randn(1_000_000, 5, generator=torch.Generator().manual_seed(0)).double()
    for f, high in ((F.relu, torch.inf), (F.relu6, 6.0)):
        torch.testing.assert_close(clipped_normal_mean(mean, deviation, 0, high), f(x).mean(0), atol=0.01, rtol=0)


def test_the_expected_shift_by_hand() -> None:
    """Two groups of one channel each: errors (1, -3) and (2, 2) over the kernel, means 5 and 10."""
    error = torch.tensor([[[1.0, -3.0]], [[2.0, 2.0]]])
    assert expected_shift(error, torch.tensor([5.0, 10.0]), 2).tolist() == [-10, 40]
    assert expected_shift(torch.tensor([[1.0, 2.0]]), torch.tensor([5.0, 10.0]), 1).tolist() == [25]


# -- the methods -------------------------------------------------------------------------------------------------------


def test_the_rounding_noise_by_hand() -> None:
    """Two batches of one channel, 1, 3 and 5: mean 3, mean square 35 / 3."""
    results = [torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[5.0]]])]
    assert rounding_noise(results).item() == pytest.approx(35 / 3 - 9)
    assert rounding_noise(results, centered=False).item() == pytest.approx(35 / 3)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_exponents_are_the_best_of_all_candidates(centered: bool, per_tensor: bool) -> None:
    """Of the first layer and of one behind quantized ones, for the input that enters there; the biases stay."""
    sim, batches = digits(QuantPlan.default(3, 8, per_tensor))
    before, biases = sim.encodings(), {k: v.clone() for k, v in sim.model.named_parameters() if k.endswith("bias")}
    OutputMse(candidates=3, centered=centered, bias=False).apply(sim, batches)
    chosen = sim.encodings()
    moved = []
    for step in walk(sim, batches):
        if step.layer.module not in ("conv1", "conv4"):
            continue
        name = f"{step.layer.module}.weight"
        weight, now, x = sim.parameter(name).detach(), before[name], torch.cat([x for (x,) in step.inputs])
        errors = []
        for k in (0, -1, 1):
            candidate = Encoding(now.scale * np.float32(2.0**k), now.zero_point, now.grid, now.axis)
            rounded = torch.from_numpy(candidate.fake_quantize(weight.numpy()))
            error = F.conv2d(x.double(), (rounded - weight).double(), padding=1).transpose(0, 1).flatten(1)
            errors.append((error.var(1, correction=0) if centered else error.square().mean(1)).numpy())
        best = np.array([0, -1, 1])[np.argmin(np.sum(errors, 1) if per_tensor else errors, 0)]
        assert (chosen[name].exponent == now.exponent + best).all()
        moved.append(best.any())
    assert len(moved) == 2
    assert per_tensor or any(moved), "otherwise this shows nothing"
    assert all(torch.equal(p, biases[k]) for k, p in sim.model.named_parameters() if k in biases)


def test_biases_are_corrected_inside_the_walk() -> None:
    """As correction after every single layer would: a second correction finds nothing to do in the last layer."""
    sim, batches = digits(QuantPlan.default(3, 8))
    OutputMse().apply(sim, batches)
    *_, step = walk(sim, batches)
    name = f"{step.layer.module}.weight"
    results = [step.run(x, quantizing({name: sim.encodings()[name]})) for x in step.inputs]
    mean, square = error_moments([r.detach() for r in results], step.targets)
    assert (mean.abs() < 1e-5 + 1e-5 * square.sqrt()).all()


@pytest.mark.parametrize("per_tensor", [False, True])
def test_free_scales_of_near_dead_channels_get_room_for_their_biases(per_tensor: bool) -> None:
    """Weights of 1e-9 beside a bias of 0.5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        for parameter, value in ((model[0].weight, 1e-9), (model[0].bias, 0.5)):
            assert isinstance(parameter, Tensor)
            (parameter if per_tensor else parameter[1]).fill_(value)
    plan, batch = QuantPlan.default(8, 8, per_tensor), torch.rand(8, 3, 8, 8)
    free = {role: replace(getattr(plan, role), power_of_2=False) for role in ("weight", "input", "output", "bias")}
    sim = simulate(model, batch, QuantPlan(**free))
    table = sim.calibrate([batch])
    layer = sim.placement.layers[0]
    assert layer.input is not None
    codes = 0.5 / (table["0.weight"].scale.astype(np.float64) * table[layer.input.name].scale)
    assert np.max(codes) <= 2.0**30
    with torch.no_grad():
        noise = sim.model(batch) - model(batch)
    assert noise.abs().max() < 0.1 * model(batch).abs().max()


def test_rounded_weights_keep_their_grid() -> None:
    sim, batches = digits(QuantPlan.default(3, 8))
    table = sim.encodings()
    with torch.no_grad():
        weight = sim.parameter("conv4.weight")
        weight.copy_(torch.from_numpy(table["conv4.weight"].fake_quantize(weight.numpy())))
    OutputMse().apply(sim, batches)
    changed = {name for name, e in sim.encodings().items() if e != table[name]}
    assert "conv4.weight" not in changed
    assert "depthwise.weight" in changed


def test_bias_correction_takes_the_mean_error_away() -> None:
    sim, batches = digits(QuantPlan.default(3, 8))
    before = {layer.module: sim.parameter(f"{layer.module}.bias").clone() for layer in sim.placement.layers}
    BiasCorrection(behind_activation=False).apply(sim, batches)
    for step in walk(sim, batches):
        name = f"{step.layer.module}.weight"
        results = [step.run(x, quantizing({name: sim.encodings()[name]})) for x in step.inputs]
        mean, square = error_moments([r.detach() for r in results], step.targets)
        assert (mean.abs() < 1e-5 + 1e-5 * square.sqrt()).all()
        assert (sim.parameter(f"{step.layer.module}.bias") - before[step.layer.module]).abs().max() > 1e-3


def test_bias_correction_behind_the_activation_function() -> None:
    sim, batches = digits(QuantPlan.default(3, 8))
    BiasCorrection().apply(sim, batches)
    step = next(walk(sim, batches))
    quantize = quantizing({"conv1.weight": sim.encodings()["conv1.weight"]})
    mean, _ = error_moments([F.relu(step.run(x, quantize)).detach() for x in step.inputs], map(F.relu, step.targets))
    assert mean.abs().max() < 1e-5


def test_a_layer_without_bias_and_one_with_float_weights() -> None:
    batch = torch.rand(8, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    plan = QuantPlan.default(3, 8)
    sim = simulate(model, batch, QuantPlan(plan.weight, plan.input, plan.output, plan.bias, (("2", {"weight": None}),)))
    sim.calibrate([batch])
    before = {name: p.clone() for name, p in sim.model.named_parameters()}
    table = sim.encodings()
    OutputMse().apply(sim, [batch])
    BiasCorrection().apply(sim, [batch])
    assert set(sim.encodings()) == set(table)
    changed = {name for name, p in sim.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"2.bias", "4.bias"}, "the float layer's bias makes up for its quantized input"


def test_the_analytic_variant_needs_no_data() -> None:
    """Behind batch norm and ReLU (or ReLU6); nothing else is touched, and the estimate is near what data say."""
    corrected = {}
    for statistics in ("data", "batch_norm"):
        sim, batches = digits(QuantPlan.default(3, 8))
        before = {y.module: sim.parameter(f"{y.module}.bias").clone() for y in sim.placement.layers}
        data = batches if statistics == "data" else []
        BiasCorrection(behind_activation=False, statistics=statistics).apply(sim, data)
        corrected[statistics] = {k: sim.parameter(f"{k}.bias").detach() - v.detach() for k, v in before.items()}
    analytic = corrected["batch_norm"]
    assert {k for k, v in analytic.items() if v.any()} == {"depthwise", "pointwise"}
    for module in ("depthwise", "pointwise"):
        assert torch.corrcoef(torch.stack([analytic[module], corrected["data"][module]]))[0, 1] > 0.5


# -- batch norm re-estimation ------------------------------------------------------------------------------------------


def test_statistics_and_gain_by_hand() -> None:
    """Channel 0 has 1, 3, 5, 7: mean 4, deviation sqrt(5); channel 1 is constant, and a gain of 1 leaves it so."""
    y = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[5.0, 7.0], [2.0, 2.0]]])
    mean, deviation = norm_statistics([y[:1], y[1:]], 2)
    assert mean.tolist() == [4, 2]
    assert deviation.tolist() == pytest.approx([5**0.5, 0])
    assert gain(2 * deviation, deviation).tolist() == [2, 1]
    assert gain(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 5.0])).tolist() == [1.5, 1]


@pytest.mark.parametrize("rounds", [0, 3])
def test_bn_reestimation_gives_mean_and_deviation_back(rounds: int) -> None:
    """The inputs are nearly float. The means are exact but for the lattice of biases."""
    sim, batches = digits(QuantPlan.default(3, 16))
    plain = deviations(sim, batches)
    BnReestimation(rounds).apply(sim, batches)
    found = deviations(sim, batches)
    for name, (mean, ratio) in found.items():
        assert mean < 2e-3 < plain[name][0], name
        if rounds:
            assert ratio < plain[name][1], name


def deviations(sim: Simulation, batches: list[Tensor]) -> dict[str, tuple[float, float]]:
    """Of every layer, the mean over its channels of |mu~ - mu| / sigma and |log(sigma~ / sigma)|."""
    found = {}
    with torch.no_grad():
        for step in walk(sim, batches):
            mean, deviation = norm_statistics(step.targets, len(step.targets))
            table = {n: e for n, e in sim.encodings().items() if n in step.parameters}
            own, spread = norm_statistics((step.run(x, quantizing(table)) for x in step.inputs), len(step.inputs))
            off = float(((own - mean).abs() / deviation).mean()), float((spread / deviation).log().abs().mean())
            found[step.layer.module] = off
    return found


def test_loading_the_same_encodings_keeps_quantized_weights() -> None:
    """A walk loads the table behind every layer; only what it changes is quantized again."""
    sim = resolve("backends", "custom")(conformance.prepared(), conformance.batch(), conformance.LOW_BITS)
    sim.calibrate([conformance.batch()])
    layers = [module for module in sim.model.modules() if getattr(module, "weight_quantizer", None) is not None]
    with torch.no_grad():
        before = [layer.weight_quantizer(layer.weight) for layer in layers]
        table = sim.encodings()
        changed = layers[0].weight_quantizer.site.name
        old = table[changed]
        sim.load(table | {changed: replace(old, scale=old.scale * 2)})
        after = [layer.weight_quantizer(layer.weight) for layer in layers]
    assert [a is b for a, b in zip(before, after, strict=True)] == [False] + [True] * (len(layers) - 1)
    assert not torch.equal(before[0], after[0])
