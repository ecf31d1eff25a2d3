"""Targets by name or from YAML files, and in the metadata of the ONNX files that were made for them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pow2quant import foreign, yaml_text
from pow2quant.errors import ConfigError, FileFormatError
from pow2quant.targets.description import DEFAULT, Target

if TYPE_CHECKING:
    import onnx

KEY = "pow2quant.target"
"""The key of a target in an ONNX file's metadata; a file for the default target has none."""


def presets() -> tuple[str, ...]:
    """The names of the targets that are shipped."""
    folder = files("pow2quant.targets") / "presets"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load(name: str) -> Target:
    """A target by its name, or from `path/to/file.yaml`. Raises ConfigError, naming file and key.

    name: of a preset, or of a file whose keys are the fields of `Target`; `base: NAME` starts from a preset.
    """
    if is_file(name):
        return parse(foreign.text(name, foreign.MOST_TEXT, ConfigError), name)
    if name not in presets():
        raise ConfigError(f"target: {name!r} is unknown; known: {', '.join(presets())}, or a YAML file")
    return _preset(name)


def is_file(name: str) -> bool:
    """Whether a name is that of a file."""
    return name.endswith((".yaml", ".yml"))


@cache
def _preset(name: str) -> Target:
    text = (files("pow2quant.targets") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return parse(text, name)


def parse(text: str, source: str) -> Target:
    """A target's YAML; `source` names it in errors, and the target where it has no name."""
    mapping = yaml_text.parse(text, source)
    if not isinstance(mapping, dict):
        raise ConfigError(f"{source}: expected keys such as rounding and limits")
    base = mapping.pop("base", None)
    if base is not None and base not in presets():
        raise ConfigError(f"{source}: base: {base!r} is not legal; legal: one of {', '.join(presets())}")
    start = asdict(replace(DEFAULT if base is None else load(base), name=Path(source).stem))
    return _checked(_over(start, mapping), source)


def note(model: onnx.ModelProto, target: Target) -> None:
    """Notes in a file's metadata which target it is for, with all its rules; nothing for the default's arithmetic."""
    if replace(target, summary="", source="") != DEFAULT:
        model.metadata_props.add(key=KEY, value=json.dumps(asdict(target)))


def of(model: onnx.ModelProto) -> Target:
    """The target that a file is for. Raises FileFormatError where its metadata are damaged."""
    text = next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
    if text is None:
        return DEFAULT
    try:
        return _checked(json.loads(text), f"metadata: {KEY}")
    except (ValueError, ConfigError) as error:
        raise FileFormatError(f"metadata: {KEY}: {error}") from error


def _over(base: dict[str, Any], mapping: dict[str, Any]) -> dict[str, Any]:
    """A mapping laid over another, group by group."""
    grouped = {
        key: _over(base[key], value) if isinstance(base.get(key), dict) and isinstance(value, dict) else value
        for key, value in mapping.items()
    }
    return base | grouped


def _checked(mapping: Any, source: str) -> Target:
    """A target of plain values. Raises ConfigError for the first key that is unknown or has an illegal value."""
    from pydantic import ValidationError

    try:
        target: Target = _adapter().validate_python(mapping)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"])
        raise ConfigError(f"{source}: {where}: {yaml_text.one_line(found['msg'])}") from None
    for key in ("product_shift", "sum_shift"):
        ends = getattr(target.limits, key)
        if ends is not None and ends[0] > ends[1]:
            raise ConfigError(f"{source}: limits.{key}: the least, {ends[0]}, is above the largest, {ends[1]}")
    return target


@cache
def _adapter() -> Any:
    """What reads a target; the classes stay plain dataclasses."""
    from pydantic import ConfigDict, TypeAdapter

    from pow2quant.targets import description

    for cls in (description.Roundings, description.Limits, description.Target):
        setattr(cls, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010 (mypy knows no such attribute)
    return TypeAdapter(Target)
