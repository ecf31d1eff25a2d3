"""Every operation of a prepared network on every executor, and what the table of operations says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pow2quant import functions, prepare, simulate
from pow2quant.frontends import modules as m
from pow2quant.frontends.operators import OPERATORS
from pow2quant.plugins import resolve
from pow2quant.pow2_constraints import Encoding, IntGrid
from tests.prepared import Sketch, outcome

VOLUMES, MAPS, ROWS, VECTORS, TOKENS = (8, 4, 4, 4), (8, 6, 6), (8, 12), (8,), (6,)
"""What an operation reads: (C, D, H, W), (C, H, W), (C, L) or (C) behind a layer, or integers."""


@dataclass(frozen=True)
class Case:
    """One operation: what is built on a tensor of this shape.

    integers: the engine and C take it. proved: what the certificate says of the network.
    """

    build: Callable[[Sketch, fx.Node], Any]
    shape: tuple[int, ...] = MAPS
    integers: bool = True
    proved: bool = True


def constant(*shape: int) -> m.Constant:
    return m.Constant(torch.randn(shape))


CASES: dict[str, Case] = {
    "Add a constant": Case(lambda s, x: s("op", m.Add(), x, s("c", constant(1, 8, 6, 6)))),
    "Mul by a constant": Case(lambda s, x: s("op", m.Mul(), x, s("c", constant(1, 1, 12))), ROWS),
    "Sub from a constant": Case(lambda s, x: s("op", m.Sub(), s("c", constant(1, 8, 1)), x), ROWS),
    "MatMul with a constant": Case(lambda s, x: s("op", m.MatMul(), x, s("c", constant(12, 5))), ROWS),
    "MatMul of a constant": Case(lambda s, x: s("op", m.MatMul(), s("c", constant(5, 8)), x), ROWS),
    "MatMul with a constant for each head": Case(lambda s, x: s("op", m.MatMul(), x, s("c", constant(1, 8, 6, 3)))),
    "MatMul of one constant with every head": Case(lambda s, x: s("op", m.MatMul(), s("c", constant(1, 3, 6)), x)),
    "MatMul with one head for all": Case(lambda s, x: s("op", m.MatMul(), x, s("y", m.Slice([(1, 0, 1, 1)]), x))),
    "MatMul where heads are repeated in groups": Case(
        lambda s, x: s(
            "op",
            m.MatMul(),
            s("a", m.Reshape((-1, 2, 4, 6, 6)), x),
            s("b", m.Slice([(2, 1, 2, 1)]), s("y", m.Reshape((-1, 2, 4, 6, 6)), x)),
        )
    ),
    "Add": Case(lambda s, x: s("op", m.Add(), x, s("y", nn.Conv2d(8, 8, 1), x))),
    "Sub": Case(lambda s, x: s("op", m.Sub(), x, s("y", nn.Conv2d(8, 8, 1), x))),
    "Mul": Case(lambda s, x: s("op", m.Mul(), x, s("y", nn.Conv2d(8, 8, 1), x))),
    "Div": Case(lambda s, x: s("op", m.Div(), x, s("y", nn.Conv2d(8, 8, 1), x))),
    "Div by a constant": Case(lambda s, x: s("op", m.Div(), x, s("c", constant(1, 8, 1))), ROWS),
    "Div of a constant": Case(lambda s, x: s("op", m.Div(), s("c", constant(1, 1, 12)), x), ROWS),
    "Div by a sum": Case(lambda s, x: s("op", m.Div(), x, s("y", m.Sum([1], True), s("z", nn.ReLU(), x)))),
    "MatMul": Case(lambda s, x: s("op", m.MatMul(), x, s("y", m.Permute((0, 1, 3, 2)), x))),
    "Maximum": Case(lambda s, x: s("op", m.Maximum(), x, s("y", nn.Conv2d(8, 8, 1), x))),
    "Minimum": Case(lambda s, x: s("op", m.Minimum(), x, s("y", nn.Conv1d(8, 8, 1), x)), ROWS),
    "Choose": Case(lambda s, x: s("op", m.Choose(torch.rand(1, 1, 12) > 0.5), x, s("y", nn.Conv1d(8, 8, 1), x)), ROWS),
    "Choose a constant": Case(
        lambda s, x: s("op", m.Choose(torch.rand(8, 1) > 0.5), x, s("c", constant(1, 1, 12))), ROWS
    ),
    "Select": Case(
        lambda s, x: s("op", m.Select(), s("c", m.Compare("Greater", 0), x), x, s("y", nn.Conv1d(8, 8, 1), x)), ROWS
    ),
    "Select by one channel": Case(
        lambda s, x: s(
            "op",
            m.Select(),
            s("c", m.Compare("LessOrEqual", 0.1), s("z", nn.Conv2d(8, 1, 1), x)),
            s("y", nn.Conv2d(8, 8, 1), x),
            s("n", m.Constant(torch.tensor(0.37))),
        )
    ),
    "Normalize along other dimensions": Case(lambda s, x: s("op", m.Normalize((1,)), x), integers=False, proved=False),
    "Normalize, not below a length": Case(
        lambda s, x: s("op", m.Normalize((3,), 0.5), x), integers=False, proved=False
    ),
    "Resample one value": Case(
        lambda s, x: s("op", m.Resample.of([resized(4), resized(5)], (1, 1)), s("y", nn.Conv2d(8, 1, 6), x))
    ),
    "Linear": Case(lambda s, x: s("op", nn.Linear(8, 4), x), VECTORS),
    "Concat with an expanded constant": Case(
        lambda s, x: s("op", m.Concat(2), s("e", m.Expand(), s("c", constant(1, 8, 1)), x), x), ROWS
    ),
    "Embedding": Case(lambda s, x: s("op", m.Embedding(50, 8), x), TOKENS),
    "CompareIntegers": Case(lambda s, x: s("op", m.CompareIntegers("NotEqual", torch.arange(6)), x), TOKENS),
    "Real": Case(lambda s, x: s("op", m.Real(), x), TOKENS, proved=False),
    "ArgMax": Case(lambda s, x: (x, s("op", m.ArgMax(1, keepdim=False), x))),
    "Places": Case(lambda s, x: (x, s("op", m.Places(3, 1), x)), integers=False),
    "Gathered": Case(lambda s, x: s("op", m.Gathered(1), x, s("p", m.Places(3, 1), x)), integers=False),
    "Scattered": Case(
        lambda s, x: s("op", m.Scattered(1), x, s("p", m.Places(3, 1), x), s("v", m.TopK(3, 1), x)), integers=False
    ),
    "Count": Case(
        lambda s, x: s("e", m.Embedding(60, 8), s("op", m.Count("Add", torch.arange(6)), x)),
        TOKENS,
        integers=False,
        proved=False,
    ),
    "CountUp": Case(
        lambda s, x: s(
            "e",
            m.Embedding(60, 8),
            s("op", m.CountUp(1), s("c", m.Whole(), s("t", m.CompareIntegers("Less", torch.tensor(9)), x))),
        ),
        TOKENS,
        integers=False,
        proved=False,
    ),
    "GridSample": Case(
        lambda s, x: s(
            "op",
            m.GridSample("bilinear", "zeros", True),
            x,
            s("p", m.Permute((0, 2, 3, 1)), s("c", nn.Conv2d(8, 2, 1), x)),
        ),
        integers=False,
        proved=False,
    ),
}

FUNCTIONS = [
    *(m.Abs(), m.Sign(), m.Floor(), m.Ceil(), m.Round(), m.Sqrt(), m.Rsqrt(), m.Reciprocal(), m.Exp(), m.Exp(0.7)),
    *(m.Log(), m.Log(1.4426950408889634, 1.0), m.Pow(3), m.Pow(0.5), m.Pow(-1), m.Sin(), m.Cos(), m.Erf()),
    *(m.Tan(), m.Atan(), m.Sinh(), m.Cosh(), m.Asinh(), m.Expm1(), m.Trunc(), m.TruncDivide(0.3), m.Fmod(0.3)),
    *(m.FloorDivide(2), m.FloorDivide(0.3), m.Remainder(2), m.Remainder(0.3), m.Softplus(), m.Softplus(2.5)),
    *(m.LogSigmoid(), m.Mish(), m.Softsign(), m.Tanhshrink(), m.ScaledELU(1.0507, 1.6733), m.ScaledELU(1, 1.3, 1.3)),
    *(m.Softshrink(0.5), m.Threshold(0.1, 20.0), m.Threshold(0.5, 0, magnitude=True), m.Compare("LessOrEqual", 0.3)),
    *(m.Clamp(0.1, None), m.Clamp(None, 1), m.Clamp(-2, -0.5), m.Compare("Equal", 0), m.Compare("Greater", 0)),
]

SINGLE = (m.Erf, m.Tan, m.Atan, m.Sinh, m.Cosh, m.Asinh)
"""What onnxruntime has in float32 only."""


def randomized(module: nn.Module) -> nn.Module:
    """The module with random parameters."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def resized(size: int, mode: str = "linear", **options: Any) -> Callable[[Tensor], Tensor]:
    if mode == "bicubic":
        return lambda x: F.interpolate(x[..., None], size=(size, 1), mode=mode)[..., 0]
    return lambda x: F.interpolate(x, size=size, mode=mode, **options)


