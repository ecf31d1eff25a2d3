"""The user's metric: a function, an object that counts (torchmetrics), or the name of one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pow2quant.config import from_file, is_in_file, users_code
from pow2quant.errors import ConfigError, MissingExtraError, Pow2QuantError
from pow2quant.reading import last_line
from pow2quant.tasks.base import Metric, Outputs

SMALL_IS_GOOD = ("error", "loss", "mae", "mse", "rmse", "distance", "perplexity")
"""A metric whose name holds one of these is better when it is smaller, where it does not say itself."""


def metric_of(given: Any, known: tuple[Metric, ...]) -> Metric:
    """The metric that is meant: one of the `known` by name, `torchmetrics:NAME`, `file.py:function`, or an object.

    An object has `update(outputs, targets)` and `compute()`, as those of torchmetrics; a function takes all outputs and
    all targets, as tensors, and returns a number. `higher_is_better`, an attribute of either, says which way is good.
    Raises ConfigError for anything else.
    """
    by_name = {m.name: m for m in known}
    if isinstance(given, str) and given in by_name:
        return by_name[given]
    name = given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
    thing = _named(given, by_name) if isinstance(given, str) else given
    if isinstance(thing, type) or (inspect.isroutine(thing) and not inspect.signature(thing).parameters):
        thing = _called(thing, name)
    short = name.rpartition(":")[2]
    higher = getattr(thing, "higher_is_better", None)
    if higher is None:
        higher = not any(word in short.lower() for word in SMALL_IS_GOOD)
    if callable(getattr(thing, "update", None)) and callable(getattr(thing, "compute", None)):
        return Metric(short, lambda: Updated(copy.deepcopy(thing), name), bool(higher))
    if not callable(thing):
        raise ConfigError(f"metric: {name} is a {type(thing).__name__}, neither a function nor an object that counts")
    return Metric(short, lambda: Whole(thing, name), bool(higher))


def _named(name: str, known: dict[str, Metric]) -> Any:
    if is_in_file(name):
        return from_file(name, ConfigError)
    short = name.removeprefix("torchmetrics:")
    own = f"known here: {', '.join(known) or 'none'}; otherwise torchmetrics:NAME or file.py:function"
    if short == name and not name[:1].isupper():
        raise ConfigError(f"metric: {name!r} is unknown; {own}")
    try:
        torchmetrics = import_module("torchmetrics")
    except ImportError:
        raise MissingExtraError(f"metric: {name} is torchmetrics': pip install torchmetrics; {own}") from None
    if not hasattr(torchmetrics, short):
        raise ConfigError(f"metric: torchmetrics has no {short!r}; {own}")
    return getattr(torchmetrics, short)


def _called(make: Callable[[], Any], name: str) -> Any:
    try:
        return make()
    except Exception as error:
        raise ConfigError(
            f"metric: {name} cannot be made without arguments ({error}); give a function in a file that returns one"
        ) from error


@contextmanager
def _users(name: str) -> Iterator[None]:
    """Around calls of the metric: what it raises becomes one line that names it."""
    if is_in_file(name):
        with users_code(name, ConfigError):
            yield
        return
    try:
        yield
    except Pow2QuantError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {last_line(error)}"
        raise ConfigError(f"metric: {name}, called with outputs and targets: {reason}") from error


def _tensors(x: Any) -> Any:
    return pytree.tree_map(lambda v: torch.from_numpy(v) if isinstance(v, np.ndarray) else v, x)


def _outputs(outputs: Outputs) -> Any:
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in outputs]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _number(value: Any, name: str) -> float:
    try:
        return float(f"{float(value):.6g}")
    except (TypeError, ValueError):
        raise ConfigError(f"metric: {name} gave a {type(value).__name__}, not a number") from None


@dataclass
class Updated:
    """Counts with an object that has `update` and `compute`."""

    metric: Any
    name: str
    samples: int = 0

    def add(self, outputs: Outputs, targets: Any) -> None:
        with _users(self.name):
            self.metric.update(_outputs(outputs), _tensors(targets))
        self.samples += len(outputs[0])

    def value(self) -> float | None:
        if not self.samples:
            return None
        with _users(self.name):
            return _number(self.metric.compute(), self.name)


@dataclass
class Whole:
    """Keeps all outputs and targets for a function that looks at all of them at once."""

    function: Callable[[Any, Any], Any]
    name: str
    outputs: list[Any] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)

    def add(self, outputs: Outputs, targets: Any) -> None:
        self.outputs.append(pytree.tree_map(torch.clone, _outputs(outputs)))
        self.targets.append(_tensors(targets))

    def value(self) -> float | None:
        if not self.outputs:
            return None
        with _users(self.name):
            return _number(self.function(_joined(self.outputs), _joined(self.targets)), self.name)


def _joined(parts: list[Any]) -> Any:
    """All batches as one: tensors are joined, lists are chained, dictionaries key by key."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined([part[i] for part in parts]) for i in range(len(first)))
    return [item for part in parts for item in part] if isinstance(first, list) else parts
