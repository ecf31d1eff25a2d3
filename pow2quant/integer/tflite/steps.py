"""How each step of a program is written as TFLite operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.integer.ops.average import Average
from pow2quant.integer.ops.convolution import Convolution
from pow2quant.integer.ops.copy import Copy
from pow2quant.integer.ops.dense import Dense
from pow2quant.integer.ops.maximum import Maximum
from pow2quant.integer.ops.product import Product
from pow2quant.integer.ops.sum import Sum
from pow2quant.integer.ops.table import Table
from pow2quant.integer.ops.view import View
from pow2quant.integer.tflite.graph import Graph, offset, physical

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.integer.nodes import Window
    from pow2quant.integer.program import Requantization, Step, Tensor

VALID, SAME = 1, 0
CLIPS = {"NONE": (-math.inf, math.inf), "RELU": (0.0, math.inf), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0)}
"""Activations that an operator can have, by the schema's name, and their ends."""


def write(graph: Graph, step: Step) -> None:
    """Adds a step's operators. Raises UnsupportedModelError, naming the node, for one that TFLite does not have."""
    writer = WRITERS.get(type(step))
    if writer is None:
        raise step.refused(f"{type(step).__name__.lower()} is not written to TFLite")
    writer(graph, step)


def _activation(graph: Graph, step: Any) -> int:
    """The fused activation that clips a step's codes as its requantization does."""
    rule: Requantization = step.requantization
    result = graph.program.tensors[step.output]
    for name, ends in CLIPS.items():
        codes = [
            min(max(result.zero + round(math.ldexp(end, -result.exponent)), result.low), result.high)
            if math.isfinite(end)
            else code
            for end, code in zip(ends, (result.low, result.high), strict=True)
        ]
        if codes == [rule.low, rule.high]:
            return int(getattr(graph.s.ActivationFunctionType, name))
    raise step.refused(f"clips codes to {rule.low} to {rule.high}; TFLite has ReLU, ReLU6 and [-1, 1]")


def _scales(x: Tensor, result: Tensor, rule: Requantization) -> list[float]:
    """The scales of a weight, from the shift behind it: k_w = k_out - shift - k_in."""
    return [2.0 ** int(k) for k in np.atleast_1d(result.exponent - rule.shift - x.exponent)]


def _biases(graph: Graph, step: Any, bias: NDArray[np.int64], scales: list[float], x: Tensor) -> int:
    if np.abs(bias).max(initial=0) >= 2**31:
        raise step.refused("a bias beyond 32 bits")
    return graph.constant(f"{step.output}.bias", bias.astype(np.int32), [s * 2.0**x.exponent for s in scales])


def _map(graph: Graph, name: str, window: Window) -> int:
    """A tensor as a map (1, H, W, C); one-dimensional maps (C, L) have a height of 1."""
    tensor = graph.program.tensors[name]
    if len(tensor.shape) == 3:
        return graph.activation(name)
    height, width = window.size
    channels = tensor.size // (height * width)
    moved = graph.transposed(graph.activation(name), (0, 2, 1), tensor)
    return graph.reshaped(moved, (1, height, width, channels), tensor)