torch.manual_seed(0)
MASK = torch.rand(1, 1, 6, 6) > 0.5
CAUSAL = torch.triu(torch.full((6, 6), -torch.inf), 1)
ON_MAPS = [
    *(nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-1, 2), m.Sigmoid(), m.Tanh(), m.Hardsigmoid(), m.HardSwish(), m.SiLU()),
    *(m.GELU(), m.ELU(), m.LeakyReLU(0.1), nn.PReLU(8), m.Scale(0.7, -0.2), m.Masked(MASK, 0.0), m.Masked(MASK, -3)),
    *(m.Sum((2, 3), keepdim=False), m.Sum((1,), keepdim=True), m.Mean((1,), keepdim=True)),
    *(m.Largest((2, 3), keepdim=False), m.Largest((1,), keepdim=True), m.Least((2,), keepdim=False)),
    *(m.LogSumExp((1,), keepdim=False), m.Product((1,), keepdim=False), m.Variance((2, 3), keepdim=False)),
    *(m.Variance((1,), True, 0, root=True), m.Norm((1,), True), m.Norm((2, 3), False, 1), m.CumSum(1)),
    *(m.TopK(3, 2), m.Softmax(1), m.LogSoftmax(1), m.MaskedSoftmax(-1, 0.353), m.MaskedSoftmax(-1, 0.353, CAUSAL)),
    *(
        m.Normalize((3,)),
        m.Normalize((1, 2, 3)),
        m.RMSNorm([6, 6]),
        randomized(m.RMSNorm([6], 1e-6)),
        randomized(m.LayerNorm([8, 6, 6])),
    ),
    *(randomized(m.GroupNorm(2, 8)), m.GroupNorm(8, 8, affine=False), m.LocalResponseNorm(3, k=2.0)),
    *(m.Take(3, [2, 1, 0, 1, 2, 3, 4, 5, 4, 3]), m.Take(2, [5, 4, 3, 2, 1, 0]), m.Take(1, [0, 0, 0, 1, 1, 1, 5])),
    *(m.ConstantPad((1, 1, 1, 1), 1.0), m.ConstantPad((1, 0), -0.3), m.ZeroPad((1, 2, -1, 1))),
    *(m.NearestUpsample((2, 3)), m.Slice([(2, 1, None, 2)]), m.Permute((0, 2, 3, 1)), nn.Flatten()),
    *(m.PaddedMaxPool([2, 3], [1, 2], [1, 1], [0, 1], [1, 0]), m.PaddedMaxPool([3, 2], [2, 1], [1, 2], [1, 0], [2, 1])),
    *(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.ConvTranspose2d(8, 4, 3, 2, 1, 1, groups=2)),
    *(m.Resample.of([resized(12), resized(12)], (6, 6)), m.Resample.of([None, resized(11)], (6, 6))),
    *(m.Resample.of([resized(9, align_corners=True)], (6,)), m.Resample.of([resized(13, "bicubic")], (6,))),
]
"""Modules of one map behind a layer."""

