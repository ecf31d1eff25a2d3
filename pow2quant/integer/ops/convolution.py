"""Conv and ConvTranspose: sums of products over windows, in one to three dimensions, grouped, strided, dilated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.c_layer import BLOCK, LANES, Planes, folded
from pow2quant.integer.c_text import ctype
from pow2quant.integer.nodes import Axis, Window, attribute, axes_of, title
from pow2quant.integer.ops import volume
from pow2quant.integer.ops.copy import Copy, Part
from pow2quant.integer.program import Step, largest_sum
from pow2quant.integer.ternary import Ternary
from pow2quant.integer.vectors import has_vectors

if TYPE_CHECKING:
    import onnx

    from pow2quant.integer.c_layer import Array, Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Ints, Program, Requantization, Tensor
    from pow2quant.pow2_constraints import Encoding

SHORT = 32
"""Sums of so many products, or fewer, take less time where their map is copied than where patches are gathered."""

FEW = 8
"""Results of fewer places leave registers empty that hold places; their patches are gathered."""

PATCH = (0, 3, 1, 2)
"""The order of weights: (C_out, width, C_in, height)."""

SPAN = 16
"""So many places at least are added up at a time: see `templates/span_sums.c.j2`."""

BEYOND = 3
"""Weights that may be read behind the last: see `templates/vectors.h.j2`."""

ROWS = 4
"""The kernel for patches holds the sums of so many output channels."""


@dataclass(frozen=True, eq=False)
class Convolution(Step):
    """y = requantize(sum of w * (x - zero) over a window + bias), zero beyond the map.

    weight: (C_out, C_in / groups, kernel height, kernel width). bias: (C_out,), in units of s_in * s_w.
    """

    weight: Ints
    bias: Ints
    groups: int
    window: Window
    requantization: Requantization

    def run(self, program: Program, *inputs: Codes) -> Codes:
        (x,) = inputs
        kind, zero = program.kinds[self], program.tensors[self.inputs[0]].zero
        maps = x.reshape(len(x), -1, *self.window.size).astype(kind) - kind.type(zero)
        patches = self.window.patches(maps, 0)
        weight, n, g = self.weight.astype(kind), len(x), self.groups
        if weight.shape[1] == 1 and len(weight) == g:
            sums = np.zeros(patches.shape[:4], kind)
            for row, column in np.ndindex(*weight.shape[2:]):
                sums += patches[..., row, column] * weight[:, 0, row, column, None, None]
        else:
            columns = patches.reshape(n, g, -1, *patches.shape[2:]).transpose(0, 1, 2, 5, 6, 3, 4)
            rows = weight.reshape(g, len(weight) // g, -1)
            sums = rows @ columns.reshape(n, g, rows.shape[2], -1)
        accumulator = sums.reshape(n, len(weight), -1) + self.bias.astype(kind)[:, None]
        return self.requantization(accumulator, channel_axis=-2)

    def emit_c(self, layer: Layer) -> str:
        """The code of zero goes into the bias."""
        bias, bound = folded(self.weight, self.bias, layer.input(0))
        a = layer.accumulator(bound, self.requantization)
        if (ternary := Ternary.of(self.weight)) is not None:
            return self._emit_ternary(layer, ternary, bias, a)
        if self._is_direct(layer):
            return self._emit_direct(layer, bias, a)
        return self._emit_patches(layer, bias, a)

    def _is_direct(self, layer: Layer) -> bool:
        """Whether sums are short, and the map's copy is small."""
        channels = self.weight.shape[1]
        if channels == 1 < self.groups:
            return True
        least = channels * Planes.of(self.window, channels, 0).size
        return math.prod(self.weight.shape[1:]) <= SHORT and (_is_matrix(self.window) or least <= layer.budget(4))

    def _emit_direct(self, layer: Layer, bias: Ints, sums: str) -> str:
        """The body with a kernel that reads the map, or a copy of it. The codes take less than the sums."""
        layer.held = 2
        weight = layer.array("weight", self.weight.transpose(PATCH), zeros=BEYOND)
        bias_array, rule = layer.array("bias", bias, least="int32"), layer.rule(self.requantization)
        call = _Call(layer, self, self.window, weight, bias_array, sums)
        if _is_matrix(self.window):
            return f"{rule}\n{call.matrix()}"
        planes = layer.planes(self.window, self.weight.shape[1], 32)
        return f"{layer.window(self.window, self.weight.shape[1])}\n{rule}\n{call.copied(planes, 'map')}"

    def _emit_patches(self, layer: Layer, bias: Ints, sums: str) -> str:
        """The body with the kernel that gathers patches, and with another for processors that have dot instructions."""
        layer.held = ROWS
        channels, length, window = self.weight.shape[1], self.weight[0].size, _one_row(self.window)
        weight = layer.array("weight", self.weight.transpose(PATCH), zeros=max(BEYOND, -length % LANES))
        call = _Call(layer, self, window, weight, layer.array("bias", bias, least="int32"), sums)
        twice = math.prod(window.result) >= FEW and has_vectors("span_sums", call.types)
        copied = twice and not _is_matrix(window)
        least = channels * Planes.of(window, channels, 0).size + BLOCK if copied else 0
        patches, block, size = layer.patches(window, channels, least)
        declared = f"{layer.window(window, channels)}\n{layer.rule(self.requantization)}"
        plain = call.gathered(patches, block)
        if not twice:
            return f"{declared}\n{plain}"
        if copied:
            vectors = call.copied(Planes.of(window, channels, size - BLOCK), patches, vectors=True)
        else:
            vectors = f"(void)window;\n(void){patches};\n{call.matrix(vectors=True)}"
        return f"{declared}\n#ifdef VECTORS\n{vectors}\n#else\n{plain}\n#endif"

    def _emit_ternary(self, layer: Layer, ternary: Ternary, bias: Ints, sums: str) -> str:
        """The body with the kernel that adds and subtracts; it holds two sums, and codes."""
        layer.held = 3
        x, window, channels = layer.input(0), _one_row(self.window), self.weight.shape[1]
        arrays, offset = layer.ternary(ternary), layer.array("bias", bias, least="int32")
        planes = layer.planes(window, channels, 4)
        entries = layer.entries(channels * planes.size, self.weight[0].size)
        types = {"x": ctype(x), "b": offset.ctype, "a": sums, "y": ctype(layer.output), "l": entries}
        kernel, rule = layer.kernel("ternary_convolution", **types), layer.rule(self.requantization)
        taps = f"static const int32_t taps[] = {{{', '.join(map(str, planes.taps))}}};"
        declared = f"{layer.window(window, channels)}\n{planes.declared}\n{taps}\n{rule}"
        numbers = f"{self.groups}, {len(self.weight) // self.groups}, {x.zero}, taps, {arrays}, {offset.name}, &rule"
        return f"{declared}\n{kernel}(x, y, &window, &planes, {numbers}, map, list);"

    def bound(self, program: Program) -> int:
        return largest_sum(self.weight, self.bias, program.tensors[self.inputs[0]])

    def work(self, program: Program) -> int:
        return program.tensors[self.output].size * math.prod(self.weight.shape[1:])


