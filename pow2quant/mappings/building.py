"""From the plain values of a YAML file to dataclasses and back. pydantic checks each value; errors name its key."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from pow2quant.errors import ConfigError
from pow2quant.mappings.legal import Legal, illegal, unknown

T = TypeVar("T")


def parameters(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Makes a dataclass, such as a method, from its YAML.

    `parameters(AdaRound, {"iterations": 100}, "ptq.methods.adaround")`. Raises ConfigError that names the key.
    """
    made: T = build(cls, values, where)
    return made


def defaults(cls: type) -> dict[str, Any]:
    """A dataclass's YAML keys and what they are when they are not given; None for those that must be."""
    found = {key: default_of(cls, name) for key, (name, _) in keys_of(cls).items()}
    return {key: None if value is MISSING else plain(value) for key, value in found.items()}


def build(default: Any, mapping: Any, path: str) -> Any:
    """Lays a mapping over a dataclass's instance, or makes one of a class; everything is checked on the way."""
    cls = default if isinstance(default, type) else type(default)
    known = keys_of(cls)
    if not isinstance(mapping, Mapping):
        raise illegal(path or "top level", mapping, f"a mapping with keys of {', '.join(known)}")
    values = {}
    for key, value in mapping.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise unknown(where, str(key), known)
        name, hint = known[key]
        current = default_of(cls, name) if default is cls or getattr(default, name) is None else getattr(default, name)
        values[name] = _value(hint, current, value, where)
    if default is not cls:
        return replace(default, **values)
    for key, (name, _) in known.items():
        if name not in values and default_of(cls, name) is MISSING:
            raise ConfigError(f"{path}.{key}: missing")
    return cls(**values)


def _value(hint: Any, current: Any, value: Any, path: str) -> Any:
    """One value of a mapping. Parts are laid over their `current` value."""
    legal, nullable = legal_of(hint)
    if value is None and nullable:
        return None
    classes = (a for a in get_args(hint) if isinstance(a, type) and is_dataclass(a))
    part = current if is_dataclass(current) else next(classes, None)
    if part is not None:
        return build(part, value, path)
    try:
        return _adapter(hint).validate_json(json.dumps(value, default=os.fspath), strict=True)
    except (TypeError, ValueError, KeyError, AttributeError):  # pydantic's ValidationError is a ValueError
        raise illegal(path, value, legal.words() + (", or null" if nullable else "")) from None


@cache
def keys_of(cls: type) -> dict[str, tuple[str, Any]]:
    """YAML key -> (field, annotation)."""
    hints = get_type_hints(cls, include_extras=True)
    return {"bitwidth" if f.name == "bits" else f.name: (f.name, hints[f.name]) for f in fields(cls) if f.init}


def default_of(cls: Any, name: str) -> Any:
    """A field's default, or MISSING."""
    (found,) = (f for f in fields(cls) if f.name == name)
    return found.default if found.default_factory is MISSING else found.default_factory()


def legal_of(hint: Any) -> tuple[Legal, bool]:
    """What an annotation allows, and whether it allows null."""
    inner, *metadata = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    by_type = Legal(lambda: words.get(inner, str(inner)))
    return next((m for m in metadata if isinstance(m, Legal)), by_type), type(None) in get_args(inner)


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings -> what YAML writes."""
    if is_dataclass(value):
        keys = keys_of(type(value)).items()  # type: ignore[arg-type]
        return {key: _written(hint, getattr(value, name)) for key, (name, hint) in keys}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _written(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    write = legal_of(hint)[0].write or plain
    return write(value)
