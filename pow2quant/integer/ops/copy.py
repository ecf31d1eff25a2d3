"""Operations that only move codes: Concat, Transpose, Slice, Gather, Split, Pad, Resize (nearest), DepthToSpace."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.c_layer import Loops, nested
from pow2quant.integer.c_text import braced
from pow2quant.integer.nodes import attribute, title
from pow2quant.integer.ops import embedding
from pow2quant.integer.program import Requantization, Step

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Ints, Program, Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """Nested loops that read an input at `start` + sum of i * stride and write the output likewise.

    input: which of the step's. loops: (count, stride in the input, stride in the output), outermost first.
    requantization: where the codes change on the way; None where they are copied as they are.
    """

    input: int
    loops: tuple[tuple[int, ...], ...]
    read_start: int
    write_start: int
    requantization: Requantization | None = field(default=None)

    @classmethod
    def of(
        cls, input: int, read: NDArray[np.int64], write: NDArray[np.int64], requantization: Requantization | None = None
    ) -> Part:
        """From two views of equal shape of the input's and the output's flat indices."""
        assert read.shape == write.shape
        assert read.size
        return cls(input, tuple(nested([read, write])), int(read.flat[0]), int(write.flat[0]), requantization)

    @cached_property
    def indices(self) -> tuple[Ints, Ints]:
        """Flat indices into the input and into the output, in the order of the loops."""
        read, write = np.array([self.read_start]), np.array([self.write_start])
        for count, r, w in self.loops:
            steps = np.arange(count)
            read = (read[:, None] + steps * r).ravel()
            write = (write[:, None] + steps * w).ravel()
        return read, write

    def emit_c(self, layer: Layer) -> str:
        """Lines that move the codes."""
        loops = Loops(list(self.loops) or [(1, 1, 1)], [self.read_start, self.write_start])
        if self.requantization is None:
            return layer.moves(self.input, loops)
        bound = layer.input(self.input).magnitude

        def term(kind: str, place: str) -> str:
            return layer.value(self.input, kind, place)

        return layer.elementwise(loops, term, self.requantization, bound)


@dataclass(frozen=True, eq=False)
class Copy(Step):
    """Moves codes from the inputs to their places in the output; fill: the code of what no part writes."""

    parts: tuple[Part, ...]
    fill: int | None = None

    @classmethod
    def whole(cls, node: str, source: Tensor, target: Tensor, requantization: Requantization) -> Copy:
        """Every code to the same place."""
        everything = np.arange(source.size)
        part = Part.of(0, everything, everything, requantization)
        return cls(node, (source.name,), target.name, (part,))

    def run(self, program: Program, *inputs: Codes) -> Codes:
        result = program.tensors[self.output]
        activations = [x for x, name in zip(inputs, self.inputs, strict=True) if program.tensors[name].constant is None]
        codes = np.full((len(activations[0]), result.size), self.fill or 0, result.dtype)
        for part in self.parts:
            tensor, x = program.tensors[self.inputs[part.input]], inputs[part.input]
            read, write = part.indices
            moved = x.reshape(1 if tensor.constant is not None else len(x), -1)[:, read]
            if part.requantization is not None:
                moved = part.requantization(moved.astype(np.int64) - tensor.zero)
            codes[:, write] = moved
        return codes

    def emit_c(self, layer: Layer) -> str:
        size, lines = layer.output.size, []
        if self.fill is not None and sum(len(part.indices[0]) for part in self.parts) < size:
            lines.append(f"for (int32_t i = 0; i < {size}; i++)\n    y[i] = {self.fill};")
        blocks = [part.emit_c(layer) for part in self.parts]
        return "\n".join(lines + (blocks if len(blocks) == 1 else [braced(block) for block in blocks]))

    def bound(self, program: Program) -> int:
        bounds = [program.tensors[name].magnitude for name in self.inputs]
        shifts = [0 if p.requantization is None else max(0, -int(p.requantization.shift)) for p in self.parts]
        return max(bounds[part.input] << shift for part, shift in zip(self.parts, shifts, strict=True))


Move = tuple["NDArray[np.int64]", "NDArray[np.int64]"]
"""Views of the input's and the output's flat indices, of equal shape; the first dimension is a batch of one."""


def lower_concat(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Concat, each input requantized where its encoding is another."""
    sources = [graph.operand(name, rows=True) for name in node.input]
    target = graph.declare(output)
    rank = len(graph.shape(node.output[0]))
    front = rank - len(target.shape)
    axis = attribute(node, "axis", 0) % rank - front
    whole = np.arange(target.size).reshape(target.shape)
    parts, start = [], 0
    for i, source in enumerate(sources):
        shape = source.shape[front:] if len(source.shape) == rank else source.shape  # a constant has a batch of one
        place: list[slice] = [slice(None)] * axis
        write = whole[(*place, slice(start, start + shape[axis]))]
        read = np.arange(source.size).reshape(shape)
        parts.append(Part.of(i, read, write, passing(graph, source, target, low, high)))
        start += shape[axis]
    names = tuple(source.name for source in sources)
    graph.steps.append(Copy(node.name or output, names, output, tuple(parts)))


