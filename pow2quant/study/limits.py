"""What a user asks a search for, and constraints as they are written: `accuracy=0.88`, `size=0.5MB`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pow2quant.config import SearchConfig
from pow2quant.errors import ConfigError
from pow2quant.study.candidates import CANDIDATES, sorted_names
from pow2quant.study.costs import COSTS
from pow2quant.tasks.base import Metric

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3}
_SHARE = {"": 100.0, "%": 1.0}

UNITS: dict[str, Mapping[str, float]] = {
    "accuracy": _SHARE,
    "accuracy_drop": _SHARE,
    "size": _BYTES,
    "average_bits": {"": 1.0},
    "bops": _DECIMAL,
    "latency": {"us": 1.0, "ms": 1e3, "s": 1e6},
}
"""What may stand behind a number, and what it multiplies: to per cent, bytes, bits, bit operations, microseconds."""

_PLAIN = {"": 1.0}
_DECIBELS = {"": 1.0, "dB": 1.0}

_ANY = {"": 1.0, "%": 1.0}

METRICS: dict[str, Mapping[str, float]] = {
    **dict.fromkeys(("top1", "top5", "miou", "pixel_accuracy", "f1", "label_accuracy"), _SHARE),
    **dict.fromkeys(("sqnr", "psnr"), _DECIBELS),
    **dict.fromkeys(("mae", "rmse", "r2", "ssim"), _PLAIN),
}
"""Metrics of tasks, and `sqnr` of any: what may stand behind a bound on one."""

EXAMPLES = {
    "accuracy": "accuracy=0.88 or accuracy=88%",
    "accuracy_drop": "accuracy_drop=0.5% (points)",
    "size": "size=0.5MB",
    "average_bits": "average_bits=5.2",
    "bops": "bops=1.2G",
    "latency": "latency=1.5ms",
    "sqnr": "sqnr=30dB",
    "metric": "METRIC=VALUE of the task, such as miou=70% or mae=0.1",
}


@dataclass(frozen=True)
class Constraint:
    """A bound: on quality for the worse, on a cost from above. value: in the units of the costs. text: as written."""

    quantity: str
    value: float
    text: str

    @property
    def is_quality(self) -> bool:
        """Whether it bounds how good the network is, and not what it costs."""
        return self.quantity in ("accuracy", "accuracy_drop") or self.quantity not in UNITS


def parse(text: str, own: str | None = None) -> Constraint:
    """Reads one constraint. own: the user's metric. Raises ConfigError with an example of what is legal."""
    name, equals, value = (part.strip() for part in text.partition("="))
    quantity = name.replace("-", "_")
    known = {**METRICS, **({own: _ANY} if own else {}), **UNITS}
    if not equals or quantity not in known:
        raise ConfigError(f"constraint: {text!r} is not legal; legal: {', '.join(EXAMPLES.values())}")
    example = EXAMPLES.get(quantity, EXAMPLES["metric"])
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*([A-Za-z%]*)", value)
    units = known[quantity]
    if match is None or match[3] not in units:
        words = ", ".join(unit or "none" for unit in units)
        raise ConfigError(f"constraint: {text!r}: a number with a unit of {words} is legal, such as {example}")
    amount = float(match[1] + (match[2] or "")) * units[match[3]]
    if units is _SHARE and amount > 100:
        raise ConfigError(f"constraint: {text!r} is more than all; write {example}")
    return Constraint(quantity, amount, f"{quantity}={value}")


def ceilings(constraints: Sequence[Constraint]) -> dict[str, float]:
    """The least bound on every cost."""
    found: dict[str, float] = {}
    for c in constraints:
        if not c.is_quality:
            found[c.quantity] = min(c.value, found.get(c.quantity, c.value))
    return found


def metric_named(constraints: Sequence[Constraint]) -> str | None:
    """The metric that constraints bound by its name, None where there is no such. Raises ConfigError for several."""
    named = dict.fromkeys(c.quantity for c in constraints if c.quantity not in UNITS)
    if len(named) > 1:
        raise ConfigError(f"constraint: bounds on several metrics ({', '.join(named)}); legal: on one of them")
    return next(iter(named), None)


