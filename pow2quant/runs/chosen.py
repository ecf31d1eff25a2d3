"""Methods as people hand them over in Python: by name, with parameters, or as objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from pow2quant import config as configuration
from pow2quant.config import NONE, Choice
from pow2quant.errors import ConfigError
from pow2quant.plugins import names, resolve


def methods_of_argument(methods: Any) -> tuple[list[Any] | None, list[Any] | None]:
    """What the configuration says of methods, and the objects that stand in for it where one has no name there."""
    if methods is None:
        return None, None
    if isinstance(methods, (str, Mapping)) or not isinstance(methods, Sequence):
        methods = [methods]
    choices = [_choice_of(method) for method in methods]
    if all(choices):
        return [{c.name: dict(c.parameters)} for c in choices if c], None
    made = [_made(each, choice) for each, choice in zip(methods, choices, strict=True) if choice != NONE]
    return None, made


def method_of(method: Any) -> Any:
    """One method as an object, from its name with or without parameters, a mapping, or itself."""
    return _made(method, _choice_of(method))


def _made(given: Any, choice: Choice | None) -> Any:
    if choice is None:
        return given
    return configuration.parameters(resolve("methods", choice.name), choice.parameters, f"methods.{choice.name}")


def _choice_of(method: Any) -> Choice | None:
    """A method by the name under which it is installed; None for an object that has none."""
    if isinstance(method, str):
        try:
            return configuration.method_named(method)
        except ValueError:
            raise ConfigError(f"methods: {method!r} is not legal; legal: NAME or NAME:parameter=value") from None
    if isinstance(method, Choice):
        return method
    if isinstance(method, Mapping) and len(method) == 1:
        ((name, parameters),) = method.items()
        if isinstance(name, str) and (parameters is None or isinstance(parameters, Mapping)):
            return Choice(name, dict(parameters or {}))
    if isinstance(method, type) or not (hasattr(method, "apply") or hasattr(method, "rewrite")):
        what = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise ConfigError(
            f"methods: {what} is no method; give a name ({', '.join(sorted(names('methods')))}), "
            "{name: {parameter: value}}, or an object with apply(simulation, batches)"
        )
    place = f"{type(method).__module__}:{type(method).__qualname__}"
    name = next((name for name, known in names("methods").items() if known == place), None)
    if name is None or not is_dataclass(method):
        return None
    keys = {"bits": "bitwidth"}
    return Choice(name, {keys.get(f.name, f.name): getattr(method, f.name) for f in fields(method) if f.init})
