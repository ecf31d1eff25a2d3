"""AIMET's configuration files (JSON: what a target quantizes), as far as they have a meaning for our own placement.

What has none is an error that names the key: another quantizer than the one that every tensor has, another grid than
ours, a range that calibration would not choose. Supergroups hold where the network has their operations in a row: only
the last has a quantizer. Beyond them, an operation shares its quantizer with the ReLU behind it, whatever they say.
`hw_version` and `supported_kernels` say what a chip has; nothing here follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from pow2quant import foreign
from pow2quant.errors import ConfigError
from pow2quant.operators import OPERATIONS, Values, operations

if TYPE_CHECKING:
    from pathlib import Path

    from pow2quant.config import QuantPlan, TensorSpec

CLIPPED = tuple(op for op, row in OPERATIONS.items() if row.clipped), operations(Values.CLIPPED)
"""Operations that share one quantizer with the ReLU or clip behind them, and these."""

MOVED = (*operations(Values.MOVED), *operations(Values.CLIPPED), "MaxPool")
"""Operations that give their operand's values: a quantizer in front of them does what one behind them does."""

RANGES = {
    "Cos": (-1.0, 1.0),
    "Relu": (0.0, math.inf),
    "Sigmoid": (0.0, 1.0),
    "Sin": (-1.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
}
"""What a function's values lie in anyhow, so that a constraint to it changes nothing."""

ONE_QUANTIZER = "a tensor has one quantizer, where it is produced"

Changes = dict[str, "TensorSpec | None"]


def plan(
    path: Path,
    base: QuantPlan,
    types: Mapping[str, str],
    outputs: Collection[str],
    readers: Mapping[str, Collection[str]],
) -> QuantPlan:
    """What a file asks for, over what `base` says of widths and ranges.

    types: the network's modules and what ONNX calls them; outputs: those whose results the network returns; readers: by
    module those that read its result. Raises ConfigError, naming file and key, for a file that cannot be read and for
    what has no meaning here.
    """
    try:
        document = foreign.parsed(foreign.text(path, foreign.MOST_TEXT, ConfigError))
    except ConfigError as error:
        raise ConfigError(f"config_file: {error}") from None
    except ValueError as error:
        raise ConfigError(f"config_file: {path}: cannot be read as JSON: {error}") from error
    root = _Section(str(path), "", document)
    root.only(("defaults", "params", "op_type", "supergroups", "supergroup_pass_list", "model_input", "model_output"))
    specs = _specs(root.section("defaults"), root.section("params"), base)
    base = _defaults(root, specs)
    overrides: list[tuple[str, Changes]] = []
    for kind, section in root.section("op_type").sections():
        changes = _op_type(section, kind, base, specs) if kind in types.values() else {}
        overrides += [(name, changes) for name, found in types.items() if found == kind and changes]
    overrides += [(name, {"output": None}) for name in _inside_supergroups(root, types, readers)]
    result = root.section("model_output")
    result.only(("is_output_quantized",))
    quantized = result.flag("is_output_quantized", None)
    if quantized is not None:
        overrides += [(name, {"output": specs.output if quantized else None}) for name in outputs]
    return replace(base, overrides=(*base.overrides, *overrides))


def _specs(section: _Section, parameters: _Section, base: QuantPlan) -> QuantPlan:
    """How roles are quantized where they are: with the symmetry that the defaults say."""
    known = ("ops", "params", "strict_symmetric", "unsigned_symmetric", "per_channel_quantization")
    section.only((*known, "hw_version", "supported_kernels"))
    parameters.only(("bias", "weight"))
    for part in (section.section("params"), parameters.section("bias"), parameters.section("weight")):
        part.only(("is_quantized", "is_symmetric"))
    section.refuse_if("strict_symmetric", "the grids of weights are -2^(n-1) … 2^(n-1) - 1")
    symmetric = bool(section.section("ops").flag("is_symmetric"))
    if symmetric:
        section.refuse_if("unsigned_symmetric", "symmetric activations are signed")
    own = section.section("params").flag("is_symmetric")
    weight = base.weight and replace(
        base.weight,
        symmetric=bool(parameters.section("weight").flag("is_symmetric", own)),
        per_channel=bool(section.flag("per_channel_quantization")),
    )
    output, entering = (spec and replace(spec, symmetric=symmetric) for spec in (base.output, base.input))
    return replace(base, weight=weight, output=output, input=entering)


def _defaults(root: _Section, specs: QuantPlan) -> QuantPlan:
    """What is quantized where no operation's section says otherwise."""
    defaults, entering = root.section("defaults"), root.section("model_input")
    operations = defaults.section("ops")
    operations.only(("is_input_quantized", "is_output_quantized", "is_symmetric"))
    operations.refuse_if("is_input_quantized", ONE_QUANTIZER)
    entering.only(("is_input_quantized",))
    weights = (
        root.section("params").section("weight").flag("is_quantized", defaults.section("params").flag("is_quantized"))
    )
    return replace(
        specs,
        weight=specs.weight if weights else None,
        output=specs.output if operations.flag("is_output_quantized") else None,
        input=specs.input if entering.flag("is_input_quantized") else None,
    )


def _op_type(section: _Section, kind: str, base: QuantPlan, specs: QuantPlan) -> Changes:
    """What an operation's section changes, by role."""
    known = ("is_input_quantized", "is_output_quantized", "is_symmetric", "params", "per_channel_quantization")
    section.only((*known, "encoding_constraints", "supported_kernels"))
    section.refuse_if("is_input_quantized", ONE_QUANTIZER)
    _check_range(section, kind)
    parameters = section.section("params")
    parameters.only(("bias", "weight", "running_mean", "running_var"))
    output = _changed(section, "is_output_quantized", base.output, specs.output)
    weight = _changed(parameters.section("weight"), "is_quantized", base.weight, specs.weight)
    if "per_channel_quantization" in section.content and weight is not None:
        weight = replace(weight, per_channel=bool(section.flag("per_channel_quantization")))
    found: Changes = {"output": output, "weight": weight}
    return {role: spec for role, spec in found.items() if spec != getattr(base, role)}


def _changed(section: _Section, key: str, now: TensorSpec | None, spec: TensorSpec | None) -> TensorSpec | None:
    """The spec after a section, of a role that is quantized as `now`, or as `spec` where the section says so."""
    if spec is None or not section.flag(key, now is not None):
        return None
    spec = now or spec
    return replace(spec, symmetric=bool(section.flag("is_symmetric", spec.symmetric)))


def _check_range(section: _Section, kind: str) -> None:
    """Raises ConfigError for a constraint that calibration would not keep by itself."""
    wanted = section.section("encoding_constraints").content
    low, high = RANGES.get(kind, (-math.inf, math.inf))
    ends = (wanted.get("min", -math.inf), wanted.get("max", math.inf))
    if not all(type(end) in (int, float) for end in ends) or not (ends[0] <= low and high <= ends[1]):
        section.refuse("encoding_constraints", f"calibration chooses the range of {kind}")


def _inside_supergroups(
    root: _Section, types: Mapping[str, str], readers: Mapping[str, Collection[str]]
) -> Iterator[str]:
    """The modules whose results have no quantizer, since they are inside a supergroup."""
    for number, group in enumerate(root.content.get("supergroups", [])):
        members = group.get("op_list") if isinstance(group, dict) else None
        if not isinstance(members, list) or len(members) < 2:
            root.refuse(f"supergroups[{number}]", "expected an op_list of two operations or more")
        members = [m for m in members if m != "BatchNormalization"]  # folded
        for start in types:
            chain = _chain(start, members, types, readers)
            last = max((i for i, name in enumerate(chain) if types[name] not in MOVED), default=0)
            yield from (name for name in chain[:last])
    for name in root.content.get("supergroup_pass_list", []):
        if name not in ("MatmulAdd", "LayerNormalization", "RMSNormalization"):  # one operation each, here
            root.refuse("supergroup_pass_list", f"{name!r} is unknown here")


def _chain(
    start: str, members: list[str], types: Mapping[str, str], readers: Mapping[str, Collection[str]]
) -> list[str]:
    """The modules in a row, from `start` on, that are these operations, each read by the next one only; else none."""
    chain = [start]
    while len(chain) < len(members):
        following = tuple(readers[chain[-1]])
        if len(following) != 1 or not following[0]:
            return []
        chain.append(following[0])
    return chain if [types[name] for name in chain] == members else []


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
