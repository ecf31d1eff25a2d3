"""AIMET's configuration files (JSON: what a target quantizes), as far as they have a meaning for our own placement.

What has none is an error that names the key: another quantizer than the one that every tensor has, another grid than
ours, a kernel that a chip lacks. Fusion is ours: an operation shares its quantizer with the ReLU behind it, whatever
the supergroups say, and a supergroup that would fuse more is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from pow2quant import foreign
from pow2quant.errors import ConfigError
from pow2quant.operators import OPERATIONS, Values, operations

if TYPE_CHECKING:
    from pathlib import Path

    from pow2quant.config import QuantPlan, TensorSpec

FUSED = tuple(op for op, row in OPERATIONS.items() if row.clipped), operations(Values.CLIPPED)
"""First and second member of a supergroup that shares one quantizer here."""

Changes = dict[str, "TensorSpec | None"]


def plan(path: Path, base: QuantPlan, types: Mapping[str, str], outputs: Collection[str]) -> QuantPlan:
    """What a file asks for, over what `base` says of widths and ranges.

    types: the network's modules and what ONNX calls them; outputs: those whose results the network returns.
    Raises ConfigError, naming file and key, for a file that cannot be read and for what has no meaning here.
    """
    try:
        document = foreign.parsed(foreign.text(path, foreign.MOST_TEXT, ConfigError))
    except ConfigError as error:
        raise ConfigError(f"config_file: {error}") from None
    except ValueError as error:
        raise ConfigError(f"config_file: {path}: cannot be read as JSON: {error}") from error
    root = _Section(str(path), "", document)
    root.only(("defaults", "params", "op_type", "supergroups", "supergroup_pass_list", "model_input", "model_output"))
    _check_supergroups(root)
    defaults = root.section("defaults")
    base = _defaults(defaults, root.section("params"), base)
    base = replace(base, input=base.input if root.section("model_input").flag("is_input_quantized") else None)
    root.section("model_input").only(("is_input_quantized",))
    overrides: list[tuple[str, Changes]] = []
    for kind, section in root.section("op_type").sections():
        changes = _op_type(section, base) if kind in types.values() else {}
        overrides += [(name, changes) for name, found in types.items() if found == kind and changes]
    result = root.section("model_output")
    result.only(("is_output_quantized",))
    quantized = result.flag("is_output_quantized", None)
    if quantized is not None:
        overrides += [(name, {"output": base.output if quantized else None}) for name in outputs]
    return replace(base, overrides=(*base.overrides, *overrides))


def _defaults(section: _Section, parameters: _Section, base: QuantPlan) -> QuantPlan:
    section.only(("ops", "params", "strict_symmetric", "unsigned_symmetric", "per_channel_quantization"))
    operations, weights = section.section("ops"), section.section("params")
    operations.only(("is_input_quantized", "is_output_quantized", "is_symmetric"))
    output = _activation(operations, base.output, quantized=False)
    for role in ("bias", "weight"):
        parameters.section(role).only(("is_quantized", "is_symmetric"))
    parameters.only(("bias", "weight"))
    weight = _weight(weights, base.weight)
    weight = _weight(parameters.section("weight"), weight) if "weight" in parameters.content else weight
    section.refuse_if("strict_symmetric", "the grids of weights are -2^(n-1) … 2^(n-1) - 1")
    if output is not None and output.symmetric:
        section.refuse_if("unsigned_symmetric", "symmetric activations are signed")
    per_channel = bool(section.flag("per_channel_quantization"))
    weight = weight and replace(weight, per_channel=per_channel)
    symmetric = output.symmetric if output else bool(operations.flag("is_symmetric"))
    return replace(base, weight=weight, output=output, input=base.input and replace(base.input, symmetric=symmetric))


def _op_type(section: _Section, base: QuantPlan) -> Changes:
    """What an operation's section changes, by role."""
    section.only(("is_input_quantized", "is_output_quantized", "is_symmetric", "params", "per_channel_quantization"))
    changes: Changes = {}
    if {"is_output_quantized", "is_symmetric", "is_input_quantized"} & section.content.keys():
        changes["output"] = _activation(section, base.output, quantized=base.output is not None)
    section.section("params").only(("bias", "weight", "running_mean", "running_var"))
    weight = _weight(section.section("params").section("weight"), base.weight, quantized=base.weight is not None)
    if "per_channel_quantization" in section.content and weight is not None:
        weight = replace(weight, per_channel=bool(section.flag("per_channel_quantization")))
    return changes if weight == base.weight else changes | {"weight": weight}


def _activation(section: _Section, spec: TensorSpec | None, quantized: bool) -> TensorSpec | None:
    section.refuse_if("is_input_quantized", "a tensor has one quantizer, where it is produced")
    if spec is None or not section.flag("is_output_quantized", quantized):
        return None
    return replace(spec, symmetric=bool(section.flag("is_symmetric", spec.symmetric)))


def _weight(section: _Section, spec: TensorSpec | None, quantized: bool = False) -> TensorSpec | None:
    section.only(("is_quantized", "is_symmetric"))
    if spec is None or not section.flag("is_quantized", quantized or not section.content):
        return None
    if not section.flag("is_symmetric", True):
        section.refuse("is_symmetric", "weights are symmetric")
    return spec


def _check_supergroups(root: _Section) -> None:
    for number, group in enumerate(root.content.get("supergroups", [])):
        members = group.get("op_list", []) if isinstance(group, dict) else []
        if len(members) != 2 or any(m not in legal for m, legal in zip(members, FUSED, strict=True)):
            root.refuse(f"supergroups[{number}]", f"only {'/'.join(FUSED[0])} with {'/'.join(FUSED[1])} are fused")
    for name in root.content.get("supergroup_pass_list", []):
        if name != "MatmulAdd":  # a linear layer is one operation here
            root.refuse("supergroup_pass_list", f"{name!r} is unknown here")


@dataclass(frozen=True)
class _Section:
    """An object of the file; errors name the file and the key's path. Flags are the texts "True" and "False"."""

    file: str
    key: str
    content: Any

    def __post_init__(self) -> None:
        if not isinstance(self.content, dict):
            raise ConfigError(f"config_file: {self.file}: {self.key or 'top'}: expected an object")

    def path(self, key: str) -> str:
        return f"{self.key}.{key}" if self.key else key

    def refuse(self, key: str, why: str) -> NoReturn:
        raise ConfigError(
            f"config_file: {self.file}: {self.path(key)}: has no meaning for the custom backend: {why}; "
            'backend="aimet" reads all of AIMET\'s own'
        )

    def refuse_if(self, key: str, why: str) -> None:
        if self.flag(key):
            self.refuse(key, why)

    def only(self, keys: Collection[str]) -> None:
        for key in self.content:
            if key not in keys:
                self.refuse(key, f"known here are {', '.join(keys)}")

    def section(self, key: str) -> _Section:
        return _Section(self.file, self.path(key), self.content.get(key, {}))

    def sections(self) -> list[tuple[str, _Section]]:
        return [(key, self.section(key)) for key in self.content]

    def flag(self, key: str, default: bool | None = False) -> bool | None:
        value = self.content.get(key)
        if value not in (None, "True", "False"):
            raise ConfigError(f'config_file: {self.file}: {self.path(key)}: expected "True" or "False", got {value!r}')
        return default if value is None else value == "True"
