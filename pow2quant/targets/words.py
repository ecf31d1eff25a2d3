"""A target in words, and as plain values."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from pow2quant.pow2_constraints.arithmetic import ROUNDINGS
from pow2quant.targets.description import Roundings

if TYPE_CHECKING:
    from pow2quant.targets.description import Limits, Target

KINDS = {
    "products": "sums of products (convolutions, linear layers)",
    "sums": "sums of tensors",
    "averages": "averages",
    "multiplications": "products of tensors",
    "moves": "what only changes a scale",
    "functions": "tables of functions",
}


def document(target: Target) -> dict[str, Any]:
    """Every field, in JSON's types."""
    return asdict(target)


def sentences(target: Target) -> list[str]:
    """What a user has to know of a target, a line each."""
    lines = [f"{target.name}: {target.summary}", "", "Rounding:"]
    by_rule: dict[str, list[str]] = {}
    for field in fields(Roundings):
        by_rule.setdefault(getattr(target.rounding, field.name), []).append(KINDS[field.name])
    lines += [f"  {rule} ({ROUNDINGS[rule]}): {', '.join(kinds)}" for rule, kinds in by_rule.items()]
    lines += ["", "Plans:", *(f"  {line}" for line in _limits(target.limits) or ["every plan"])]
    if target.tied_sums:
        lines.append("  the inputs and the result of a sum or a Concat get one exponent, so that it never shifts")
    if target.open_sums:
        lines.append("  what a layer gives to a sum alone is not rounded before it")
    lines += ["", f"Executors: {', '.join(target.executors)}", f"Formats: {', '.join(target.formats)}"]
    return [*lines, f"Source: {' '.join(target.source.split())}"] if target.source else lines


def _limits(limits: Limits) -> list[str]:
    lines = []
    for role in ("weight", "input", "output"):
        if widths := getattr(limits, f"{role}_bits"):
            lines.append(f"{role}: {' or '.join(map(str, widths))} bits")
    if limits.bias_bits is not None:
        lines.append(f"bias: at most {limits.bias_bits} bits")
    if limits.symmetric:
        lines.append("activations are signed, with zero point 0")
    if limits.per_tensor:
        lines.append("weights have one scale per tensor")
    for name, what in (
        ("product_shift", "the shift behind a sum of products"),
        ("sum_shift", "that of a sum's inputs"),
    ):
        if ends := getattr(limits, name):
            lines.append(f"{what} is from {ends[0]} to {ends[1]} bits to the right")
    if limits.accumulator_bits is not None:
        lines.append(f"accumulators have {limits.accumulator_bits} bits")
    if limits.operations:
        lines.append(f"operations: {', '.join(limits.operations)}")
    return lines
