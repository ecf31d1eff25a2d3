"""Sums beyond 2^24: the simulation in float64, the engine and C agree, and that is proved."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pow2quant import QuantPlan, prepare, simulate
from pow2quant.backends.custom import QuantizedLayer
from pow2quant.backends.wide_sums import largest_sum, wide_sums
from pow2quant.integer.certificate import certify
from pow2quant.integer.lower import lower
from pow2quant.pow2_constraints import Encoding, IntGrid
from pow2quant.runs.executors import simulation_executor
from pow2quant.validation import c99, engine
from pow2quant.validation.agreement import compare


class Block(nn.Module):
    """Convolutions, a residual sum, an average by 9 and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.depthwise, self.up = nn.Conv2d(16, 16, 3, groups=16), nn.ConvTranspose2d(16, 4, 3)
        self.pool, self.head = nn.AvgPool2d(3), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.branch(x))
        x = self.up(torch.relu(self.depthwise(x)))
        return self.head(self.pool(x * x).flatten(1))


def simulated(weight_bits, activation_bits, model=None, overrides=()):
    torch.manual_seed(0)
    batches = [torch.randn(32, 3, 6, 6) * 4 for _ in range(2)]
    network = prepare(Block() if model is None else model, batches[0])
    plan = replace(QuantPlan.default(weight_bits, activation_bits), overrides=overrides)
    sim = simulate(network, batches[0], replace(plan, input=replace(plan.input, bits=activation_bits)))
    sim.calibrate(batches)
    return sim, sim.export(batches[0])


@pytest.mark.parametrize("bits", [(8, 16), (16, 8), (16, 16), (12, 12)], ids=str)
def test_simulation_engine_and_c_agree_beyond_float32(bits):
    sim, artifact = simulated(*bits)
    certificate = certify(artifact)
    assert not certificate.proved
    assert certificate.proved_integers, [b.reason for b in certificate.layers if not b.proved_integers]
    assert "more between the simulation in float64, the integer engine and C" in certificate.sentence
    reference = simulation_executor(sim, "custom", torch.device("cpu"))
    program = lower(artifact)
    others = [engine.executor(program), c99.executor(program)]
    x = [torch.randn(256, 3, 6, 6).numpy() * 4]
    for found in compare(reference, others, [x], artifact, proof=certificate):
        assert (found.differing, found.claim) == (0, "proved")
    tensors = [executor.tensors([x[0][:8]]) for executor in (reference, *others)]
    for name in tensors[0]:
        assert all(np.array_equal(tensors[0][name], other[name]) for other in tensors[1:] if name in other)


def test_on_8_bits_nothing_is_wide_and_the_aimet_backend_claims_no_more():
    sim, artifact = simulated(8, 8)
    certificate = certify(artifact)
    assert certificate.proved
    assert certificate.proved_integers
    layers = [module for module in sim.model.modules() if hasattr(module, "weight_quantizer")]
    with torch.no_grad():
        sim.model(torch.randn(2, 3, 6, 6))
    assert all(layer._known[1] is None for layer in layers)
    assert not simulation_executor(sim, "aimet", torch.device("cpu")).integers


def test_float_runs_and_training_stay_in_float32():
    sim, _ = simulated(16, 16)
    x = torch.randn(4, 3, 6, 6) * 4
    with sim.intercept(lambda site, value, quantized: value):
        assert sim.model(x).dtype is torch.float32
    result = sim.model.train()(x)
    assert result.dtype is torch.float32
    result.sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in sim.model.parameters())


def test_sums_that_are_clipped_twice_before_they_are_rounded_are_exact_too():
    model = nn.Sequential(nn.Conv2d(3, 64, 6), nn.ReLU6(), nn.ReLU())
    sim, artifact = simulated(16, 16, model, (("1", {"output": None}),))
    assert certify(artifact).proved_integers
    reference = simulation_executor(sim, "custom", torch.device("cpu"))
    x = [torch.randn(512, 3, 6, 6).numpy() * 4]
    (found,) = compare(reference, [engine.executor(lower(artifact))], [x], artifact, proof=certify(artifact))
    assert (found.differing, found.claim) == (0, "proved")