def accuracy_floor(constraints: Sequence[Constraint], initial: float, metric: Metric) -> float | None:
    """The quality that is asked for, None where none is: with a minus where less of the metric is better.

    initial: the float network's, with that sign. Raises ConfigError for a bound that the metric cannot have.
    """
    sign = 1 if metric.higher_is_better else -1
    floors = []
    for c in constraints:
        if c.quantity == "accuracy_drop":
            floors.append(initial - _in_units(c, initial, metric))
        elif c.is_quality:
            floors.append(sign * _in_units(c, initial, metric))
    return max(floors, default=None)


def _in_units(c: Constraint, initial: float, metric: Metric) -> float:
    """A bound in the metric's units: what is called accuracy is a share, but of metrics in other units."""
    if c.quantity not in ("accuracy", "accuracy_drop") or metric.unit == "%":
        return c.value
    percent = "%" in c.text
    if (c.quantity == "accuracy" and not metric.higher_is_better) or (percent and metric.unit):
        unit = f" in {metric.unit}" if metric.unit else ""
        example = f"{metric.name}={abs(initial):.3g}{metric.unit}"
        raise ConfigError(
            f"constraint: {c.text!r}: the task is judged by {metric.name}{unit}; legal: such as {example}"
        )
    return c.value if percent and abs(initial) > 1 else c.value / 100


@dataclass(frozen=True)
class Request:
    """What is searched: a `config.SearchConfig`, its constraints parsed.

    metric: the user's own, as `--metric` names it. Raises ConfigError for what cannot be.
    """

    search: SearchConfig
    metric: str | None = None

    def __post_init__(self) -> None:
        quantities = {c.quantity for c in self.constraints}
        metric_named(self.constraints)
        objective = self.search.objective
        if objective != "accuracy" and not any(c.is_quality for c in self.constraints):
            raise ConfigError(
                f"objective {objective} needs a constraint on the accuracy, such as accuracy_drop=0.5% or sqnr=30; "
                "without one, the least widths would do"
            )
        if objective == "accuracy" and not quantities & set(COSTS):
            raise ConfigError(
                "objective accuracy needs a constraint on a cost, such as size=0.5MB or average_bits=5.2; "
                "without one, the largest widths would do"
            )
        if all(CANDIDATES[name].spec is None for name in sorted_names(self.search.candidates)):
            raise ConfigError("candidates: floats alone are nothing to search; legal: at least one of 2 to 16 bits")
        for name in sorted_names(self.search.activation_candidates):
            if CANDIDATES[name].spec is None:
                raise ConfigError(f"activation candidates: {name!r} is not legal; legal: 2 to 16 bits")

    @cached_property
    def constraints(self) -> tuple[Constraint, ...]:
        """As they are understood."""
        own = self.metric and self.metric.rpartition(":")[2]
        return tuple(parse(text, own) for text in self.search.constraints)

    @property
    def axis(self) -> str:
        """The cost that the front is over."""
        if self.search.objective != "accuracy":
            return self.search.objective
        return next(c.quantity for c in self.constraints if c.quantity in COSTS)

    @property
    def needs_latency(self) -> bool:
        """Whether a latency is minimized or limited, or a table is given."""
        asked = (self.search.objective, *(c.quantity for c in self.constraints))
        return self.search.latency_table is not None or "latency" in asked


SHOWN: dict[str, Callable[[float], str]] = {
    "size": lambda v: f"{v / 1e6:.4g}MB" if v >= 1e5 else f"{v / 1e3:.4g}kB",
    "average_bits": lambda v: f"{v:.4g}",
    "bops": lambda v: f"{v / 1e9:.4g}G",
    "latency": lambda v: f"{v / 1e3:.4g}ms",
}
"""Costs as a constraint would write them."""
