"""What is chosen by name with parameters: optimizers, schedulers and methods, and how YAML writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pow2quant import yaml_text
from pow2quant.errors import ConfigError
from pow2quant.mappings.building import plain
from pow2quant.mappings.legal import Legal
from pow2quant.plugins import names


class Choice(NamedTuple):
    """Something chosen by name, and its parameters."""

    name: str
    parameters: Mapping[str, Any] = {}


NONE = Choice("none")
"""In front of methods: they stand alone, without the default ones that some of them build on."""

EXPONENT_METHODS = (Choice("align", {"rounds": 1}), Choice("output_mse"))
"""What chooses exponents for weights of one scale per tensor, and in front of methods that round weights themselves."""

NARROW_METHODS = (Choice("align", {"rounds": 1}), Choice("gptq"), Choice("bias_correction"))
"""What `ptq` does for weights below 8 bits with one scale per channel, unless it is told otherwise."""

EIGHT_BIT_METHODS = (Choice("bias_correction"),)
"""What `ptq` does for weights of 8 bits with one scale per channel, unless it is told otherwise."""


def _read_choice(value: Any) -> Choice:
    """`AdamW`, or `{type: AdamW, betas: [0.9, 0.99]}`."""
    kind, parameters = (value, {}) if isinstance(value, str) else (value["type"], {**value})
    if not isinstance(kind, str):
        raise TypeError
    parameters.pop("type", None)
    return Choice(kind, parameters)


def _write_choice(choice: Choice) -> Any:
    return {"type": choice.name, **plain(choice.parameters)} if choice.parameters else choice.name


def _read_methods(value: Any) -> tuple[Choice, ...]:
    """A list of `adaround`, `adaround:iterations=100` and `{adaround: {iterations: 100}}`; `[none]` is an empty one."""
    if not isinstance(value, list):
        raise TypeError
    methods = []
    for item in value:
        if isinstance(item, str):
            methods.append(method_named(item))
            continue
        ((name, values),) = item.items()
        methods.append(Choice(name, dict(values or {})))
    return () if methods == [NONE] else tuple(methods)


def without_none(methods: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """The methods that are applied."""
    return methods[1:] if methods[:1] == (NONE,) else methods


def method_named(text: str) -> Choice:
    """`gpfq`, or `gpfq:conv_scalar=1.16,narrow=true`. Raises ValueError for what is written otherwise."""
    name, colon, written = text.partition(":")
    written = re.sub(r"(\w)=", r"\1: ", written)
    try:
        values = yaml_text.parse(f"{{{written}}}", text) if colon else {}
    except ConfigError as error:
        raise ValueError(text) from error
    if not name or (colon and (not values or any(value is None for value in values.values()))):
        raise ValueError(text)
    return Choice(name, values)


def _write_methods(methods: tuple[Choice, ...]) -> Any:
    return [{name: plain(parameters)} if parameters else name for name, parameters in methods]


def _read_names(value: Any) -> tuple[str, ...]:
    """A list of `4` and `float16`."""
    if not isinstance(value, list) or not all(isinstance(v, int | str) and not isinstance(v, bool) for v in value):
        raise TypeError
    return tuple(str(v) for v in value)


def _write_names(value: tuple[str, ...]) -> Any:
    return [int(name) if name.isdigit() else name for name in value]


CHOICE = Legal(
    lambda: "a name, or {type: NAME, parameter: value, ...}", lambda v: bool(v.name), _read_choice, _write_choice
)
METHODS = Legal(
    lambda: (
        "a list of NAME, NAME:parameter=value or {NAME: {parameter: value}}; "
        f"names: none, {', '.join(sorted(names('methods')))}"
    ),
    lambda v: all(name in names("methods") for name, _ in without_none(v)),
    _read_methods,
    _write_methods,
)
CONSTRAINTS = Legal(
    lambda: "a list of accuracy=0.88, accuracy_drop=0.5%, size=0.5MB, average_bits=5.2, bops=1.2G, latency=1.5ms",
    read=_read_names,
)
CANDIDATES = Legal(
    lambda: "a list of at least one of 2 to 16, float16, float32", lambda v: bool(v), _read_names, _write_names
)
ACTIVATION_CANDIDATES = Legal(lambda: "a list of widths from 2 to 16", read=_read_names, write=_write_names)
