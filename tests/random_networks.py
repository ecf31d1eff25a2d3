"""Random PyTorch networks over every operation that a front end knows, and random ways to quantize them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pow2quant import Encoding, IntGrid, QuantPlan, TensorSpec
from pow2quant.errors import Pow2QuantError

BATCH = 4
LARGEST = 4000
"""Values of one sample; a step that makes more is not taken."""


class Function(nn.Module):
    """A function of tensors, so that all steps are modules; fx traces through it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


@dataclass(frozen=True)
class Step:
    """A module and the numbers of the tensors that it reads; its result gets the next number."""

    module: nn.Module
    reads: tuple[int, ...]


class Network(nn.Module):
    """Runs steps one after another. inputs: how many tensors a call gets. results: the numbers of those returned."""

    def __init__(self, steps: Sequence[Step], inputs: int, results: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(step.module for step in steps)
        self.reads = [step.reads for step in steps]
        self.inputs, self.results = inputs, tuple(results)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        values = [x] if self.inputs == 1 else [x, y]
        for part, reads in zip(self.parts, self.reads, strict=True):
            values.append(part(*(values[i] for i in reads)))
        found = tuple(values[i] for i in self.results)
        return found if len(found) > 1 else found[0]


@dataclass(frozen=True)
class Case:
    """A network in eval mode and one batch for it."""

    network: nn.Module
    batch: tuple[Tensor, ...]


def case(rng: np.random.Generator, largest: int = 8) -> Case:
    """A random network with up to `largest` operations."""
    torch.manual_seed(int(rng.integers(2**31)))
    grower = _Grower(rng)
    with torch.no_grad():
        for _ in range(int(rng.integers(1, largest + 1))):
            grower.grow()
        results = grower.results()
    network = Network(grower.steps, grower.inputs, results).eval()
    return Case(network, tuple(grower.values[: grower.inputs]))


def plan(rng: np.random.Generator, widths: Sequence[int], names: Sequence[str]) -> QuantPlan:
    """What is quantized and how; now and then a role or a module stays float, or has a width of its own.

    names: of the prepared network's modules.
    """

    def spec(symmetric: bool, **more: Any) -> TensorSpec:
        bits = 8 if 8 in widths and rng.random() < 0.5 else int(rng.choice(widths))
        return TensorSpec(bits, symmetric, range=str(rng.choice(["mse", "minmax"])), **more)

    def activation() -> TensorSpec:
        return spec(bool(rng.random() < 0.3))

    weight = spec(True, per_channel=bool(rng.random() < 0.6))
    overrides: list[tuple[str, dict[str, TensorSpec | None] | None]] = []
    for name in rng.choice(names, min(len(names), int(rng.integers(0, 3))), replace=False):
        overrides.append((str(name), None if rng.random() < 0.2 else {"output": activation()}))
    bias = None if rng.random() < 0.1 else TensorSpec(32, True)
    return QuantPlan(weight, None if rng.random() < 0.07 else activation(), activation(), bias, tuple(overrides))


def forced(rng: np.random.Generator, table: dict[str, Encoding], share: float = 0.3) -> dict[str, Encoding]:
    """The table with some encodings of activations moved: other scales, zero points of any parity, other grids."""
    changed = dict(table)
    for name, encoding in table.items():
        if name.endswith((".weight", ".bias")) or rng.random() > share:
            continue
        scale = encoding.scale * np.float32(2.0 ** rng.integers(-3, 4))
        grid = encoding.grid
        if rng.random() < 0.3 and not isinstance(grid.bits, tuple):
            grid = IntGrid(grid.bits, bool(rng.integers(2)))
        low, high = int(np.min(grid.qmin)), int(np.max(grid.qmax))
        zero = int(rng.choice([low, 0, int(rng.integers(low, high + 1)), int(encoding.zero_point)]))
        changed[name] = Encoding(scale, np.int64(np.clip(zero, low, high)), grid)
    return changed


class _Grower:
    """Tries random steps on an example and keeps those whose results are finite and not too large."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        channels = int(rng.integers(1, 7))
        shapes = [(channels, *map(int, rng.integers(4, 10, 2))), (channels, int(rng.integers(4, 14))), (channels * 3,)]
        shape = shapes[rng.choice(3, p=[0.75, 0.15, 0.1])]
        self.inputs = 2 if rng.random() < 0.15 else 1
        self.values = [self._data((BATCH, *shape)) for _ in range(self.inputs)]
        self.steps: list[Step] = []
        self.functions = self.coin()

    def _data(self, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape) if self.rng.random() < 0.6 else torch.distributions.StudentT(2.0).sample(shape)
        x = x.abs() if self.rng.random() < 0.2 else x
        return x * 2.0 ** int(self.rng.integers(-4, 5)) + float(self.rng.integers(-1, 2))

    def grow(self) -> None:
        """Adds one operation, or a few that belong together."""
        last = len(self.values) - 1
        at = last if self.rng.random() < 0.75 else int(self.rng.integers(0, last + 1))
        rank = self.values[at].ndim
        names = [name for name, (ranks, _) in CHOICES.items() if rank in ranks]
        names = names if self.functions else [name for name in names if name not in FUNCTIONS]
        name = str(self.rng.choice(names))
        CHOICES[name][1](self, at)

    def take(self, module: nn.Module | Callable[..., Tensor], *reads: int) -> int | None:
        """Runs a step; returns its result's number, or None where it does not fit."""
        part = module if isinstance(module, nn.Module) else Function(module)
        try:
            result = part.eval()(*(self.values[i].clone() for i in reads))
        except (RuntimeError, ValueError, IndexError):
            return None
        if not result.numel() or result[0].numel() > LARGEST or len(result) != BATCH or not result.isfinite().all():
            return None
        self.values.append(result)
        self.steps.append(Step(part, reads))
        return len(self.values) - 1

    def results(self) -> list[int]:
        """The last tensor; sometimes further ones, also ones that other steps read."""
        last = len(self.values) - 1
        if not self.steps:
            last_or_none = self.take(nn.Identity(), last)
            last = last if last_or_none is None else last_or_none
        results = [last]
        if self.rng.random() < 0.25 and last > self.inputs:
            results.append(int(self.rng.integers(self.inputs, last)))
        return results

    def small(self, *allowed: int) -> int:
        """One of the numbers."""
        return int(self.rng.choice(allowed))

    def coin(self) -> bool:
        """True half of the time."""
        return bool(self.rng.integers(2))


def _conv(g: _Grower, at: int) -> None:
    x = g.values[at]
    channels, rank = x.shape[1], x.ndim
    kind = {3: (nn.Conv1d, nn.ConvTranspose1d), 4: (nn.Conv2d, nn.ConvTranspose2d)}[rank]
    groups = channels if g.rng.random() < 0.25 else 1
    out = channels * g.small(1, 2) if groups > 1 else g.small(1, 3, 4, 7, 8)
    if g.rng.random() < 0.2:
        stride = g.small(1, 2)
        layer: nn.Module = kind[1](
            channels, out, g.small(2, 3), stride, g.small(0, 1), stride - 1, groups, bias=g.coin()
        )
    else:
        same = g.rng.random() < 0.2
        stride = 1 if same else g.small(1, 1, 2)
        padding: Any = "same" if same else g.small(0, 1, 2)
        layer = kind[0](channels, out, g.small(1, 2, 3), stride, padding, g.small(1, 1, 2), groups, bias=g.coin())
    _spread(g, layer)
    result = g.take(layer, at)
    if result is not None and g.rng.random() < 0.25:
        norm = (nn.BatchNorm1d if rank == 3 else nn.BatchNorm2d)(out)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        result = g.take(norm, result)
    if result is not None and g.rng.random() < 0.4:
        _activation(g, result)


def _spread(g: _Grower, layer: nn.Module) -> None:
    """Weights whose channels differ in size; sometimes one channel is zero, or biases are large."""
    weight: Any = layer.weight
    weight.mul_(2.0 ** torch.randint(-3, 3, (weight.shape[0], *[1] * (weight.ndim - 1))))
    if g.rng.random() < 0.1:
        weight[0] = 0
    bias: Any = layer.bias
    if bias is not None and g.coin():
        bias.mul_(8)


def _linear(g: _Grower, at: int) -> None:
    layer = nn.Linear(g.values[at].shape[-1], g.small(1, 3, 5, 8), g.coin())
    _spread(g, layer)
    g.take(layer, at)


ACTIVATIONS: dict[str, Callable[[_Grower], nn.Module]] = {
    "relu": lambda g: nn.ReLU(g.coin()),
    "relu6": lambda g: nn.ReLU6(),
    "hardtanh": lambda g: nn.Hardtanh(-float(g.small(0, 1, 2)), float(g.small(1, 3))),
    "clamp": lambda g: Function(_clamp(float(g.small(-2, -1, 0)), float(g.small(1, 4)))),
    "sigmoid": lambda g: nn.Sigmoid(),
    "tanh": lambda g: nn.Tanh(),
    "hardsigmoid": lambda g: nn.Hardsigmoid(),
    "hardswish": lambda g: nn.Hardswish(),
    "silu": lambda g: nn.SiLU(),
    "gelu": lambda g: nn.GELU(str(g.rng.choice(["none", "tanh"]))),
    "elu": lambda g: nn.ELU(float(g.small(1, 2)) / 2),
    "leaky": lambda g: nn.LeakyReLU(float(g.rng.choice([0.01, 0.125, 0.2]))),
}


def _clamp(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.clamp(low, high)


def _activation(g: _Grower, at: int) -> None:
    clips = ["relu", "relu", "relu", "relu6", "hardtanh", "clamp"]
    name = str(g.rng.choice([*ACTIVATIONS, "prelu", *clips] if g.functions else clips))
    g.take(ACTIVATIONS[name](g) if name in ACTIVATIONS else nn.PReLU(g.small(1, g.values[at].shape[1])), at)


def _softmax(g: _Grower, at: int) -> None:
    g.take(nn.Softmax(-1 if g.coin() else 1), at)


def _layer_norm(g: _Grower, at: int) -> None:
    g.take(nn.LayerNorm(g.values[at].shape[-1]), at)


def _pool(g: _Grower, at: int) -> None:
    rank, kernel = g.values[at].ndim, g.small(2, 2, 3)
    more: Any = {"stride": g.small(1, 2, kernel), "padding": g.small(0, 0, 1), "ceil_mode": g.rng.random() < 0.15}
    if g.coin():
        g.take((nn.MaxPool2d if rank == 4 else nn.MaxPool1d)(kernel, **more), at)
    else:
        kind = nn.AvgPool2d if rank == 4 else nn.AvgPool1d
        g.take(kind(kernel, **more, count_include_pad=g.coin()), at)


def _mean(g: _Grower, at: int) -> None:
    rank, keep = g.values[at].ndim, g.coin()
    if rank == 4 and g.coin():
        g.take(nn.AdaptiveAvgPool2d(1), at)
        return
    dims = (2, 3) if rank == 4 and g.coin() else (rank - 1,)
    g.take(lambda x: x.mean(dims, keepdim=keep), at)


def _partner(g: _Grower, at: int) -> int:
    """Another tensor that broadcasts with this one, or the same."""
    shape = g.values[at].shape
    fitting = [
        i
        for i, x in enumerate(g.values)
        if x.ndim == len(shape) and all(a == b or a == 1 for a, b in zip(x.shape[1:], shape[1:], strict=True))
    ]
    return int(g.rng.choice(fitting))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[_Grower, int], None]:
    def grow(g: _Grower, at: int) -> None:
        pair = (at, _partner(g, at))
        g.take(function, *(pair if g.coin() else pair[::-1]))

    return grow


def _gate(g: _Grower, at: int) -> None:
    """Squeeze and excite: a tensor times a function of its own mean."""
    channels = g.values[at].shape[1]
    found = g.take(nn.AdaptiveAvgPool2d(1), at)
    layer = nn.Conv2d(channels, channels, 1)
    found = found and g.take(layer, found)
    found = found and g.take(nn.Sigmoid() if g.coin() else nn.Hardsigmoid(), found)
    if found:
        g.take(torch.mul, at, found)


def _matmul(g: _Grower, at: int) -> None:
    x = g.values[at]
    others = [i for i, y in enumerate(g.values) if y.ndim == x.ndim and y.shape[:-2] == x.shape[:-2]]
    other = int(g.rng.choice(others))
    if g.values[other].shape[-2] == x.shape[-1]:
        g.take(torch.matmul, at, other)
    elif g.values[other].shape[-1] == x.shape[-1]:
        turned = g.take(lambda x: x.transpose(-1, -2), other)
        if turned:
            g.take(torch.matmul, at, turned)


def _scale(g: _Grower, at: int) -> None:
    factor, offset = (float(v) for v in g.rng.choice([-1.0, 0.5, 2.0, 0.3, 1.7], 2))
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda x: x * factor,
        lambda x: x + offset,
        lambda x: offset - x,
        lambda x: x / 4.0,
    ]
    g.take(kinds[g.rng.integers(len(kinds))], at)