def _result(graph: Graph, step: Any, window: Window) -> int:
    """The tensor for a step's map (1, H, W, C)."""
    tensor = graph.program.tensors[step.output]
    if len(tensor.shape) == 3:
        return graph.activation(step.output)
    shape = (1, *window.result, tensor.size // math.prod(window.result))
    return graph.encoded(tensor, shape, f"{step.output}.map")


def _finish(graph: Graph, step: Any, index: int) -> None:
    """A one-dimensional map becomes the step's output (C, L) again; others are there."""
    tensor = graph.program.tensors[step.output]
    if len(tensor.shape) != 3:
        channels = graph.shape(index)[-1]
        flat = graph.reshaped(index, (1, tensor.size // channels, channels), tensor)
        graph.put(graph.reshaped(graph.transposed(flat, (0, 2, 1), tensor), (1, *tensor.shape), tensor), step.output)


def _padded(graph: Graph, x: int, window: Window, like: Tensor, fill: int | None = None) -> tuple[int, int]:
    """The map with what the window reads beyond its ends, and how the operator pads then. fill: None for real zero."""
    pads = [(a, max(b, 0)) for a, b in zip(window.before, window.after, strict=True)]
    if not any(p for pair in pads for p in pair):
        return x, VALID
    reach = [d * (k - 1) for d, k in zip(window.dilations, window.kernel, strict=True)]
    centred = [(r // 2, r - r // 2) for r in reach]
    if window.strides == (1, 1) and pads == centred and fill is None:
        return x, SAME
    shape = graph.shape(x)
    padded = [shape[0], *(n + a + b for n, (a, b) in zip(shape[1:3], pads, strict=True)), shape[3]]
    return _pad(graph, x, [(0, 0), *pads, (0, 0)], padded, like, fill), VALID


def _pad(
    graph: Graph, x: int, pads: list[tuple[int, int]], shape: list[int], like: Tensor, fill: int | None = None
) -> int:
    name = f"{graph.tensors[x].name}.padded{len(graph.tensors)}"
    table = graph.constant(f"{name}.pads", np.array(pads, np.int32))
    made = graph.encoded(like, shape, name)
    if fill is None:
        return graph.operator("PAD", [x, table], made, graph.options("Pad"))
    value = graph.encoded(like, (1,), f"{name}.fill")
    graph.tensors[value].buffer = graph._store(np.array([fill - offset(like)], np.int8))
    return graph.operator("PADV2", [x, table, value], made, graph.options("PadV2"))


def _window_options(window: Window, padding: int) -> dict[str, Any]:
    strides = {"strideH": window.strides[0], "strideW": window.strides[1], "padding": padding}
    return strides | {"dilationHFactor": window.dilations[0], "dilationWFactor": window.dilations[1]}


def _convolution(graph: Graph, step: Convolution) -> None:
    x, result = (graph.program.tensors[name] for name in (step.inputs[0], step.output))
    scales = _scales(x, result, step.requantization)
    _convolve(graph, step, step.weight, step.bias, step.groups, scales, _activation(graph, step))


def _convolve(
    graph: Graph,
    step: Any,
    weight: NDArray[np.int64],
    bias: NDArray[np.int64],
    groups: int,
    scales: list[float],
    activation: int,
) -> None:
    """A convolution; weight (C_out, C_in / groups, kernel height, kernel width)."""
    x, window = graph.program.tensors[step.inputs[0]], step.window
    if np.abs(weight).max(initial=0) > 128 or weight.max(initial=0) > 127:
        raise step.refused("weights beyond 8 bits")
    source, padding = _padded(graph, _map(graph, step.inputs[0], window), window, x)
    options = _window_options(window, padding) | {"fusedActivationFunction": activation}
    depthwise = weight.shape[1] == 1 and groups > 1
    axes, axis = ((1, 2, 3, 0), 3) if depthwise else ((0, 2, 3, 1), 0)
    values = np.ascontiguousarray(weight.transpose(axes)).astype(np.int8)
    inputs = [source, graph.constant(f"{step.output}.weight", values, scales, axis)]
    inputs.append(_biases(graph, step, bias, scales, x))
    made = _result(graph, step, window)
    if depthwise:
        multiplier = len(weight) // groups
        graph.operator(
            "DEPTHWISE_CONV_2D", inputs, made, graph.options("DepthwiseConv2D", depthMultiplier=multiplier, **options)
        )
    else:
        graph.operator("CONV_2D", inputs, made, graph.options("Conv2D", **options))
    _finish(graph, step, made)


def _dense(graph: Graph, step: Dense) -> None:
    x, result = (graph.program.tensors[name] for name in (step.inputs[0], step.output))
    if np.abs(step.weight).max(initial=0) > 128 or step.weight.max(initial=0) > 127:
        raise step.refused("weights beyond 8 bits")
    scales = _scales(x, result, step.requantization)
    weight = graph.constant(f"{step.output}.weight", step.weight.astype(np.int8), scales)
    source = graph.channels_first(step.inputs[0]) if len(x.shape) == 3 else graph.activation(step.inputs[0])
    made = graph.encoded(result, (1, *result.shape), step.output)
    options = graph.options(
        "FullyConnected", fusedActivationFunction=_activation(graph, step), keepNumDims=len(result.shape) > 1
    )
    graph.operator("FULLY_CONNECTED", [source, weight, _biases(graph, step, step.bias, scales, x)], made, options)
    graph.put(made, step.output)


def _two(op: str, kind: str) -> Callable[[Graph, Any], None]:
    def write(graph: Graph, step: Any) -> None:
        inputs = [graph.activation(name) for name in step.inputs]
        made = graph.activation(step.output)
        graph.operator(op, inputs, made, graph.options(kind, fusedActivationFunction=_activation(graph, step)))

    return write


def _sum(graph: Graph, step: Sum) -> None:
    _two("SUB", "Sub")(graph, step) if step.subtracts else _two("ADD", "Add")(graph, step)


def _average(graph: Graph, step: Average) -> None:
    """A mean over whole rows, or a convolution with equal weights 2^-n."""
    x, window, counts = graph.program.tensors[step.inputs[0]], step.window, np.unique(step.counts)
    area = math.prod(window.kernel)
    if len(counts) > 1 or counts[0] != area:
        raise step.refused("an average whose divisor is not the number of its window's values")
    padded = any(max(p, 0) for p in (*window.before, *window.after))
    if math.prod(window.result) == 1 and not padded:
        _mean(graph, step, x.size // area, area)
        return
    if area & (area - 1) or padded:
        raise step.refused("an average of windows whose size is no power of two, or that are padded")
    channels = x.size // math.prod(window.size)
    ones = np.ones((channels, 1, *window.kernel), np.int64)
    scales = [1.0 / area] * channels
    _convolve(graph, step, ones, np.zeros(channels, np.int64), channels, scales, _activation(graph, step))


def _mean(graph: Graph, step: Average, rows: int, length: int) -> None:
    """The mean of every row of `length` codes, which are the channels of a map (1, 1, length, rows)."""
    x, result = (graph.program.tensors[name] for name in (step.inputs[0], step.output))
    _activation(graph, step)
    if x.shape[:1] == (rows,) and len(x.shape) == 3:
        source = graph.activation(x.name)
    else:
        listed = graph.reshaped(graph.channels_first(x.name), (1, rows, length), x)
        source = graph.reshaped(graph.transposed(listed, (0, 2, 1), x), (1, 1, length, rows), x)
    axes = graph.constant(f"{step.output}.axes", np.array([1, 2], np.int32))
    made = graph.encoded(result, (1, 1, 1, rows), f"{step.output}.mean")
    graph.operator("MEAN", [source, axes], made, graph.options("Reducer", keepDims=True))
    if result.shape[:1] == (rows,):
        graph.known[step.output] = graph.reshaped(made, physical(result.shape), result)
    else:
        graph.put(graph.reshaped(made, (1, *result.shape), result), step.output)


def _maximum(graph: Graph, step: Maximum) -> None:
    x, window = graph.program.tensors[step.inputs[0]], step.window
    if window.dilations != (1, 1):
        raise step.refused("a dilated maximum")
    source, padding = _padded(graph, _map(graph, step.inputs[0], window), window, x, fill=x.low)
    options = graph.options(
        "Pool2D",
        padding=padding,
        strideH=window.strides[0],
        strideW=window.strides[1],
        filterHeight=window.kernel[0],
        filterWidth=window.kernel[1],
    )
    made = _result(graph, step, window)
    graph.operator("MAX_POOL_2D", [source], made, options)
    _finish(graph, step, made)


def _view(graph: Graph, step: View) -> None:
    result = graph.program.tensors[step.output]
    graph.put(graph.reshaped(graph.channels_first(step.inputs[0]), (1, *result.shape), result), step.output)


def _copy(graph: Graph, step: Copy) -> None:
    """A Concat, or any other movement of one tensor's codes by their indices; requantized in front where it has to."""
    result = graph.program.tensors[step.output]
    axis = _concatenated(graph, step)
    if axis is not None:
        sources = [_requantized(graph, step, graph.activation(step.inputs[p.input]), p) for p in step.parts]
        if len(sources) == 1:
            graph.known[step.output] = sources[0]
            return
        place = {0: 3, 1: 1, 2: 2}[axis] if len(result.shape) == 3 else axis + 1
        options = graph.options("Concatenation", axis=place)
        graph.operator("CONCATENATION", sources, graph.activation(step.output), options)
        return
    if len({part.input for part in step.parts}) > 1 or any(p.requantization for p in step.parts):
        raise step.refused("this movement of codes is not written to TFLite")
    x = graph.program.tensors[step.inputs[step.parts[0].input]]
    if x.constant is not None:
        raise step.refused("moves a constant")
    pads = _pads(step, x, result)
    if pads is not None:
        axes = (1, 2, 0) if len(x.shape) == 3 else range(len(x.shape))
        ordered = [(0, 0), *(pads[axis] for axis in axes)]
        graph.known[step.output] = _pad(
            graph, graph.activation(x.name), ordered, list(physical(result.shape)), x, step.fill
        )
        return
    flat = graph.reshaped(graph.channels_first(x.name), (1, x.size), x)
    if step.fill is not None:
        flat = _pad(graph, flat, [(0, 0), (0, 1)], [1, x.size + 1], x, step.fill)
    places = np.full(result.size, x.size, np.int32)
    for part in step.parts:
        read, written = part.indices
        places[written] = read
    name = f"{step.output}.moved"
    made = graph.encoded(result, (1, result.size), name)
    graph.operator("GATHER", [flat, graph.constant(f"{name}.places", places)], made, graph.options("Gather", axis=1))
    graph.put(graph.reshaped(made, (1, *result.shape), result), step.output)


def _pads(step: Copy, x: Tensor, result: Tensor) -> list[tuple[int, int]] | None:
    """What stands in front of and behind a whole tensor, by dimension; None where the step does something else."""
    (part,) = step.parts[:1]
    read, written = part.indices
    if step.fill is None or len(step.parts) > 1 or len(x.shape) != len(result.shape) or len(read) != x.size:
        return None
    starts = np.unravel_index(written[read.argmin()], result.shape)
    pads = [(int(a), n - int(a) - m) for a, n, m in zip(starts, result.shape, x.shape, strict=True)]
    if any(after < 0 for _, after in pads):
        return None
    box = tuple(slice(before, before + m) for (before, _), m in zip(pads, x.shape, strict=True))
    inside = np.arange(result.size).reshape(result.shape)[box].ravel()
    return pads if np.array_equal(written[np.argsort(read)], inside) else None


def _requantized(graph: Graph, step: Copy, index: int, part: Any) -> int:
    """An operand on the result's grid."""
    result, rule = graph.program.tensors[step.output], part.requantization
    if rule is None:
        return index
    if (rule.low, rule.high) != (result.low, result.high):
        raise step.refused("a clip of its own")
    made = graph.encoded(result, graph.shape(index), f"{step.output}.requantized{len(graph.tensors)}")
    return graph.operator("QUANTIZE", [index], made, graph.options("Quantize"))


def _concatenated(graph: Graph, step: Copy) -> int | None:
    """The axis (without the batch) along which the parts lie one behind the other, each a whole tensor; None else."""
    tensors = graph.program.tensors
    result = tensors[step.output]
    whole = np.arange(result.size).reshape(result.shape)
    for axis in range(len(result.shape)):
        start, fits = 0, True
        for part in step.parts:
            x = tensors[step.inputs[part.input]]
            length = x.shape[axis] if len(x.shape) == len(result.shape) else -1
            expected = np.moveaxis(np.moveaxis(whole, axis, 0)[start : start + length], 0, axis)
            read, written = part.indices
            fits = fits and length > 0 and x.constant is None and expected.shape == x.shape
            fits = fits and np.array_equal(written[np.argsort(read)], expected.ravel()) and len(read) == x.size
            start += length
        if fits and start == result.shape[axis]:
            return axis
    return None


def _table(graph: Graph, step: Table) -> None:
    """A function's table, looked up by code."""
    x, result = (graph.program.tensors[name] for name in (step.inputs[0], step.output))
    if step.table.ndim > 1:
        raise step.refused("one table per channel")
    source, name = graph.activation(x.name), f"{step.output}.code"
    shape = graph.shape(source)
    wide = graph.operator(
        "CAST",
        [source],
        graph.integers(name, shape),
        graph.options("Cast", inDataType=graph.s.TensorType.INT8, outDataType=graph.s.TensorType.INT32),
    )
    lowest = graph.constant(f"{name}.lowest", np.array([128], np.int32))
    place = graph.operator("ADD", [wide, lowest], graph.integers(f"{name}.place", shape), graph.options("Add"))
    values = graph.encoded(result, (256,), f"{step.output}.table")
    graph.tensors[values].buffer = graph._store((step.table - offset(result)).astype(np.int8))
    graph.operator("GATHER", [values, place], graph.activation(step.output), graph.options("Gather", axis=0))


WRITERS: dict[type, Callable[[Graph, Any], None]] = {
    Average: _average,
    Convolution: _convolution,
    Copy: _copy,
    Dense: _dense,
    Maximum: _maximum,
    Product: _two("MUL", "Mul"),
    Sum: _sum,
    Table: _table,
    View: _view,
}
"""What writes a step, by its class."""
