"""Targets by name or from YAML files, and in the metadata of the ONNX files that were made for them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from pow2quant import foreign, yaml_text
from pow2quant.errors import ConfigError, FileFormatError
from pow2quant.mappings.building import build
from pow2quant.mappings.legal import illegal
from pow2quant.plugins import names
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
    """A target's YAML; `source` names it in errors, and the target where it has no name.

    Raises ConfigError, naming the key and what is legal there.
    """
    mapping = yaml_text.parse(text, source)
    if not isinstance(mapping, dict):
        raise ConfigError(f"{source}: expected keys such as rounding and limits")
    base = mapping.pop("base", None)
    if base is not None and base not in presets():
        raise ConfigError(f"{source}: base: {base!r} is not legal; legal: one of {', '.join(presets())}")
    start = replace(DEFAULT if base is None else load(base), name=Path(source).stem)
    try:
        target: Target = build(start, mapping, "")
        for key, kind in (("executors", "validators"), ("formats", "exporters")):
            chosen, known = getattr(target, key), names(kind)
            if not chosen or not set(chosen) <= known.keys():
                raise illegal(key, list(chosen), f"a list of {', '.join(sorted(known))}")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return target


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
        target: Target = build(DEFAULT, json.loads(text), "")
    except (ValueError, ConfigError) as error:
        raise FileFormatError(f"metadata: {KEY}: {error}") from error
    return target
