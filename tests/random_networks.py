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
from tests.random_steps import CHOICES, FUNCTIONS, Function

BATCH = 4
LARGEST = 4000
"""Values of one sample; a step that makes more is not taken."""


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
    grower = Grower(rng)
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


class Grower:
    """Tries random steps on an example and keeps those whose results are finite and not too large."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        channels = int(rng.integers(1, 7))
        sizes = [rng.integers(4, 10, 2), rng.integers(4, 14, 1), rng.integers(3, 6, 3)]
        shapes = [*((channels, *map(int, size)) for size in sizes), (channels * 3,)]
        shape = shapes[rng.choice(4, p=[0.65, 0.15, 0.1, 0.1])]
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
        if (
            result.ndim not in (2, 3, 4, 5)
            or not result.numel()
            or result[0].numel() > LARGEST
            or len(result) != BATCH
            or not result.isfinite().all()
        ):
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
