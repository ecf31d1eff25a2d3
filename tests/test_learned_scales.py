"""Gradients of learned scales, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pow2quant.backends.fake_quant import BLOCK, fake_quantize, learned
from pow2quant.pow2_constraints import Encoding, IntGrid, power_of_two
from pow2quant.training.exponents import REACH, RULES


def on_a_grid(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """The straight-through quantizer in differentiable operations: what the gradients are checked against."""
    v = x / scale
    code = v.round()
    inside = (code >= low) & (code <= high)
    return scale * torch.where(inside, v + (code - v).detach(), code.clamp(low, high))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((4, 3, 5, 5), None), ((2, 9, 50, 50), None), ((6, 2, 3, 3), 0), ((90, 50, 3, 3), 0), ((3, 6, 2), 1)],
)
@pytest.mark.parametrize(("low", "high"), [(-8.0, 7.0), (0.0, 15.0), (-6.0, 9.0)])
def test_gradients_are_those_of_the_straight_through_quantizer(shape, axis, low, high):
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    broad = [1 if d != axis else -1 for d in range(len(shape))]
    k = torch.tensor(-2.0) if axis is None else torch.randint(-4, 0, (shape[axis],), generator=generator).float()
    scale = k.double().exp2().view(broad if axis is not None else ()).requires_grad_()
    x.requires_grad_()
    on_a_grid(x, scale, low, high).backward(grad)
    plain = float(scale.detach()) if axis is None else scale.detach().flatten()
    parameter = torch.zeros(() if axis is None else shape[axis], dtype=torch.float64, requires_grad=True)
    own = x.detach().clone().requires_grad_()
    quantized = learned(own, parameter, plain, (low, high), axis, 2.0)
    quantized.backward(grad)
    assert torch.equal(quantized, on_a_grid(x, scale, low, high).detach())
    assert torch.equal(own.grad, x.grad)
    torch.testing.assert_close(parameter.grad, 2 * (scale * scale.grad).detach().reshape(parameter.shape))


def test_only_cpus_work_on_pieces_that_fit_a_cache():
    operations = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations[-1].append(func)
            return func(*args, **kwargs or {})

    for device in ("meta", "cpu"):
        for size in (2, 4 * BLOCK):
            x, parameter = (torch.zeros(n, device=device, requires_grad=True) for n in (size, 1))
            operations.append([])
            with Noted():
                learned(x, parameter[0], 0.5, (-8.0, 7.0), None, 1.0).sum().backward()
    few, many, cpu_few, cpu_many = operations
    assert few == many
    assert len(cpu_many) > len(cpu_few)


@pytest.mark.parametrize(("relu", "top"), [(torch.nn.ReLU(), math.inf), (torch.nn.ReLU6(), 6.0)])
@pytest.mark.parametrize(("scale", "low", "high"), [(2.0**-5, 0.0, 255.0), (2.0**-6, 0.0, 255.0), (0.5, -6.0, 9.0)])
def test_a_quantizer_computes_the_relu_in_front_of_it_to_the_bit(relu, top, scale, low, high):
    x = 4 * torch.randn(3, 5, 130, 130, generator=torch.Generator().manual_seed(1))
    x[0, 0, 0, :6] = torch.tensor([0.0, 6.0, -0.0, 1e30, -1e30, 5.99])
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for clip in (None, top):
            own = x.detach().contiguous(memory_format=layout).requires_grad_()
            parameter = torch.zeros((), requires_grad=True)
            entering = relu(own) if clip is None else own
            result = learned(entering, parameter, scale, (low, high), None, 1.0, clip)
            result.backward(grad)
            found.append((result.detach(), own.grad, parameter.grad))
        assert all(torch.equal(a, b) for a, b in zip(found[-2], found[-1], strict=True))


@given(st.integers(2, 8), st.booleans(), st.integers(-10, 3), st.integers(0, 2**32 - 1))
def test_the_quantizer_is_the_encodings_to_the_bit(bits, signed, k, seed):
    encoding = Encoding(power_of_two(k), np.int64(0), IntGrid(bits, signed))
    x = np.random.default_rng(seed).normal(0, 2.0 ** (k + bits - 2), 500).astype(np.float32)
    x = np.concatenate([x, (np.arange(-40, 40) * np.float32(0.5) * encoding.scale).astype(np.float32)])
    ends = float(encoding.grid.qmin), float(encoding.grid.qmax)
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(x), 2.0**k, *ends).numpy(), encoding.fake_quantize(x))


def test_slopes_are_the_papers():
    assert RULES["tqt"].slope(2.0, 100.0, 7.0) == math.log(2)
    assert RULES["lsq"].slope(2.0, 100.0, 7.0) == pytest.approx(1 / 2 / math.sqrt(700))


@pytest.mark.parametrize("rule", RULES)
def test_every_offset_lies_amid_the_parameters_that_give_it(rule):
    offsets = torch.arange(-REACH, REACH + 1.0)
    middles = RULES[rule].middle(offsets)
    assert torch.equal(RULES[rule].offset(middles), offsets)
    near = middles * 1.3 if rule == "lsq" else middles + 0.4
    assert torch.equal(RULES[rule].offset(near), offsets)
