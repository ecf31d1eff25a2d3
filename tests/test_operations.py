"""Every operation of a prepared network on every executor, and what the table of operations says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

from pow2quant.frontends import modules as m
from tests.prepared import Sketch, outcome

MAPS, ROWS, VECTORS, TOKENS = (8, 6, 6), (8, 12), (8,), (6,)
"""What an operation reads: (C, H, W), (C, L) or (C) behind a layer, or integers."""


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
    "Concat with an expanded constant": Case(
        lambda s, x: s("op", m.Concat(2), s("e", m.Expand(), s("c", constant(1, 8, 1)), x), x), ROWS
    ),
    "Embedding": Case(lambda s, x: s("op", m.Embedding(50, 8), x), TOKENS, integers=False),
    "ArgMax": Case(lambda s, x: (x, s("op", m.ArgMax(1, keepdim=False), x)), integers=False),
}


def front(shape: tuple[int, ...]) -> nn.Module | None:
    """The layer in front, so that what is read is a result."""
    layers = {4: nn.Conv2d(3, 8, 3, padding=1), 3: nn.Conv1d(3, 8, 3, padding=1), 2: nn.Linear(3, 8)}
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
