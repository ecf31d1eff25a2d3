"""Which plans a target refuses, before anything is calibrated, and which encodings afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pow2quant.errors import ConfigError

if TYPE_CHECKING:
    from pow2quant.targets.description import Target


class Spec(Protocol):
    """A `config.TensorSpec`, as far as a target looks at it."""

    @property
    def bits(self) -> int: ...

    @property
    def symmetric(self) -> bool: ...

    @property
    def per_channel(self) -> bool: ...

    @property
    def power_of_2(self) -> bool: ...


def require_tensor(target: Target, name: str, role: str, spec: Spec) -> None:
    """Raises ConfigError, naming tensor and rule, where a target has no such tensor; role as in `Site`."""
    limits = target.limits
    if role == "bias":
        if limits.bias_bits is not None and spec.bits > limits.bias_bits:
            raise _refused(target, name, f"{spec.bits} bits", f"limits.bias_bits: at most {limits.bias_bits}")
        return
    widths: tuple[int, ...] = getattr(limits, f"{role}_bits")
    if widths and spec.bits not in widths:
        legal = ", ".join(map(str, widths))
        raise _refused(target, name, f"{spec.bits} bits", f"limits.{role}_bits: {legal}")
    if role == "weight" and limits.per_tensor and spec.per_channel:
        raise _refused(target, name, "one scale per channel", "limits.per_tensor: one scale per tensor")
    if role != "weight" and limits.symmetric and not spec.symmetric:
        raise _refused(target, name, "a zero point", "limits.symmetric: signed codes with zero point 0")
    if target.rounding_matters and not spec.power_of_2:
        raise _refused(target, name, "a free scale", "its rounding is that of shifts: scales are powers of two")


def require_operation(target: Target, name: str, operation: str) -> None:
    """Raises ConfigError, naming node and rule, where a target does not have an operation (an ONNX type)."""
    legal = target.limits.operations
    if legal and operation not in legal:
        raise _refused(target, name, operation, f"limits.operations: {', '.join(legal)}")


def _refused(target: Target, name: str, has: str, rule: str) -> ConfigError:
    return ConfigError(f"{name}: {has}; target {target.name} does not take that ({rule})")