ON_ROWS = [nn.MaxPool1d(2), nn.AvgPool1d(3, 2, 1), nn.ConvTranspose1d(8, 4, 3, 2, 1, 1), m.Reshape((-1, 4, 24))]
ON_VOLUMES = [
    *(nn.MaxPool3d(2), nn.AvgPool3d(2), nn.ConvTranspose3d(8, 3, 2, 2), nn.Conv3d(8, 3, 3, padding=1, groups=1)),
    *(nn.MaxPool3d(3, 2, 1, ceil_mode=True), nn.AvgPool3d((3, 2, 1), (1, 2, 2), (1, 0, 0), count_include_pad=False)),
    *(nn.Conv3d(8, 6, (1, 1, 3)), nn.Conv3d(8, 6, (3, 1, 1), (2, 1, 1), (1, 0, 0)), nn.MaxPool3d((1, 2, 2))),
    *(nn.Conv3d(8, 8, (2, 3, 1), (2, 1, 1), (0, 4, 0), (1, 2, 1), 4), nn.AvgPool3d((1, 1, 2))),
    nn.ConvTranspose3d(8, 4, (3, 2, 3), (2, 1, 2), (1, 0, 2), (1, 0, 1), 2),
    m.Resample.of([resized(7), resized(3), resized(5)], (4, 4, 4)),
]


