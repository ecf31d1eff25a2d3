"""What a study varies: axes over configuration keys, and the settings that one combination of values stands for.

    quantization.weight.bitwidth=2..8                 integers, both ends included
    ptq.methods.gpfq.conv_scalar=1.0:2.0:0.05         from, to, step; both ends included
    ptq.methods.gpfq.regularizer=none,L1              a list
    training.learning_rate=1e-5:1e-2:log              anything in between: for a sampler, not for a grid

A key `ptq.methods.NAME.PARAMETER` is a parameter of one method, which is put behind the others if the configuration
does not name it. `conv_scalar+linear_scalar` as the last part of a key gives one value to both. In a file, an axis may
also be a mapping of labels to settings: `{W4A8: {quantization.weight.bitwidth: 4, quantization.output.bitwidth: 8}}`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import product
from typing import Any

import yaml

from pow2quant import config as configuration
from pow2quant.config import Choice, RunConfig
from pow2quant.errors import ConfigError

Label = bool | int | float | str | None
Settings = Mapping[str, Any]
"""Values by configuration key."""

MOST = 100_000
"""Values of one axis, or combinations of one study."""

_METHOD = "ptq.methods."


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, both included. step None: all of them; integer: whole numbers only."""

    low: float
    high: float
    step: float | None = None
    log: bool = False
    integer: bool = False

    def labels(self, name: str) -> tuple[Label, ...]:
        """The numbers in order. Raises ConfigError where there are infinitely many."""
        if self.step is None:
            raise ConfigError(f"{name}: a grid needs a step, as in {self.low:g}:{self.high:g}:STEP")
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        count = int((Decimal(str(self.high)) - low) / step) + 1
        if count > MOST:
            raise ConfigError(f"{name}: {count:,} values are more than {MOST:,}")
        exact = [low + i * step for i in range(count)]
        return tuple(int(v) if self.integer else float(v) for v in exact)


@dataclass(frozen=True)
class Axis:
    """What is varied: a name, and its labels, or the range that they come from.

    settings: what each label stands for; None: the name is a configuration key and the label its value.
    """

    name: str
    labels: tuple[Label, ...] | Range
    settings: tuple[Settings, ...] | None = None

    @property
    def points(self) -> tuple[Label, ...]:
        """The labels, a range's one by one."""
        return self.labels.labels(self.name) if isinstance(self.labels, Range) else self.labels

    def at(self, label: Label) -> Settings:
        """The settings that a label stands for."""
        if self.settings is None:
            return {self.name: label}
        assert not isinstance(self.labels, Range)
        return self.settings[_index(self.labels, label)]


Grid = tuple[Axis, ...]
Combination = dict[str, Label]
"""Label by axis."""


def axis(name: str, values: Any) -> Axis:
    """An axis from what a file or a flag says of it. Raises ConfigError, naming it, for what cannot be read."""
    if isinstance(values, Mapping):
        if not values or not all(isinstance(s, Mapping) for s in values.values()):
            raise ConfigError(f"{name}: labels need settings, as in {{LABEL: {{KEY: VALUE}}}}")
        return Axis(name, tuple(_label(k) for k in values), tuple(dict(s) for s in values.values()))
    if isinstance(values, str):
        values = _interval(name, values) or [_scalar(part) for part in values.split(",")]
    if isinstance(values, Range):
        return Axis(name, values)
    items = values if isinstance(values, list) else [values]
    if not items:
        raise ConfigError(f"{name}: has no value")
    labels = tuple(_label(item) for item in items)
    if len({json.dumps(label) for label in labels}) < len(labels):
        raise ConfigError(f"{name}: has a value twice")
    plain = all(label is item for label, item in zip(labels, items, strict=True))
    return Axis(name, labels, None if plain else tuple({name: item} for item in items))


def given(text: str) -> Axis:
    """An axis as it is written in a flag: `KEY=VALUES`."""
    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise ConfigError(f"--grid {text}: expected KEY=VALUES, as in quantization.weight.bitwidth=2..8")
    return axis(name, values)