@dataclass(frozen=True)
class _Call:
    """A call of one of the kernels for weights of 8 bits or more. sums: their type."""

    layer: Layer
    step: Convolution
    window: Window
    weight: Array
    bias: Array
    sums: str

    @property
    def types(self) -> dict[str, str]:
        """Of the kernels."""
        x, y = ctype(self.layer.input(0)), ctype(self.layer.output)
        return {"x": x, "w": self.weight.ctype, "b": self.bias.ctype, "a": self.sums, "y": y}

    def gathered(self, patches: str, block: int) -> str:
        """With patches."""
        return self._written("convolution", "x, y, &window", [self._zero], [patches, block])

    def copied(self, planes: Planes, scratch: str, *, vectors: bool = False) -> str:
        """With a copy of the map. vectors: only for processors with dot instructions."""
        self.layer.source.used.add("Planes")
        channels, *kernel = self.step.weight.shape[1:]
        places = (np.arange(channels)[:, None] * planes.size + planes.taps).reshape(1, channels, *kernel)
        offsets = self.layer.offsets(places.transpose(PATCH), vectors=vectors)
        sizes = [self._zero, offsets, places.size]
        return f"{planes.declared}\n{self._written('direct', 'x, y, &window, &planes', sizes, [scratch])}"

    def matrix(self, *, vectors: bool = False) -> str:
        """Of the map as it is."""
        channels, places = self.step.weight.shape[1], math.prod(self.window.result)
        offsets = self.layer.offsets(np.arange(channels) * places, vectors=vectors)
        return self._written("pointwise", f"x, y, {places}", [offsets, channels], [])

    @property
    def _zero(self) -> int:
        return self.layer.input(0).zero

    def _written(self, kernel: str, first: str, sizes: list[Any], last: list[Any]) -> str:
        counts = [self.step.groups, len(self.step.weight) // self.step.groups]
        given = [first, *counts, *sizes, self.weight.name, self.bias.name, "&rule", *last]
        return f"{self.layer.kernel(kernel, **self.types)}({', '.join(map(str, given))});"


def lower(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Conv."""
    x = graph.read(node.input[0])
    weight, encoding = graph.parameter(node.input[1])
    target = graph.declare(output)
    axes = axes_of(node, weight.shape[2:], x.shape[1:], target.shape[1:])
    _add(graph, node, x, output, weight, encoding, axes, low, high)


def lower_transposed(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """ConvTranspose: a convolution with the mirrored kernel over a map whose values stand `stride` apart."""
    x = graph.read(node.input[0])
    weight, encoding = graph.parameter(node.input[1])
    groups, rank = int(attribute(node, "group", 1)), weight.ndim - 2
    if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"", b"VALID") or attribute(node, "output_shape", []):
        raise UnsupportedModelError(f"{title(node)}: auto_pad or output_shape; only explicit pads have integers")
    strides = [int(s) for s in attribute(node, "strides", [1] * rank)]
    dilations = [int(d) for d in attribute(node, "dilations", [1] * rank)]
    pads = [int(p) for p in attribute(node, "pads", [0] * (2 * rank))]
    # (C_in, C_out / groups, …) -> (C_out, C_in / groups, …), mirrored
    split = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
    mirrored = np.flip(split.reshape(-1, *split.shape[2:]), axis=tuple(range(2, 2 + rank)))
    if encoding.axis == 1:
        encoding = replace(
            encoding,
            scale=np.tile(encoding.scale, groups),
            zero_point=np.tile(encoding.zero_point, groups),
            grid=encoding.grid,
            axis=0,
        )
    elif encoding.axis is not None:
        raise UnsupportedModelError(f"{node.input[1]}: one scale per channel along axis {encoding.axis}, not 1")
    target = graph.declare(output)
    reach = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
    before = [max(0, r - p) for r, p in zip(reach, pads, strict=False)]
    cut = [max(0, p - r) for r, p in zip(reach, pads, strict=False)]
    sizes = [n + r for n, r in zip(target.shape[1:], reach, strict=True)]
    spread = np.zeros((x.shape[0], *sizes), np.int64)
    y = np.arange(spread.size).reshape(spread.shape)
    keep: list[slice] = [slice(None)]
    place: list[slice] = [slice(None)]
    for length, stride, start, skip, end in zip(x.shape[1:], strides, before, cut, sizes, strict=True):
        first = -(-skip // stride)  # values that the padding cuts off in front
        at = start + first * stride - skip
        count = min(length - first, -(-(end - at) // stride))
        keep.append(slice(first, first + count))
        place.append(slice(at, at + (count - 1) * stride + 1, stride))
    part = Part.of(0, np.arange(x.size).reshape(x.shape)[tuple(keep)], y[tuple(place)])
    name = f"{node.name or output}.spread"
    spaced = graph.declare(name, spread.shape, x.encoding)
    graph.steps.append(Copy(node.name or output, (x.name,), name, (part,), fill=spaced.zero))
    columns = zip(sizes, mirrored.shape[2:], dilations, target.shape[1:], strict=True)
    axes = [Axis(size, kernel, dilations=d, result=n) for size, kernel, d, n in columns]
    _add(graph, node, spaced, output, mirrored, encoding, axes, low, high)


def _is_plain(window: Window) -> bool:
    """Whether it sees one place at a time, each once."""
    one = (window.kernel, window.strides, window.before) == ((1, 1), (1, 1), (0, 0))
    return one and window.size == window.result


def _one_row(window: Window) -> Window:
    """A window of one place over the whole map, seen as one long row; another stays as it is."""
    row = (1, math.prod(window.size))
    return replace(window, size=row, result=row) if _is_plain(window) else window


def _is_matrix(window: Window) -> bool:
    """Whether the convolution is a product of matrices, with places enough to fill a vector."""
    return _is_plain(window) and math.prod(window.size) >= SPAN


def _add(
    graph: Lowering,
    node: onnx.NodeProto,
    x: Tensor,
    output: str,
    weight: Ints,
    encoding: Encoding,
    axes: list[Axis],
    low: float,
    high: float,
) -> None:
    """Adds the step; weight (C_out, C_in / groups, …)."""
    if encoding.axis not in (None, 0):
        raise UnsupportedModelError(f"{node.input[1]}: one scale per channel along axis {encoding.axis}, not 0")
    name = node.name or output
    source, window = volume.window(graph, name, x, axes, x.zero)
    exponent = x.exponent + encoding.exponent
    bias = graph.bias(node, exponent, len(weight))
    graph.steps.append(
        Convolution(
            node=name,
            inputs=(source,),
            output=output,
            weight=weight.reshape(*weight.shape[:2], *window.kernel),
            bias=bias,
            groups=int(attribute(node, "group", 1)),
            window=window,
            requantization=graph.requantization(exponent, graph.tensors[output], low, high),
        )
    )