CUBIC = m.Resample.of([resized(13, "bicubic"), resized(13, "bicubic")], (6, 6))
CASES["Resample, sums beyond 2^24"] = Case(lambda s, x: s("op", CUBIC, x), proved=False)


def module_case(module: nn.Module, shape: tuple[int, ...] = MAPS) -> Case:
    """A case whose flags are those of the module's row."""
    row = OPERATORS[type(module)]
    return Case(lambda s, x: s("op", module, x), shape, integers=row.integers, proved=row.proved)


CASES |= {repr(module): module_case(module) for module in (*FUNCTIONS, *ON_MAPS)}
CASES |= {repr(module): module_case(module, ROWS) for module in ON_ROWS}
CASES |= {repr(module): module_case(module, VOLUMES) for module in ON_VOLUMES}


def front(shape: tuple[int, ...]) -> nn.Module | None:
    """The layer in front, so that what is read is a result."""
    layers = {
        5: nn.Conv3d(3, 8, 3, padding=1),
        4: nn.Conv2d(3, 8, 3, padding=1),
        3: nn.Conv1d(3, 8, 3, padding=1),
        2: nn.Linear(3, 8),
    }
    return None if shape == TOKENS else layers[len(shape) + 1]


@pytest.mark.parametrize("name", CASES)
def test_operation(name, tmp_path):
    case = CASES[name]
    torch.manual_seed(0)
    sketch, layer = Sketch("x"), front(case.shape)
    shape = case.shape if layer is None else (3, *case.shape[1:])

    def batch(size: int) -> tuple[torch.Tensor]:
        return (torch.randint(0, 50, (size, *shape)) if layer is None else torch.randn(size, *shape),)

    (x,) = sketch.inputs
    result = case.build(sketch, x if layer is None else sketch("front", layer, x))
    found = outcome(sketch.network(result, *batch(2)), [batch(4), batch(4), batch(8)], tmp_path)
    assert found.pop("proved") == case.proved
    assert ("integers" not in found) == case.integers, found
    found.pop("integers", None)
    assert set(found.values()) == {0}, found
    assert len(found) == (4 if case.integers else 2)


@pytest.mark.parametrize("module", [f for f in FUNCTIONS if not isinstance(f, SINGLE)], ids=repr)
def test_functions_at_16_bits(module, tmp_path):
    torch.manual_seed(0)
    sketch = Sketch("x")
    result = sketch("op", module, sketch("front", nn.Linear(3, 8), *sketch.inputs))
    batches = [(torch.randn(n, 3),) for n in (200, 200, 2000)]
    found = outcome(sketch.network(result, torch.randn(2, 3)), batches, tmp_path, bits=16)
    found.pop("proved")
    assert set(found.values()) == {0}, found
    assert len(found) == 4


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_quotients_of_any_sign_and_by_zero(bits, tmp_path):
    torch.manual_seed(0)
    sketch = Sketch("x")
    front = sketch("front", nn.Linear(3, 8), *sketch.inputs)
    result = sketch("op", m.Div(), front, sketch("y", m.Floor(), sketch("z", nn.Linear(8, 8), front)))
    batches = [(torch.randn(n, 3),) for n in (200, 200, 2000)]
    found = outcome(sketch.network(result, torch.randn(2, 3)), batches, tmp_path, bits=bits)
    assert found.pop("proved") == (bits < 16)
    assert ("integers" in found) == (bits == 16)  # float32 rounds some of those on the other side of a tie
    found.pop("integers", None)
    assert set(found.values()) == {0}, found
    assert len(found) == (2 if bits == 16 else 4)