def combinations(grid: Grid) -> Iterator[Combination]:
    """Every combination of the axes' labels, the last axis fastest. Raises ConfigError where there are too many."""
    count = math.prod(len(a.points) for a in grid)
    if count > MOST:
        raise ConfigError(f"the grid has {count:,} combinations, more than {MOST:,}")
    for labels in product(*(a.points for a in grid)):
        yield dict(zip((a.name for a in grid), labels, strict=True))


def settings(grid: Sequence[Axis], combination: Mapping[str, Label]) -> dict[str, Any]:
    """The settings of a combination; where two axes set the same key, those of the last."""
    found: dict[str, Any] = {}
    for each in grid:
        found |= each.at(combination[each.name])
    return found


def applied(base: RunConfig, values: Settings) -> RunConfig:
    """Lays settings over a configuration: keys first, then the parameters of methods.

    Raises ConfigError, naming the key, for what is not legal.
    """
    keys = [(key, value) for joint, value in values.items() for key in _separate(joint)]
    own = {key: value for key, value in keys if not key.startswith(_METHOD)}
    config = configuration.with_values(base, own)
    methods = list(config.ptq.methods or ())
    for key, value in keys:
        if key.startswith(_METHOD):
            _set(methods, key, value)
    written = [{name: dict(parameters)} for name, parameters in methods]
    if methods:
        config = configuration.with_values(config, {"ptq.methods": written})
    return config


def _set(methods: list[Choice], key: str, value: Any) -> None:
    """Gives a method among others a parameter."""
    name, _, parameter = key.removeprefix(_METHOD).partition(".")
    if not name or not parameter:
        raise ConfigError(f"{key}: expected ptq.methods.NAME.PARAMETER")
    found = next((i for i, method in enumerate(methods) if method.name == name), None)
    if found is None:
        methods.append(Choice(name, {parameter: value}))
    else:
        methods[found] = Choice(name, {**methods[found].parameters, parameter: value})


def _separate(joint: str) -> list[str]:
    """`a.b+c` -> `a.b`, `a.c`."""
    parent, dot, last = joint.rpartition(".")
    return [parent + dot + name for name in last.split("+")]


def _interval(name: str, text: str) -> Range | None:
    """`2..8`, `1.0:2.0:0.05`, `0.0:1.0`, `1e-5:1e-2:log`; None for what is no interval."""
    if whole := re.fullmatch(r"\s*(-?\d+)\s*\.\.\s*(-?\d+)\s*", text):
        return _checked(name, text, Range(int(whole[1]), int(whole[2]), 1, integer=True))
    low, *rest = text.split(":")
    if not rest or "," in text:
        return None
    try:
        ends = float(Decimal(low.strip())), float(Decimal(rest[0].strip()))
        log = rest[1:] == ["log"]
        step = None if log or len(rest) == 1 else float(Decimal(rest[1].strip()))
    except InvalidOperation:
        return None
    if len(rest) > 2:
        return None
    return _checked(name, text, Range(*ends, step, log))


def _checked(name: str, text: str, interval: Range) -> Range:
    step = 1.0 if interval.step is None else interval.step
    if not all(map(math.isfinite, (interval.low, interval.high, step))) or interval.low > interval.high or step <= 0:
        raise ConfigError(f"{name}: {text} is no range; legal: LOW..HIGH, LOW:HIGH:STEP with a STEP above 0")
    if interval.log and interval.low <= 0:
        raise ConfigError(f"{name}: {text}: a logarithmic range begins above 0")
    return interval


def _scalar(text: str) -> Any:
    """A value as YAML reads it, and `1e-4` as a number."""
    try:
        return float(text) if re.fullmatch(r"\s*[-+]?\d+(\.\d*)?[eE][-+]?\d+\s*", text) else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError):
        return text


def _label(value: Any) -> Label:
    """The value itself, or what is written of a list or a mapping."""
    return value if isinstance(value, Label) else json.dumps(value, separators=(",", ":"), default=str)


def _index(labels: tuple[Label, ...], label: Label) -> int:
    """Where a label stands; 1, 1.0 and true are three labels."""
    return next(i for i, own in enumerate(labels) if own == label and type(own) is type(label))