def passing(graph: Lowering, source: Tensor, target: Tensor, low: float, high: float) -> Requantization | None:
    """How codes become those of another tensor; None where they pass unchanged."""
    rule = graph.requantization(source.exponent, target, low, high)
    idle = not rule.shift.any() and source.zero == rule.zero and rule.low <= source.low and source.high <= rule.high
    return None if idle else rule


def _flat(shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int64).reshape(shape)


def _move(
    graph: Lowering, node: onnx.NodeProto, output: str, ends: tuple[float, float], move: Move, fill: int | None = None
) -> None:
    """Adds a copy of the first input; `move` sees shapes with their batch of one."""
    source, target = graph.read(node.input[0], rows=True), graph.declare(output)
    requantization = passing(graph, source, target, *ends)
    part = Part.of(0, *move, requantization)
    graph.steps.append(Copy(node.name or output, (source.name,), output, (part,), fill=fill))


def lower_transpose(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Transpose."""
    shape = graph.shape(node.input[0])
    order = attribute(node, "perm", list(reversed(range(len(shape)))))
    view = _flat(shape).transpose(order)
    _move(graph, node, output, (low, high), (view, _flat(view.shape)))


def lower_slice(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Slice with constant bounds, which may run backwards."""
    shape = graph.shape(node.input[0])
    starts, ends, axes, steps = (_constants(graph, node, i) for i in range(1, 5))
    axes = list(range(len(starts or []))) if axes is None else axes
    steps = [1] * len(axes) if steps is None else steps
    cut: list[slice] = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts or [], ends or [], axes, steps, strict=True):
        length = shape[axis]
        # ONNX clamps; in Python an end below -length that is reached backwards has to be None
        stop = None if step < 0 and end < -length else end
        cut[axis] = slice(start, stop, step)
    view = _flat(shape)[tuple(cut)]
    _move(graph, node, output, (low, high), (view, _flat(view.shape)))


