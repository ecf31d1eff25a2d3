"""What the files of this folder put their networks into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

ZOO: dict[str, tuple[str, Callable[[], nn.Module], tuple[tuple[int, ...], ...], str]] = {}
"""As `benchmarks/zoo.py` reads it: name -> (group, factory, shapes of the inputs, kind)."""


def network(*shapes: tuple[int, ...], kind: str = "rand") -> Callable[[Any], Any]:
    """Puts a class, or a function that makes a network, into `ZOO` under its docstring. shapes: without the batch."""

    def put(factory: Any) -> Any:
        ZOO[factory.__doc__.strip(". ")] = (factory.__module__.rpartition(".")[2], factory, shapes, kind)
        return factory

    return put


def conv(i: int, o: int, k: int = 3, s: int = 1, g: int = 1) -> nn.Sequential:
    """A convolution of k x k and stride s in g groups, batch norm, SiLU."""
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o), nn.SiLU())
