"""The compiled quantizers against the plain code, to the bit; without a compiler the plain code computes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pow2quant.backends import fake_quant, native
from pow2quant.backends.fake_quant import BLOCK, learned
from pow2quant.compiled import compiler
from pow2quant.methods import bias_correction
from tests.test_kernels import GRIDS, SHAPES, encoding_of, quantizer_of, same, values

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C compiler")

LAYOUTS = (torch.contiguous_format, torch.channels_last)
LARGE = [((3, BLOCK), None), ((2, 40, 45, 47), None), ((300, 45, 5, 5), 0), ((2, 2 * BLOCK), 0), ((1, BLOCK + 9), 0)]


def in_both_ways(run) -> None:
    """Raises AssertionError where the C does not compute, or another thing than the plain code."""
    assert fake_quant.fused(torch.zeros(1)) is native
    found = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_quant, "fused", lambda x: None)
        expected = run()
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert same(a, b), number


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=layout) if x.ndim == 4 else x


@given(
    st.sampled_from(SHAPES),
    st.sampled_from(GRIDS),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_fixed_encodings(form, grid, layout, free, seed):
    shape, axis = form
    x = laid_out(values(shape, seed), layout)
    quantizer = quantizer_of(shape, encoding_of(shape, axis, grid, free=free, seed=seed), "half_even")

    def run() -> list[Tensor]:
        moving = x.clone(memory_format=torch.preserve_format).requires_grad_()
        result = quantizer(moving)
        result.backward(torch.ones_like(result))
        assert moving.grad is not None
        with torch.no_grad():
            again = quantizer(x)
            quantizer.overwrites = True
            written = quantizer(x.clone(memory_format=torch.preserve_format))
            quantizer.overwrites = False
        return [result.detach(), moving.grad, again, written]

    in_both_ways(run)


def learns(shape, axis, grid, top, dtype, layouts, seed, *, odd=True) -> None:
    x, grad = (laid_out(values(shape, seed + i).to(dtype), layout) for i, layout in enumerate(layouts))
    grad = torch.nan_to_num(grad, 1.0).clamp(-100, 100)
    if not odd:  # sums of others are NaN
        x = torch.nan_to_num(x, 1.0).clamp(-100, 100)
    scale = torch.from_numpy(encoding_of(shape, axis, grid, free=False, seed=seed).scale.copy())
    given_scale = float(scale) if axis is None else scale

    def run() -> list[Tensor]:
        moving = x.clone(memory_format=torch.preserve_format).requires_grad_()
        parameter = torch.zeros(scale.shape, requires_grad=True)
        result = learned(moving, parameter, given_scale, (float(grid.qmin), float(grid.qmax)), axis, 0.7, top)
        result.backward(grad)
        assert moving.grad is not None
        assert parameter.grad is not None
        frozen = learned(moving, parameter.detach(), given_scale, (float(grid.qmin), float(grid.qmax)), axis, 0.7, top)
        (alone,) = torch.autograd.grad(frozen, moving, grad)
        number = ~x.isnan()  # elsewhere PyTorch's own gradient depends on the place in memory
        return [result.detach(), moving.grad[number], parameter.grad, frozen.detach(), alone[number]]

    in_both_ways(run)


@given(
    st.sampled_from(SHAPES),
    st.sampled_from(GRIDS),
    st.sampled_from((None, math.inf, 6.0, 0.75)),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    st.booleans(),
    st.integers(0, 2**32 - 2),
)
def test_learned_scales(form, grid, top, dtype, layouts, odd, seed):
    shape, axis = form
    if dtype is torch.bfloat16 and (grid.width > 8 or axis is not None):
        dtype = torch.float32
    learns(shape, axis, grid, top, dtype, layouts, seed, odd=odd)


@pytest.mark.parametrize("form", LARGE)
@pytest.mark.parametrize("top", [None, 6.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_tensors_that_are_worked_on_in_parts(form, top, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        learns(*form, GRIDS[0], top, torch.float32, LAYOUTS, 5, odd=False)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("command", ["", "false"])
def test_the_plain_code_computes_where_nothing_can_be_compiled(command, tmp_path, monkeypatch):
    x = torch.linspace(-3, 3, 50)
    expected = learned(x, torch.zeros(()), 0.25, (-8.0, 7.0), None, 1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if command:
        monkeypatch.setenv("CC", command)
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    for cached in (fake_quant._native, native.functions):
        cached.cache_clear()
    try:
        assert fake_quant.fused(x) is None
        assert torch.equal(learned(x, torch.zeros(()), 0.25, (-8.0, 7.0), None, 1.0), expected)
    finally:
        for cached in (fake_quant._native, native.functions):
            cached.cache_clear()


def test_what_has_no_memory_of_its_own_is_left_to_the_plain_code():
    assert fake_quant.fused(torch.zeros(3, device="meta")) is None
    assert fake_quant.fused(torch.zeros(0)) is None
    assert fake_quant.fused(torch.zeros(3, dtype=torch.float64)) is None
    assert np.array_equal(learned(torch.zeros(0), torch.zeros(()), 0.5, (-8.0, 7.0), None, 1.0), np.zeros(0))


@pytest.mark.parametrize("ends", [(0.0, math.inf), (0.0, 6.0), (-2.0, 1.0)])
@pytest.mark.parametrize("count", [1, 1037])
def test_what_bias_correction_shifts(ends: tuple[float, float], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped and nearly dead channels too; sums have another order, so that their last digits may differ."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(9, count, generator=generator) - torch.arange(9).view(9, 1)
    result = y + torch.randn(y.shape, generator=generator) / 8 + 0.1
    found = bias_correction.shift(result, y, ends)
    monkeypatch.setattr(bias_correction, "fused", lambda x: None)
    torch.testing.assert_close(found, bias_correction.shift(result, y, ends), atol=1e-6, rtol=0)


def test_shifts_of_narrower_numbers_are_those_of_the_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C reads float32 alone."""
    y = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = [bias_correction.shift(y + 0.25, target, (0.0, 6.0)) for target in (y, y.float())]
    monkeypatch.setattr(bias_correction, "fused", lambda x: None)
    for shifts, target in zip(found, (y, y.float()), strict=True):
        assert torch.equal(shifts, bias_correction.shift(y + 0.25, target, (0.0, 6.0)))