def lower_split(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Split: one copy for every result that is read."""
    shape = graph.shape(node.input[0])
    axis = attribute(node, "axis", 0) % len(shape)
    start = 0
    for name in node.output:
        length = graph.shape(name)[axis]
        if name in graph.encodings:
            view = _flat(shape)[(slice(None),) * axis + (slice(start, start + length),)]
            _move(graph, node, name, (low, high), (view, _flat(view.shape)))
        start += length


def lower_gather(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Gather with constant indices: a copy for every run of indices that are equally far apart; or an embedding."""
    if node.input[0] in graph.floats:
        embedding.lower(graph, node, output, low, high)
        return
    shape, indices = graph.shape(node.input[0]), graph.floats.get(node.input[1])
    axis = attribute(node, "axis", 0) % len(shape)
    if indices is None or indices.ndim > 1:
        raise UnsupportedModelError(f"{title(node)}: only constant places, in one dimension")
    source, target = graph.read(node.input[0], rows=True), graph.declare(output)
    rule = passing(graph, source, target, low, high)
    places = np.atleast_1d(indices).astype(np.int64) % shape[axis]
    full = _flat((*shape[:axis], len(places), *shape[axis + 1 :]))
    before = (slice(None),) * axis
    parts = []
    for start, stop in _runs(places):
        run = places[start:stop]
        step = int(run[1] - run[0]) if len(run) > 1 else 1
        first, last = int(run[0]), int(run[-1]) + (1 if step >= 0 else -1)
        if step == 0:
            one = _flat(shape)[(*before, slice(first, first + 1))]
            read = np.broadcast_to(one, full[(*before, slice(start, stop))].shape)
        else:
            read = _flat(shape)[(*before, slice(first, None if last < 0 else last, step))]
        parts.append(Part.of(0, read, full[(*before, slice(start, stop))], rule))
    graph.steps.append(Copy(node.name or output, (source.name,), output, tuple(parts)))


def _runs(places: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Where runs of places begin and end that are equally far apart."""
    runs, start = [], 0
    while start < len(places):
        stop = min(start + 2, len(places))
        while stop < len(places) and places[stop] - places[stop - 1] == places[start + 1] - places[start]:
            stop += 1
        runs.append((start, stop))
        start = stop
    return runs


def lower_pad(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Pad with a constant. Negative pads cut."""
    shape = graph.shape(node.input[0])
    value = graph.floats.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
    if attribute(node, "mode", b"constant") != b"constant" or value is None:
        raise UnsupportedModelError(f"{title(node)}: pads with something else than a constant")
    pads, axes = _constants(graph, node, 1) or [], _constants(graph, node, 3)
    axes = list(range(len(shape))) if axes is None else [a % len(shape) for a in axes]
    before, after = ([0] * len(shape) for _ in range(2))
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[len(axes) + i]
    read = _flat(shape)[tuple(slice(max(0, -b), n - max(0, -a)) for b, a, n in zip(before, after, shape, strict=True))]
    full = tuple(n + b + a for n, b, a in zip(shape, before, after, strict=True))
    write = _flat(full)[tuple(slice(max(0, b), n - max(0, a)) for b, a, n in zip(before, after, full, strict=True))]
    encoding = graph.declare(output).encoding
    fill = int(encoding.quantize(np.float32(np.clip(value, low, high))))
    _move(graph, node, output, (low, high), (read, write), fill)


def fills_exactly(graph: Lowering, node: onnx.NodeProto) -> bool:
    """Whether a code of the input's encoding is exactly what a Pad puts around it; true of what is no Pad."""
    if node.op_type != "Pad" or len(node.input) < 3 or not node.input[2]:
        return True
    value, encoding = graph.floats.get(node.input[2]), graph.tensors[node.input[0]].encoding
    return value is not None and bool((encoding.dequantize(encoding.quantize(value)) == value).all())


def lower_resize(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Resize that repeats every value a whole number of times."""
    shape, full = graph.shape(node.input[0]), graph.shape(output if output in graph.shapes else node.output[0])
    factors = [b // a for a, b in zip(shape, full, strict=True)]
    mode, place, rounding = (
        attribute(node, name, default).decode()
        for name, default in (
            ("mode", b"nearest"),
            ("coordinate_transformation_mode", b"half_pixel"),
            ("nearest_mode", b"round_prefer_floor"),
        )
    )
    repeats = (place, rounding) == ("asymmetric", "floor") or (place == "half_pixel" and rounding.startswith("round"))
    if len(node.input) > 2 and node.input[2]:
        scales = graph.floats.get(node.input[2])
        repeats = repeats and scales is not None and (not scales.size or scales.tolist() == factors)
    if mode != "nearest" or not repeats or [a * f for a, f in zip(shape, factors, strict=True)] != list(full):
        raise UnsupportedModelError(f"{title(node)}: only nearest neighbours by whole factors have integers")
    split = [n for pair in zip(shape, factors, strict=True) for n in pair]
    read = np.broadcast_to(_flat(shape).reshape([n for a in shape for n in (a, 1)]), split)
    _move(graph, node, output, (low, high), (read, _flat(full).reshape(split)))


def lower_depth_to_space(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """DepthToSpace, in both modes."""
    n, c, h, w = graph.shape(node.input[0])
    b = attribute(node, "blocksize", 1)
    if attribute(node, "mode", b"DCR") == b"DCR":
        read = _flat((n, b, b, c // b**2, h, w)).transpose(0, 3, 4, 1, 5, 2)
    else:
        read = _flat((n, c // b**2, b, b, h, w)).transpose(0, 1, 4, 2, 5, 3)
    _move(graph, node, output, (low, high), (read, _flat((n, c // b**2, h, b, w, b))))


def _constants(graph: Lowering, node: onnx.NodeProto, index: int) -> list[Any] | None:
    """An input's integers. Raises UnsupportedModelError for a computed one; None where it is left out."""
    if len(node.input) <= index or not node.input[index]:
        return None
    if node.input[index] not in graph.floats:
        raise UnsupportedModelError(f"{title(node)}: {node.input[index]} is computed, not constant")
    return [int(v) for v in graph.floats[node.input[index]].ravel()]


def lower_expand(graph: Lowering, node: onnx.NodeProto, output: str, low: float, high: float) -> None:
    """Expand: a constant stays one, and its readers repeat it for the batch; of another tensor codes are copied."""
    source, target = graph.operand(node.input[0], rows=True), graph.declare(output)
    full = graph.shape(node.output[0])
    if source.constant is not None and source.encoding == target.encoding and (low, high) == (-math.inf, math.inf):
        graph.tensors[output] = replace(target, shape=full, constant=np.broadcast_to(source.constant, full))
        return
    shape = graph.shape(node.input[0])
    _move(graph, node, output, (low, high), (np.broadcast_to(_flat(shape), full), _flat(full)))
