"""Which kernels `templates/vectors.h.j2` has a second time, with a processor's dot instructions."""

from __future__ import annotations


def has_vectors(kernel: str, types: dict[str, str]) -> bool:
    """Whether it has a kernel for these types."""
    if kernel in ("span_sums", "dots"):
        codes = types["x"] == "uint8_t" or (types["x"] == "int8_t" and kernel == "span_sums")
        return codes and (types["w"], types["a"], types["b"]) == ("int8_t", "int32_t", "int32_t")
    codes = kernel in ("requantize", "requantize_each") and types["y"] in ("int8_t", "uint8_t")
    return codes and types["a"] == "int32_t" and not types.get("rounding")
