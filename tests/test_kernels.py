"""Triton's kernels against the plain code: in Triton's interpreter, which needs no GPU, and on a GPU if there is one.

Triton reads TRITON_INTERPRET when it is imported; so all that it interprets is computed in one process of its own, this
file run as a program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from pow2quant.artifact import Site
from pow2quant.backends import fake_quant
from pow2quant.backends.fake_quant import FakeQuantize, learned
from pow2quant.backends.target_rounding import TargetRounding
from pow2quant.pow2_constraints import Encoding, IntGrid, power_of_two
from pow2quant.pow2_constraints.arithmetic import ROUNDINGS

SHAPES = [((1,), None), ((3, 700), None), ((2, 5, 3, 4), None), ((40, 9), 0), ((3, 1100), 0), ((2, 5, 3, 4), 1)]
GRIDS = [IntGrid(8, signed=False), IntGrid(4, signed=True), IntGrid(16, signed=True), IntGrid(2, signed=True)]
RULES = [rule for rule in ROUNDINGS if rule != "gemmlowp"]  # which looks at accumulators


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of every kind: ties, both zeros, saturating, huge, tiny, infinite, NaN."""
    generator = np.random.default_rng(seed)
    found = generator.normal(0, 2, shape).astype(np.float32)
    ties = generator.integers(-40, 40, shape).astype(np.float32) / np.float32(16)
    odd = generator.choice(np.float32([-0.0, 0.0, 1e30, -1e30, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e5]), shape)
    kind = generator.integers(0, 8, shape)
    return torch.from_numpy(np.where(kind < 4, found, np.where(kind < 7, ties, odd)))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, -0 told from 0; every NaN is one."""
    a, b = a.cpu().float(), b.cpu().float()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        torch.where(a.isnan(), 0.0, a).view(torch.int32), torch.where(b.isnan(), 0.0, b).view(torch.int32)
    )


def encoding_of(shape: tuple[int, ...], axis: int | None, grid: IntGrid, *, free: bool, seed: int) -> Encoding:
    generator = np.random.default_rng(seed)
    size = () if axis is None else (shape[axis],)
    scale = power_of_two(generator.integers(-9, 1, size))
    zero = generator.integers(0, 2, size) * (0 if grid.signed else 6)
    return Encoding(scale * np.float32(1.1 if free else 1), np.asarray(zero, np.int64), grid, axis)


def quantizer_of(shape: tuple[int, ...], encoding: Encoding, rule: str) -> FakeQuantize:
    rounding = None if rule == "half_even" else TargetRounding(rule)
    quantizer = FakeQuantize(Site("x", "output"), rounding=rounding)
    quantizer.encoding = encoding
    return quantizer


def compared(device: str) -> dict[str, int]:
    """Runs all cases in both ways; how many there were of each kind. Raises AssertionError where two differ."""
    from pow2quant.backends import kernels

    counts = dict.fromkeys(("fixed", "learned", "bfloat16"), 0)
    calls: list[str] = []
    plain = fake_quant.fused

    def counting(x: Tensor) -> SimpleNamespace:
        def called(name: str):
            def call(*arguments: object, **options: object) -> object:
                calls.append(name)
                return getattr(kernels, name)(*arguments, **options)

            return call

        names = ("fake_quantize", "gradients")
        return SimpleNamespace(RULES=kernels.RULES, **{n: called(n) for n in names})

    def both(run, expected_calls: list[str]) -> None:
        fake_quant.fused = lambda x: None
        expected = run("cpu")
        fake_quant.fused, calls[:] = counting, []
        found = run(device)
        fake_quant.fused = plain
        assert calls == expected_calls
        for name, a in expected.items():
            if name == "scale":
                torch.testing.assert_close(found[name].cpu(), a, rtol=1e-4, atol=1e-4, equal_nan=True)
            else:
                assert same(found[name], a), name

    layouts = (torch.contiguous_format, torch.channels_last)
    for number, ((shape, axis), free, rule) in enumerate(product(SHAPES, (False, True), RULES)):
        grid = GRIDS[number % len(GRIDS)]
        x = values(shape, number)
        if len(shape) == 4:
            x = x.contiguous(memory_format=layouts[number % 2])
        encoding = encoding_of(shape, axis, grid, free=free, seed=number)

        def fixed(device: str, x=x, shape=shape, encoding=encoding, rule=rule) -> dict[str, Tensor]:
            quantizer = quantizer_of(shape, encoding, rule)
            moving = x.to(device).requires_grad_()
            result = quantizer(moving)
            result.backward(torch.ones_like(result))
            with torch.no_grad():
                again = quantizer(x.to(device))
                quantizer.overwrites = True
                written = quantizer(x.to(device).clone(memory_format=torch.preserve_format))
            return {"result": result.detach(), "gradient": moving.grad, "again": again, "written": written}

        both(fixed, ["fake_quantize"] * 3)
        counts["fixed"] += 1
    for number, ((shape, axis), grid, dtype) in enumerate(product(SHAPES, GRIDS, ("float32", "bfloat16"))):
        top = (None, np.inf, 2.0)[number // 2 % 3]
        if dtype == "bfloat16" and (grid.width > 8 or axis is not None):
            continue
        x, grad = (values(shape, 2 * number + i).to(getattr(torch, dtype)) for i in (0, 1))
        if dtype == "bfloat16":  # Triton's interpreter takes its subnormal numbers for zeros
            x = torch.where(x.abs() < 1e-30, 0.0, x)
        grad = torch.nan_to_num(grad, 1.0).clamp(-100, 100)
        if number % 3:  # the others' sums are NaN
            x = torch.nan_to_num(x, 1.0).clamp(-100, 100)
        if len(shape) == 4:
            x = x.contiguous(memory_format=layouts[number % 2])
        scale = torch.from_numpy(encoding_of(shape, axis, grid, free=False, seed=number).scale.copy())
        ends = float(grid.qmin), float(grid.qmax)

        def step(device: str, x=x, grad=grad, scale=scale, ends=ends, axis=axis, top=top) -> dict[str, Tensor]:
            given = scale.to(device) if axis is not None or device != "cpu" else float(scale)
            parameter = torch.zeros(scale.shape, device=device, requires_grad=True)
            moving = x.to(device).requires_grad_()
            result = learned(moving, parameter, given, ends, axis, 1.0, top)
            result.backward(grad.to(device))
            with_it = {} if x.dtype is torch.bfloat16 else {"scale": parameter.grad}
            return {"result": result.detach(), "gradient": moving.grad, **with_it}

        both(step, ["fake_quantize", "gradients"])
        counts["bfloat16" if dtype == "bfloat16" else "learned"] += 1
    return counts


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which comes with PyTorch for CUDA")
def test_kernels_compute_what_the_plain_code_does_in_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'fixed': 60, 'learned': 24, 'bfloat16': 9" in done.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which comes with PyTorch for CUDA")
def test_the_plain_code_computes_where_triton_fails():
    with pytest.warns(UserWarning, match="cpu: quantizers are slower, as Triton fails: "):
        assert fake_quant._kernels(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_compute_on_a_gpu_what_the_plain_code_does_on_a_cpu():
    assert fake_quant.fused(torch.zeros(1, device="cuda")) is not None
    assert all(compared("cuda").values())


if __name__ == "__main__":
    print(compared("cpu"))