def test_a_float_layer_behind_sums_that_nothing_rounds_gets_float32():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
    sim, _ = simulated(16, 16, model, (("1", {"output": None}),))
    assert sim.model(torch.randn(2, 3, 6, 6)).dtype is torch.float32


LAYERS = {
    "plain": (nn.Conv2d(24, 6, 3, padding=1), (2, 24, 5, 5)),
    "grouped": (nn.Conv2d(32, 8, 3, 2, padding=1, groups=2), (2, 32, 7, 7)),
    "depthwise": (nn.Conv1d(8, 8, 5, dilation=2, groups=8), (2, 8, 16)),
    "volume": (nn.Conv3d(4, 3, 2), (2, 4, 3, 4, 3)),
}


def codes(rng, grid, shape, ends):
    """Random integers of a grid, or its ends only."""
    low, high = int(grid.qmin), int(grid.qmax)
    return np.where(rng.integers(0, 2, shape), low, high) if ends else rng.integers(low, high, shape, endpoint=True)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("ends", [False, True], ids=["random", "ends"])
def test_sums_in_parts_are_those_of_the_integers(kind, ends):
    """Against float64, which is exact: no sum passes 2^53."""
    layer, shape = LAYERS[kind]
    compute, rng, split = QuantizedLayer(layer, None, None)._layer, np.random.default_rng(0), 0
    for weight_bits, bits, signed, k in product((2, 8, 16), (8, 12, 16), (False, True), (-40, 0, 30)):
        source = Encoding(np.float32(2.0**k), 0 if signed else 5, IntGrid(bits, signed))
        channels = layer.out_channels
        own = Encoding(np.ldexp(np.float32(1), rng.integers(-60, 30, channels)), 0, IntGrid(weight_bits, True), 0)
        x = torch.from_numpy(source.dequantize(codes(rng, source.grid, shape, ends)))
        weight = torch.from_numpy(own.dequantize(codes(rng, own.grid, layer.weight.shape, ends)))
        bias = torch.from_numpy(own.scale * np.float32(2.0**k) * rng.integers(-(2**23), 2**23, channels, np.int32))

        how = wide_sums(layer, weight, bias, source, own)
        if how is None:
            assert bits + weight_bits < 24
            continue
        split += how.split
        exact = compute(x.double(), weight.double(), bias.double())
        assert torch.equal(how.of(compute, x, weight, bias), exact), (weight_bits, bits, signed, k)
    assert split > 20


@pytest.mark.parametrize("layer", [nn.Linear(40, 24), nn.ConvTranspose2d(8, 12, 3), nn.Conv2d(8, 12, 3)], ids=repr)
def test_large_layers_are_widened_part_by_part(layer, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randint(-(2**15), 2**15, layer.weight.shape).float()
    bias = torch.randint(-(2**15), 2**15, layer.bias.shape).float()
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    source = Encoding(np.ones((), np.float32), np.zeros((), np.int64), IntGrid(16, False))
    own = Encoding(
        np.ones(weight.shape[axis], np.float32), np.zeros(weight.shape[axis], np.int64), IntGrid(16, True), axis
    )
    x = torch.randint(0, 2**16, (3, 40) if weight.ndim == 2 else (3, 8, 9, 9)).float()

    def found():
        how = wide_sums(layer, weight, bias, source, own)
        call = {2: F.linear, 4: F.conv_transpose2d if axis else F.conv2d}[weight.ndim]
        return largest_sum(layer, weight, bias, source, own), how.of(call, x, weight, bias)

    whole, result = found()
    monkeypatch.setattr("pow2quant.backends.wide_sums.LOOKED_AT", 50)
    monkeypatch.setattr("pow2quant.backends.wide_sums.MULTIPLIED", 90)
    assert (
        found()[0]
        == whole
        == float(weight.abs().double().transpose(0, axis).flatten(1).sum(1).max() * (2**16 - 1) + bias.abs().max())
    )
    assert torch.equal(found()[1], result)