def _nothing(g: _Grower, at: int) -> None:
    """Operations that change no value, which optimizers remove."""
    x, rank = g.values[at], g.values[at].ndim
    shape = x.shape[1:]
    kinds: list[nn.Module | Callable[[Tensor], Tensor]] = [
        lambda x: x * 1.0,
        lambda x: x + 0.0,
        lambda x: x - 0,
        lambda x: x / 1,
        nn.Identity(),
        nn.Dropout(),
        lambda x: x.contiguous(),
        lambda x: x.flatten(1).reshape(-1, *shape),
        lambda x: x[:, :],
    ]
    if rank == 4:
        kinds.append(lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2))
        kinds.append(nn.ZeroPad2d(0))
    if rank >= 3:
        kinds.append(lambda x: x.transpose(-1, -2).transpose(-1, -2))
        kinds.append(lambda x: x.expand(-1, *shape))
    g.take(kinds[g.rng.integers(len(kinds))], at)


def _move(g: _Grower, at: int) -> None:
    x, rank = g.values[at], g.values[at].ndim
    size = x.shape[1]
    kinds: list[nn.Module | Callable[[Tensor], Tensor]] = [
        lambda x: x[:, : max(1, size // 2)],
        lambda x: x[:, ::2],
    ]
    if rank == 4:
        order = [0, *(int(d) for d in g.rng.permutation([1, 2, 3]))]
        kinds += [
            lambda x: x.permute(*order),
            lambda x: x[:, :, 1:],
            lambda x: x.flatten(2),
            nn.ZeroPad2d(tuple(int(p) for p in g.rng.integers(0, 3, 4))),
            nn.Upsample(scale_factor=2),
        ]
    if rank == 3:
        kinds += [lambda x: x.transpose(1, 2), lambda x: x.unsqueeze(1)]
    if rank > 2:
        kinds.append(nn.Flatten())
    g.take(kinds[g.rng.integers(len(kinds))], at)


def _pad_pool(g: _Grower, at: int) -> None:
    """Zeros in front of a maximum: they count, where the pool's own padding does not."""
    padded = g.take(nn.ZeroPad2d(tuple(int(p) for p in g.rng.integers(0, 2, 4))), at)
    if padded:
        kind = nn.MaxPool2d if g.rng.random() < 0.8 else nn.AvgPool2d
        g.take(kind(2, g.small(1, 2)), padded)


def _concat(g: _Grower, at: int) -> None:
    shape = g.values[at].shape
    fitting = [i for i, x in enumerate(g.values) if x.ndim == len(shape) and x.shape[2:] == shape[2:]]
    parts = [at, *(int(i) for i in g.rng.choice(fitting, g.small(1, 2)))]
    g.take(lambda *tensors: torch.cat(tensors, 1), *parts)


FUNCTIONS = ("softmax", "layer norm", "gate")
"""Left out of half of the networks: what holds one of these is not proved."""

ALL_RANKS, IMAGES, SEQUENCES = (2, 3, 4), (4,), (3, 4)

CHOICES: dict[str, tuple[tuple[int, ...], Callable[[_Grower, int], None]]] = {
    "conv": (SEQUENCES, _conv),
    "conv again": (SEQUENCES, _conv),
    "conv once more": (SEQUENCES, _conv),
    "linear": (ALL_RANKS, _linear),
    "activation": (ALL_RANKS, _activation),
    "softmax": (ALL_RANKS, _softmax),
    "layer norm": (ALL_RANKS, _layer_norm),
    "pool": (SEQUENCES, _pool),
    "pad and pool": (IMAGES, _pad_pool),
    "mean": (SEQUENCES, _mean),
    "add": (ALL_RANKS, _binary(torch.add)),
    "add again": (ALL_RANKS, _binary(torch.add)),
    "sub": (ALL_RANKS, _binary(torch.sub)),
    "mul": (ALL_RANKS, _binary(torch.mul)),
    "gate": (IMAGES, _gate),
    "matmul": (SEQUENCES, _matmul),
    "scale": (ALL_RANKS, _scale),
    "nothing": (ALL_RANKS, _nothing),
    "move": (ALL_RANKS, _move),
    "concat": (ALL_RANKS, _concat),
}
"""What a network may grow by: the ranks of tensors (batch included) that it reads, and how."""


def load(sim: Any, table: dict[str, Encoding]) -> bool:
    """Loads a table, biases recomputed for it; False, the old one back, where a bias has no codes in it."""
    before = sim.encodings()
    try:
        sim.load(table)
        sim.calibrate((), {"bias"})
    except Pow2QuantError:
        sim.load(before)
        return False
    return True