@pytest.mark.parametrize("bits", [3, 8, 12])
@pytest.mark.parametrize(("classes", "scale"), [(2, 1.0), (10, 8.0), (300, 30.0)])
def test_logarithms_of_softmax(classes, scale, bits, tmp_path):
    torch.manual_seed(0)
    sketch, layer = Sketch("x"), nn.Linear(3, classes)
    nn.init.normal_(layer.weight, std=scale)
    result = sketch("op", m.LogSoftmax(-1), sketch("front", layer, *sketch.inputs))
    batches = [(torch.randn(n, 3),) for n in (200, 200, 2000)]
    found = outcome(sketch.network(result, torch.randn(2, 3)), batches, tmp_path, bits=bits)
    assert found.pop("proved")
    assert set(found.values()) == {0}, found
    assert len(found) == 4


def test_a_logarithm_of_softmax_is_within_a_step_of_the_float_function() -> None:
    torch.manual_seed(0)
    source = Encoding(np.float32(2.0**-3), np.int64(0), IntGrid(8, signed=True))
    target = Encoding(np.float32(2.0**-2), np.int64(0), IntGrid(8, signed=True))
    codes = torch.randint(-128, 128, (500, 20)).double()
    defined = functions.LogSoftmax.of(-1, 20, source, target)
    assert defined is not None
    found = m.LogSoftmax(-1).integers(codes, defined, source)
    assert float((found - torch.log_softmax(codes * 2.0**-3, -1)).abs().max()) <= 2.0**-5


class Mixer(nn.Module):
    """Linear layers on tokens, along both dimensions, with a position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 5, 6))
        self.across, self.back = nn.Linear(5, 7), nn.Linear(7, 5)
        self.up, self.down, self.head = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        x = x + self.back(F.relu(self.across(x.mT))).mT
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)[0]


SEQUENCES = [
    Mixer(),
    *(Recurrent(kind(6, 4, 2, batch_first=True, bidirectional=True)) for kind in (nn.LSTM, nn.GRU)),
    Recurrent(nn.RNN(6, 4, batch_first=True)),
    nn.Sequential(nn.Linear(6, 8), nn.PReLU(5), nn.Linear(8, 3)),
]


@pytest.mark.parametrize("network", SEQUENCES, ids=lambda n: type(getattr(n, "layer", n)).__name__)
def test_sequences_run_in_integers_and_in_c(network, tmp_path):
    batches = [(torch.randn(n, 5, 6),) for n in (4, 4, 8)]
    found = outcome(prepare(network.eval(), batches[0]), batches, tmp_path)
    found.pop("proved")
    assert set(found.values()) == {0}, found
    assert len(found) == 4


def test_every_operation_has_a_case():
    tried = {type(module) for module in (*FUNCTIONS, *ON_MAPS, *ON_ROWS, *ON_VOLUMES)}
    sources = Path(__file__).read_text(encoding="utf-8")
    missing = [cls.__name__ for cls in OPERATORS if cls not in tried and f"{cls.__name__}(" not in sources]
    assert missing == []


@pytest.mark.parametrize("name", ["bias_correction", "output_mse"])
def test_methods_walk_past_constants(name):
    batches = [(torch.randn(n, 5, 6),) for n in (4, 4)]
    sim = simulate(prepare(Mixer().eval(), batches[0]), batches[0])
    sim.calibrate(batches)
    before = sim.export(batches[0]).model.SerializeToString()
    resolve("methods", name)().apply(sim, batches)
    assert sim.export(batches[0]).model.SerializeToString() != before
