"""Configurations from files and flags, the plan that one asks for, and the text that is written back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from pow2quant import foreign, yaml_text
from pow2quant.config.choices import EIGHT_BIT_METHODS, EXPONENT_METHODS, NARROW_METHODS, Choice
from pow2quant.config.plan import ROLES, QuantPlan, TensorSpec, check_role
from pow2quant.config.sections import QuantizationConfig, RunConfig
from pow2quant.errors import ConfigError
from pow2quant.mappings.building import build, default_of, plain
from pow2quant.mappings.legal import unknown
from pow2quant.targets import load as load_target


def load(path: str | os.PathLike[str]) -> RunConfig:
    """Reads a YAML file; missing keys take their defaults.

    Raises ConfigError: one line with the file, the key's path and what is legal there.
    """
    return from_mapping(read(path), source=str(path))


def read(path: str | os.PathLike[str]) -> Any:
    """The plain values of a YAML file; those of an empty one are an empty mapping.

    Raises ConfigError: one line with the file and what is wrong in it.
    """
    return yaml_text.parse(foreign.text(path, foreign.MOST_TEXT, ConfigError), str(path))


def from_mapping(mapping: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Checks what was read from `source`; missing keys take their defaults. Raises ConfigError as `load` does."""
    try:
        return _laid_over(_for_target(RunConfig(), mapping), mapping)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Lays values over a configuration, in order: `with_values(config, {"quantization.weight.bitwidth": 4})`.

    A `target` goes first: what it needs of a plan is then where the configuration has the default.
    Raises ConfigError, naming the key, where a file with these values would.
    """
    config = _for_target(config, values)
    for path, value in values.items():
        for key in reversed(path.split(".")):
            value = {key: value}
        config = _laid_over(config, value)
    return config


def dump(config: RunConfig) -> str:
    """The YAML from which `load` makes an equal configuration, with every key."""
    return str(yaml.dump(plain(config), Dumper=yaml_text.Dumper, sort_keys=False, width=120))


def plan_of(config: RunConfig) -> QuantPlan:
    """The plan that a configuration asks for. Raises ConfigError for a specification that its role cannot have."""
    roles: dict[str, TensorSpec | None] = {role: getattr(config.quantization, role) for role in ROLES}
    for role, spec in roles.items():
        check_role(role, spec, f"quantization.{role}")
    overrides = tuple(
        (pattern, None if changes is None else _override(roles, changes, f"quantization.overrides.{pattern}"))
        for pattern, changes in config.quantization.overrides.items()
    )
    functions, target = config.quantization.functions, load_target(config.target)
    weight, input, output, bias = (roles[role] for role in ROLES)
    return QuantPlan(weight, input, output, bias, overrides, functions, target, config.quantization.sums)


def _for_target(config: RunConfig, values: Any) -> RunConfig:
    """The configuration with the target that `values` name, and what that needs where there is the default.

    What is not the default was chosen by the user, and is refused later where the target does not take it.
    """
    name = values.get("target") if isinstance(values, Mapping) else None
    if not isinstance(name, str) or name == config.target:
        return config
    limits, plain = load_target(name).limits, QuantizationConfig()
    changes: dict[str, Any] = {}
    for role in ("weight", "input", "output"):
        spec, default = getattr(config.quantization, role), getattr(plain, role)
        if spec == default:
            symmetric = default.symmetric or limits.symmetric
            per_channel = default.per_channel and not limits.per_tensor
            changes[role] = replace(default, symmetric=symmetric, per_channel=per_channel)
    if limits.bias_bits is not None and config.quantization.bias == plain.bias:
        changes["bias"] = TensorSpec(limits.bias_bits, symmetric=True)
    return replace(config, target=name, quantization=replace(config.quantization, **changes))


def default_methods(config: RunConfig) -> tuple[Choice, ...]:
    """The methods of a run that names none: cheap ones that win much at its weights' width. None above 8 bits."""
    weight = config.quantization.weight
    if weight is None or weight.bits > 8:
        return ()
    if not weight.per_channel:
        return EXPONENT_METHODS
    return EIGHT_BIT_METHODS if weight.bits == 8 else NARROW_METHODS


def _laid_over(config: RunConfig, mapping: Mapping[str, Any]) -> RunConfig:
    result: RunConfig = build(config, mapping, "")
    plan_of(result)
    return result


def _override(
    roles: Mapping[str, TensorSpec | None], changes: Mapping[str, Mapping[str, Any] | None], path: str
) -> dict[str, TensorSpec | None]:
    specs: dict[str, TensorSpec | None] = {}
    for role, keys in changes.items():
        where = f"{path}.{role}"
        if role not in ROLES:
            raise unknown(where, role, ROLES)
        base = roles[role] or default_of(QuantizationConfig, role)
        specs[role] = None if keys is None else build(base, keys, where)
        check_role(role, specs[role], where)
    return specs
