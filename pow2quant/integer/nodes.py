"""Reading ONNX nodes: attributes, names for errors, windows of convolutions and pools."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from pow2quant.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from numpy.typing import NDArray

POOLS = ("AveragePool", "MaxPool")

COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not")
"""Operations whose results are truth values."""


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute's value, or `default` when the node does not have it."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def title(node: onnx.NodeProto) -> str:
    """How an error names a node."""
    return f"{node.op_type} {node.name or node.output[0]}"


def without_integers(node: onnx.NodeProto, encoded: Container[str], constants: Container[str]) -> str:
    """That a node has no integers: it reads what has no encoding, or is none of the forms that are known."""
    floats = [name for name in node.input if name and name not in encoded and name not in constants]
    if floats:
        return f"{title(node)}: has no integers, since {floats[0]}, which it reads, has no encoding"
    return (
        f"{title(node)}: has no integers in this form; `pow2quant list --operators` says which operations have, in the "
        "form that pow2quant exports"
    )


def reduced_axes(node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]], rank: int) -> list[int] | None:
    """The dimensions that a mean, sum or extreme goes over, sorted; None where they are computed, not constant."""
    if node.op_type == "GlobalAveragePool":
        return list(range(2, rank))
    axes = attribute(node, "axes", None)
    if axes is None and len(node.input) > 1 and node.input[1]:
        axes = constants.get(node.input[1])
        if axes is None:
            return None
    return sorted(int(axis) % rank for axis in (range(rank) if axes is None else axes))


@dataclass(frozen=True)
class Axis:
    """What a window does along one dimension of a map; as it stands, it sees one place at a time, each once.

    Every window fits into the map with its padding, and the padding ends where the last window does.
    """

    size: int
    kernel: int = 1
    strides: int = 1
    dilations: int = 1
    before: int = 0
    after: int = 0
    result: int = 0

    def __post_init__(self) -> None:
        if not self.result:
            object.__setattr__(self, "result", self.size)

    @property
    def is_plain(self) -> bool:
        """Whether it sees one place at a time, each once."""
        return self == Axis(self.size)

    def tap(self, place: int) -> tuple[slice, slice]:
        """The results whose window has this place on the map, and where on the map that is; both may be empty."""
        offset = place * self.dilations - self.before
        first = max(0, -(offset // self.strides))
        last = min(self.result - 1, (self.size - 1 - offset) // self.strides)
        start = first * self.strides + offset
        if last < first:
            return slice(0), slice(0)
        return slice(first, last + 1), slice(start, start + (last - first) * self.strides + 1, self.strides)

    def seen(self, padding: bool) -> NDArray[np.int64]:
        """How many places every window sees on the map, or on the map and its padding."""
        if padding:
            return np.full(self.result, self.kernel)
        counts = np.zeros(self.result, np.int64)
        for place in range(self.kernel):
            counts[self.tap(place)[0]] += 1
        return counts


def axes_of(
    node: onnx.NodeProto, kernel: Sequence[int], size: Sequence[int], result: Sequence[int] | None = None
) -> list[Axis]:
    """A node's window over a map of `size`, by dimension; result: by default what fits into the padded input."""
    rank = len(size)
    if not 1 <= rank <= 3:
        raise UnsupportedModelError(f"{title(node)}: windows in {rank} dimensions; one to three have integers")
    strides = [int(s) for s in attribute(node, "strides", [1] * rank)]
    dilations = [int(d) for d in attribute(node, "dilations", [1] * rank)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    pads = _pads(node, size, strides, reach)
    if node.op_type in POOLS and attribute(node, "auto_pad", b"").startswith(b"SAME") and max(dilations) > 1:
        raise UnsupportedModelError(f"{title(node)}: auto_pad with dilations, which onnxruntime leaves out of it")
    if attribute(node, "ceil_mode", 0) and result is not None:
        starts = [(n - 1) * s - a for n, s, a in zip(result, strides, pads, strict=False)]
        if any(start >= n for start, n in zip(starts, size, strict=True)):
            raise UnsupportedModelError(f"{title(node)}: its last window would begin behind the map (ceil_mode)")
    if result is None:
        padded = [n + a + b for n, a, b in zip(size, pads, pads[rank:], strict=False)]
        result = [(n - r) // s + 1 for n, r, s in zip(padded, reach, strides, strict=True)]
    if min(result) < 1:
        raise UnsupportedModelError(f"{title(node)}: a window of {reach} on a map of {list(size)} with pads {pads}")
    ends = [(n - 1) * s + r for n, s, r in zip(result, strides, reach, strict=True)]
    after = [end - n - a for end, n, a in zip(ends, size, pads, strict=False)]
    columns = (size, kernel, strides, dilations, pads[:rank], after, result)
    return [Axis(*map(int, values)) for values in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Window:
    """What a convolution or pool slides over a map: all pairs are (vertical, horizontal).

    One-dimensional maps (C, L) are seen as (C, 1, L). before, after: padding in front of and behind the map; `after`
    reaches as far as the last window, also beyond what ONNX pads (ceil_mode).
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    result: tuple[int, int]

    @classmethod
    def along(cls, axes: Sequence[Axis]) -> Window:
        """The window along one or two dimensions."""
        first, second = [*[Axis(1)] * (2 - len(axes)), *axes]
        return cls(**{f.name: (getattr(first, f.name), getattr(second, f.name)) for f in fields(Axis)})

    def patches(self, maps: NDArray[Any], fill: int) -> NDArray[Any]:
        """(N, C, height, width) -> a view (N, C, result height, result width, kernel height, kernel width).

        fill: the value of what lies outside of the maps.
        """
        (top, left), (bottom, right) = self.before, self.after
        if top > 0 or left > 0 or bottom > 0 or right > 0:
            pads = ((0, 0), (0, 0), (top, max(bottom, 0)), (left, max(right, 0)))
            maps = np.pad(maps, pads, constant_values=fill)
        height, width = ((n - 1) * s + d * (k - 1) + 1 for n, s, d, k in self._columns())
        n, c, h, w = maps.strides
        (sh, sw), (dh, dw) = self.strides, self.dilations
        assert height <= maps.shape[2]
        assert width <= maps.shape[3]
        shape = (*maps.shape[:2], *self.result, *self.kernel)
        return np.lib.stride_tricks.as_strided(maps, shape, (n, c, h * sh, w * sw, h * dh, w * dw), writeable=False)

    def _columns(self) -> list[tuple[int, int, int, int]]:
        return list(zip(self.result, self.strides, self.dilations, self.kernel, strict=True))


def _pads(node: onnx.NodeProto, size: Sequence[int], strides: Sequence[int], reach: Sequence[int]) -> list[int]:
    """Padding in front of every dimension, then behind."""
    rank = len(size)
    auto = attribute(node, "auto_pad", b"NOTSET").decode()
    if auto in ("", "NOTSET"):
        return [int(p) for p in attribute(node, "pads", [0] * (2 * rank))]
    if auto == "VALID":
        return [0] * (2 * rank)
    total = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(size, strides, reach, strict=True)]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return [*small, *large] if auto == "SAME_UPPER" else [*large, *small]
