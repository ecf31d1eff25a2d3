"""The user's metric: a function, an object that counts (torchmetrics), or the name of one."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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

NONE: Mapping[str, Any] = {}
SMALL_IS_GOOD = frozenset({
    "error", "errors", "err", "loss", "mae", "mse", "rmse", "nmse", "msle", "rmsle", "mape", "smape",
    "distance", "divergence", "perplexity", "ppl", "entropy", "crossentropy", "nll", "kl", "wer", "cer", "eer",
    "ter", "fid", "lpips", "brier", "ece", "deviation", "regret", "miss", "misses", "wrong",
})  # fmt: skip
LARGE_IS_GOOD = frozenset({
    "accuracy", "acc", "top1", "top5", "top", "f1", "fbeta", "score", "auc", "auroc", "roc", "ap", "map",
    "precision", "recall", "iou", "miou", "jaccard", "dice", "kappa", "mcc", "matthews", "correlation",
    "pearson", "spearman", "r2", "psnr", "ssim", "snr", "sqnr", "sisnr", "sdr", "pesq", "stoi", "bleu", "rouge",
    "meteor", "hit", "hits", "found", "right", "correct", "agreement", "similarity", "specificity",
    "sensitivity", "pck", "ndcg", "mrr",
})  # fmt: skip
"""Words in the name of a metric that does not say itself which way is good; of both kinds, the first kind decides."""


def metric_of(given: Any, known: tuple[Metric, ...], arguments: Mapping[str, Any] = NONE) -> Metric:
    """The metric that is meant: one of the `known` by name, `torchmetrics:NAME`, `file.py:function`, or an object.

    An object has `update(outputs, targets)` and `compute()`, as those of torchmetrics; a function takes all outputs and
    all targets, as tensors, and returns a number. `higher_is_better`, an attribute of either, says which way is good.
    arguments: what a class of torchmetrics is made with, as far as it takes it.
    Raises ConfigError for anything else.
    """
    by_name = {m.name: m for m in known}
    if isinstance(given, str) and given in by_name:
        return by_name[given]
    if isinstance(given, str):
        name, thing = given, _named(given, by_name)
    else:
        name, thing = getattr(given, "__name__", type(given).__name__), given
    if isinstance(thing, type) or (inspect.isroutine(thing) and not inspect.signature(thing).parameters):
        thing = _called(thing, name, arguments)
    short = name.rpartition(":")[2].rpartition(".")[2]
    higher, guessed = getattr(thing, "higher_is_better", None), False
    if higher is None:
        words = _words(short)
        joined = not words & LARGE_IS_GOOD and any(part in short.lower() for part in ("error", "loss", "mse"))
        higher = not (words & SMALL_IS_GOOD or joined)
        guessed = higher and not words & LARGE_IS_GOOD
    if callable(getattr(thing, "update", None)) and callable(getattr(thing, "compute", None)):
        of_classes = type(thing).__module__.startswith("torchmetrics.classification")
        kind = arguments.get("task", "") if of_classes else ""
        return Metric(short, lambda: Updated(copy.deepcopy(thing), name, kind), bool(higher), guessed=guessed)
    if not callable(thing):
        own = f"one of {', '.join(by_name) or 'none here'}"
        raise ConfigError(
            f"metric: {thing!r:.50} is not legal; legal: {own}, a function, or an object with update and compute"
        )
    return Metric(short, lambda: Whole(thing, name), bool(higher), guessed=guessed)


def _words(name: str) -> set[str]:
    """`WordErrorRate`, `word_error_rate` and `wordErrorRate` as words, and the whole name; digits may end a word."""
    parts = re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", name)
    return {word.lower() for part in (*parts, name) for word in (part, part.rstrip("0123456789"))}


def _named(name: str, known: Mapping[str, Metric]) -> Any:
    if is_in_file(name):
        return from_file(name, ConfigError)
    path = name.removeprefix("torchmetrics:")
    own = f"known here: {', '.join(known) or 'none'}; otherwise torchmetrics:NAME or file.py:function"
    if path == name and not name[:1].isupper():
        raise ConfigError(f"metric: {name!r} is unknown; {own}")
    package, _, short = path.rpartition(".")
    try:
        import_module("torchmetrics")
    except ImportError:
        raise MissingExtraError(f"metric: {name} is torchmetrics': pip install 'pow2quant[metrics]'; {own}") from None
    for place in (package,) if package else ("", *PLACES):
        with suppress(ImportError, AttributeError):
            return getattr(import_module(f"torchmetrics.{place}".rstrip(".")), short)
    raise ConfigError(f"metric: torchmetrics has no {path!r}; {own}")


PLACES = ("classification", "segmentation", "regression", "image", "detection")
"""Packages of torchmetrics whose metrics need not be written with the package."""


VACANT = (None, inspect.Parameter.empty)
"""Defaults of arguments that wait for a value."""


def _called(make: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> Any:
    """An object of a class, or what a function without parameters returns."""
    taken = inspect.signature(make).parameters
    given = {key: value for key, value in arguments.items() if key in taken and taken[key].default in VACANT}
    try:
        return make(**given)
    except Exception as error:
        raise ConfigError(
            f"metric: {name} cannot be made ({last_line(error)}); give a function in a file that returns one"
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
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {last_line(error)}"
        raise ConfigError(f"metric: {name}, called with outputs and targets: {reason}") from error


def _tensors(x: Any) -> Any:
    return pytree.tree_map(lambda v: torch.from_numpy(v) if isinstance(v, np.ndarray) else v, x)


def _outputs(outputs: Outputs) -> Any:
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in outputs]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _as_classes(outputs: Any, targets: Any, kind: str) -> tuple[Any, Any]:
    """As torchmetrics reads them: labels are integers, not probabilities, and one logit of two classes has no axis."""
    if not (kind and isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return outputs, targets
    if kind == "multiclass" and targets.shape == outputs.shape:
        targets = targets.argmax(1)
    if kind == "binary" and targets.shape == outputs.shape[:1] + outputs.shape[2:]:
        outputs = outputs[:, 0]
    return outputs, targets.long()


def _number(value: Any, name: str) -> float:
    """The number that a metric gave, alone or as the only value of a dictionary."""
    if isinstance(value, Mapping):
        if len(value) != 1:
            raise ConfigError(f"metric: {name} gave {len(value)} values ({', '.join(map(str, value))}); return one")
        (value,) = value.values()
    try:
        number = float(f"{math.fsum([value]):.6g}")  # float would read text, too
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"metric: {name} gave a {type(value).__name__}, not a number") from None
    if not math.isfinite(number):
        raise ConfigError(f"metric: {name} gave {number}; a network cannot be judged by it")
    return number


@dataclass
class Updated:
    """Counts with an object that has `update` and `compute`. kind: of classes, for torchmetrics; empty: none."""

    metric: Any
    name: str
    kind: str = ""
    samples: int = 0

    def add(self, outputs: Outputs, targets: Any) -> None:
        with _users(self.name):
            self.metric.update(*_as_classes(_outputs(outputs), _tensors(targets), self.kind))
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
