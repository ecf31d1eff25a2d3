"""What people hand over in Python: methods, a configuration, what shows progress, numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral
from typing import Any, cast

from pow2quant import config as configuration
from pow2quant.backends.base import SILENT, Progress
from pow2quant.config import NONE, Choice, RunConfig
from pow2quant.errors import ConfigError
from pow2quant.plugins import names, resolve
from pow2quant.progress import Bars


def shown(progress: Any) -> Progress:
    """What tells how far a run is. Raises ConfigError for what cannot."""
    if progress is None or isinstance(progress, bool):
        return Bars() if progress else SILENT
    if isinstance(progress, type) or not (hasattr(progress, "track") and hasattr(progress, "note")):
        what = f"the class {progress.__name__}" if isinstance(progress, type) else repr(progress)
        raise ConfigError(f"progress: {what} is not legal; legal: True, False, or an object with track and note")
    return cast(Progress, progress)


def config_of(config: Any) -> RunConfig:
    """A configuration as it is, as nested mappings or as a YAML file; None: the default one. Raises ConfigError."""
    if config is None:
        return RunConfig()
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, Mapping):
        return configuration.from_mapping(config)
    if isinstance(config, (str, os.PathLike)):
        return configuration.load(config)
    raise ConfigError(f"config: expected a RunConfig, a mapping or a YAML file, got a {type(config).__name__}")


def from_zero(name: str, value: Any) -> int:
    """An integer that is not negative. Raises ConfigError for what is none."""
    if not isinstance(value, Integral) or value < 0:
        raise ConfigError(f"{name}: {value!r} is not legal; legal: an integer from 0 up")
    return int(value)


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
