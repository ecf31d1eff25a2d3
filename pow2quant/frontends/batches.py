"""What a network is called with: one batch, however the user writes it, as a flat tuple of tensors."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import register_dataclass
from torch.utils import _pytree as pytree

Batch = Tensor | tuple[Tensor, ...]
"""The inputs of one call of the network: a tensor (N, …), or one per argument. Dictionaries and nested containers of
tensors work wherever a batch is read: `inputs` gives their tensors in the order of the container."""


def inputs(batch: Any) -> tuple[Tensor, ...]:
    """The tensors of a batch, in the order in which the prepared network takes them."""
    while open_dataclasses(batch):
        pass
    return tuple(x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor))


def open_dataclasses(value: Any) -> bool:
    """Tells PyTorch that the dataclasses in a value hold tensors; whether there was one that it did not know."""
    kinds = {type(x) for x in pytree.tree_leaves(value) if dataclasses.is_dataclass(x) and not isinstance(x, type)}
    for kind in kinds:
        register_dataclass(kind)
    return bool(kinds)


def regrown(before: Sequence[int], after: Sequence[int], shape: Sequence[int]) -> list[int]:
    """What a reshape of `before` to `after` gives for another batch: `shape` differs from `before` in one dimension.

    The result's dimension that grows is the one behind as many values. Raises ValueError where there is none.
    """
    grown = next(i for i, (a, b) in enumerate(zip(before, shape, strict=True)) if a != b)
    values, result = math.prod(before[:grown]), list(after)
    for i in range(len(after)):
        if math.prod(after[:i]) == values and after[i] * shape[grown] % before[grown] == 0:
            result[i] = after[i] * shape[grown] // before[grown]
            return result
    raise ValueError(f"{tuple(before)} becomes {tuple(after)}, which mixes the batch with other dimensions")


def call_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How `model` is called with a batch: positional and keyword arguments.

    A mapping whose keys are arguments of `forward` is passed by keyword, another one as the only argument; so is a list
    that is longer than what `forward` takes by position. What a tuple has beyond that goes to keyword-only arguments.
    """
    if isinstance(batch, Mapping):
        named = _parameters(model)
        every = any(p.kind is p.VAR_KEYWORD for p in named)
        names = {p.name for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if every or set(batch) <= names:
            return (), dict(batch)
        return (batch,), {}
    positions = _positions(model)
    whole = isinstance(batch, tuple) or (isinstance(batch, list) and len(batch) <= positions)
    values = tuple(batch) if whole else (batch,)
    keywords = [p.name for p in _parameters(model) if p.kind is inspect.Parameter.KEYWORD_ONLY]
    if positions < len(values) <= positions + len(keywords):
        return values[:positions], dict(zip(keywords, values[positions:], strict=False))
    return values, {}


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _positions(model: nn.Module) -> int:
    """How many arguments `forward` takes by position."""
    kinds = [p.kind for p in _parameters(model)]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return sys.maxsize
    return sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds)
