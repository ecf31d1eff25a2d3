"""How scales are written: one exponent, or of one per channel the smallest and the largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pow2quant.report.page import NOTHING


def exponents(detail: Mapping[str, Any], count: bool = True) -> str:
    """`2^-9 … 2^-6 (64 channels)`; free scales as numbers."""
    order = detail.get("exponent", detail.get("scale"))
    return span(order, order, power if "exponent" in detail else None, count)


def power(k: int) -> str:
    """`2⁻⁹`."""
    return "2" + str(k).translate(SUPERSCRIPTS)


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def least(detail: Mapping[str, Any]) -> Any:
    """What a tensor is sorted by: its smallest exponent, or scale; nothing where there is none."""
    order = detail.get("exponent", detail.get("scale"))
    return min(order, default="") if isinstance(order, list) else "" if order is None else order


def tensor(name: str, detail: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of tensors, channels summarized."""
    order = detail.get("exponent", detail.get("scale"))
    return {
        "name": name,
        "kind": name.rpartition(".")[2].partition("_")[0] if "." in name else "input",
        "scale": exponents(detail),
        "hardware": span(order, detail.get("hardware_op")),
        "zero_point": span(detail.get("zero_point"), detail.get("zero_point"), count=False),
        "bits": span(detail.get("bitwidth"), detail.get("bitwidth"), count=False),
        "order": least(detail),
    }


def span(order: Any, values: Any, text: Any = None, count: bool = True) -> str:
    """One value, or of one per channel the smallest and the largest: `2^-9 … 2^-6 (64 channels)`.

    order: what they are sorted by.
    """
    text = text or (lambda value: f"{value:.6g}" if isinstance(value, float) else str(value))
    if values is None:
        return NOTHING
    if not isinstance(values, Sequence) or isinstance(values, str):
        return str(text(values))
    if not values:
        return NOTHING
    ordered = [text(value) for _, value in sorted(zip(order, values, strict=True), key=lambda pair: pair[0])]
    ends = ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} … {ordered[-1]}"
    return f"{ends} ({len(values)} channels)" if count and len(values) > 1 else str(ends)


def shifted(shift: Any) -> str:
    """A layer's shift from accumulator to output as hardware does it."""
    return span(shift, shift, lambda k: f">> {k}" if k > 0 else f"<< {-k}" if k < 0 else "none", count=False)


def label(detail: Mapping[str, Any]) -> str:
    """`2^-5 · u8`: what is written at a tensor's line."""
    scale, bits = exponents(detail, count=False), detail.get("bitwidth")
    kind = "" if bits is None or isinstance(bits, list) else f" · {'s' if detail.get('signed') else 'u'}{bits}"
    return f"{scale}{kind}"
