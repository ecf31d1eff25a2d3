"""What is quantized and how: a specification for each role, and the plan that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Protocol

from pow2quant.mappings.legal import Legal, illegal
from pow2quant.pow2_constraints import CHOOSERS, is_chooser
from pow2quant.targets import DEFAULT, WIDTHS, Target

ROLES = ("weight", "input", "output", "bias")

BLOCKS = (16, 32, 64, 128)
"""Values that can share one scale along a weight's inputs."""

BLOCK_BITS = 4
"""Weights with blocks have at most so many bits: onnxruntime 1.31 does not run blocks of int8 at every level."""

_BITWIDTH = Legal(lambda: "an integer from 2 to 16 (bias: 8 to 32); null in place of the role's mapping keeps it float")
_SYMMETRIC = Legal(lambda: "true or false for input and output; true for weight and bias")
_PER_CHANNEL = Legal(lambda: "true or false for weight; false for the other roles")
_BLOCK = Legal(
    lambda: f"for weight one of {', '.join(map(str, BLOCKS))}",
    lambda value: value is None or value in BLOCKS,
)
_RANGE = Legal(lambda: f"one of {', '.join(sorted(CHOOSERS))}, percentile:SHARE (of 100)", is_chooser)


@dataclass(frozen=True)
class TensorSpec:
    """How the tensors of one role are quantized.

    A bias's scale is always s_in * s_w, whatever is said here.
    bits: width of the integers; `bitwidth` in YAML. symmetric: a signed grid with zero point 0; otherwise unsigned with
    an even zero point. per_channel: one scale per output channel (weights). power_of_2: scales are 2^k; otherwise free.
    range: how the scale is chosen from the calibration data, a key of `pow2_constraints.CHOOSERS`. block: one scale for
    each output channel and so many inputs, not just for each channel. Weights of more than 4 bits and those of
    depthwise layers keep one for each channel.
    """

    bits: Annotated[int, _BITWIDTH]
    symmetric: Annotated[bool, _SYMMETRIC]
    per_channel: Annotated[bool, _PER_CHANNEL] = False
    power_of_2: bool = True
    range: Annotated[str, _RANGE] = "mse"
    block: Annotated[int | None, _BLOCK] = None


WEIGHT = TensorSpec(8, symmetric=True, per_channel=True)
INPUT = OUTPUT = TensorSpec(8, symmetric=False)
BIAS = TensorSpec(32, symmetric=True)
"""How tensors of each role are quantized where nothing else is said."""


class _Site(Protocol):
    """An `artifact.Site`, as far as a plan looks at it."""

    @property
    def module(self) -> str: ...

    @property
    def role(self) -> str: ...


@dataclass(frozen=True)
class QuantPlan:
    """What is quantized and how; None keeps a role float.

    overrides: (pattern, {role: spec}) or (pattern, None); patterns are shell wildcards for module names, None keeps
    everything of these modules float. functions: `exact` computes Softmax and the norms as stated integers, `plain`
    leaves them to the standard's nodes, which executors compute in their own ways. target: whose arithmetic is meant.
    sums: the least bits of what is added and of its sum, None: those of outputs.
    weight_bits, activation_bits, per_tensor: in short, for the roles that are not given: symmetric weights, asymmetric
    activations, 32-bit biases; the input keeps 8 bits, as an image has. Raises ConfigError for an illegal width.
    """

    weight: TensorSpec | None = WEIGHT
    input: TensorSpec | None = INPUT
    output: TensorSpec | None = OUTPUT
    bias: TensorSpec | None = BIAS
    overrides: tuple[tuple[str, Mapping[str, TensorSpec | None] | None], ...] = ()
    functions: str = "exact"
    target: Target = DEFAULT
    sums: int | None = None
    weight_bits: InitVar[int] = 8
    activation_bits: InitVar[int] = 8
    per_tensor: InitVar[bool] = False

    def __post_init__(self, weight_bits: int, activation_bits: int, per_tensor: bool) -> None:
        short = {
            "weight": replace(WEIGHT, bits=weight_bits, per_channel=not per_tensor),
            "input": replace(INPUT, bits=max(INPUT.bits, activation_bits)),
            "output": replace(OUTPUT, bits=activation_bits),
        }
        for role, standard in (("weight", WEIGHT), ("input", INPUT), ("output", OUTPUT)):
            if getattr(self, role) == standard:
                object.__setattr__(self, role, short[role])
        for role in ROLES:
            check_role(role, getattr(self, role), f"plan.{role}", ("bias",))
        if self.sums is not None and self.sums not in WIDTHS["output"]:
            raise illegal("plan.sums", self.sums, "an integer from 2 to 16, or None")
        for pattern, changes in self.overrides:
            for role, spec in (changes or {}).items():
                check_role(role, spec, f"plan.overrides.{pattern}.{role}", ("bias",))

    @classmethod
    def default(cls, weight_bits: int = 8, activation_bits: int = 8, per_tensor: bool = False) -> QuantPlan:
        """The plan with these widths; see the class."""
        return cls(weight_bits=weight_bits, activation_bits=activation_bits, per_tensor=per_tensor)

    def spec(self, site: _Site, summed: bool = False) -> TensorSpec | None:
        """How a site is quantized: as the last override says that matches its module and speaks of its role.

        summed: its tensor is an operand or the result of a sum.
        """
        for pattern, changes in reversed(self.overrides):
            if fnmatchcase(site.module, pattern) and (changes is None or site.role in changes):
                return None if changes is None else changes[site.role]
        roles = {"weight": self.weight, "input": self.input, "output": self.output, "bias": self.bias}
        spec = roles[site.role]
        if summed and site.role == "output" and spec is not None and self.sums is not None:
            return replace(spec, bits=max(spec.bits, self.sums))
        return spec


def check_role(role: str, spec: TensorSpec | None, path: str, symmetric: tuple[str, ...] = ("weight", "bias")) -> None:
    """Raises ConfigError, naming the key below `path`, for what a tensor of this role cannot have.

    symmetric: the roles that must be. A plan made by hand may have weights with a zero point: they are simulated and
    exported.
    """
    if spec is None:
        return
    widths = WIDTHS[role]
    if spec.bits not in widths:
        words = f"an integer from {widths.start} to {widths.stop - 1}; to keep it float, {path}: null"
        raise illegal(f"{path}.bitwidth", spec.bits, words)
    if not spec.symmetric and role in symmetric:
        raise illegal(f"{path}.symmetric", spec.symmetric, f"true ({role}: signed with zero point 0)")
    if spec.per_channel and role != "weight":
        raise illegal(f"{path}.per_channel", spec.per_channel, "false (only weights have a scale per channel)")
    if spec.block is not None:
        _check_block(role, spec, f"{path}.block")


def _check_block(role: str, spec: TensorSpec, path: str) -> None:
    if spec.block not in BLOCKS or role != "weight":
        raise illegal(path, spec.block, f"for weight one of {', '.join(map(str, BLOCKS))}, or null")
    if not (spec.symmetric and spec.per_channel and spec.power_of_2):
        raise illegal(path, spec.block, "null without symmetric, per_channel and power_of_2")
