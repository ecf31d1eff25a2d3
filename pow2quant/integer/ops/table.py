"""Functions of a single tensor, element by element: tables over every code.

Several nodes may make one function, such as x * sigmoid(x); only the last result is rounded. The values are those of
the standard's functions, in float64 where the standard leaves the last bits of float32 open, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant import functions
from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.nodes import attribute, title
from pow2quant.integer.program import Step
from pow2quant.operators import OPERATIONS, Double

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from pow2quant.integer.c_layer import Layer
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Codes, Ints, Program, Tensor

LARGEST = 16
"""A table is made for at most so many bits."""


@dataclass(frozen=True, eq=False)
class Table(Step):
    """y = table[x - low]; table: (codes,) or one row per channel (C, codes), for x of as many channels or of one."""

    table: Ints

    def run(self, program: Program, *inputs: Codes) -> Codes:
        (x,) = inputs
        index = x.astype(np.int64) - program.tensors[self.inputs[0]].low
        if self.table.ndim == 1:
            return self.table[index]
        channel = np.arange(len(self.table)).reshape(-1, *[1] * (x.ndim - 2))
        return self.table[channel, index]

    def emit_c(self, layer: Layer) -> str:
        x, result = layer.input(0), layer.output
        table = layer.typed_array("table", self.table.astype(result.dtype))
        rows, codes = self.table.reshape(-1, self.table.shape[-1]).shape
        count = result.size // rows
        if x.size == result.size:
            layer.overwrites = [x.name]
        if rows == 1:
            return f"for (int32_t i = 0; i < {count}; i++)\n    y[i] = {table.name}[x[i] - {x.low}];"
        place = f"c * {count} + i"
        source = place if x.size == result.size else "i"  # one channel that every row of the table reads
        return (
            f"for (int32_t c = 0; c < {rows}; c++)\n    for (int32_t i = 0; i < {count}; i++)\n"
            f"        y[{place}] = {table.name}[c * {codes} + x[{source}] - {x.low}];"
        ).replace("- -", "+ ")

    def bound(self, program: Program) -> int:
        return int(np.abs(self.table).max())


def lower_defined(graph: Lowering, node: onnx.NodeProto, defined: functions.Lookup) -> None:
    """A node that bears a table. Raises UnsupportedModelError where it is one between other encodings."""
    (x,), target = graph.defined_inputs(node), graph.declare(node.output[0])
    if not defined.fits(x.encoding, target.encoding):
        raise UnsupportedModelError(f"{title(node)}: its table is one between other encodings")
    graph.steps.append(Table(node.name or target.name, (x.name,), target.name, defined.results()))


def lower_function(graph: Lowering, node: onnx.NodeProto, core: onnx.NodeProto, low: float, high: float) -> None:
    """The table of the function that ends at `node`; `core` is the node behind its ReLUs and clips."""
    x, values = values_by_code(graph, core)
    target = graph.declare(node.output[0])
    with np.errstate(over="ignore"):
        values = np.clip(values, low, high).astype(np.float32)
    values = np.nan_to_num(values, nan=np.nan)  # infinite ones saturate, as in every executor
    table = target.encoding.quantize(values, rounding=graph.target.rounding.functions)
    if table.ndim > 1:
        graph.read(x.name)  # one table per channel: only where the channels stand behind the batch
    graph.steps.append(Table(node.name or target.name, (x.name,), target.name, table))


def values_by_code(graph: Lowering, node: onnx.NodeProto) -> tuple[Tensor, NDArray[Any]]:
    """The encoded tensor that a function reads, and the function's value for each of its codes, the least one first.

    (codes,), or (C, codes) behind one parameter per channel. Raises UnsupportedModelError for a function several
    tensors, and of codes too many for a table.
    """
    if len(found := sources(graph, node)) != 1:
        raise UnsupportedModelError(f"{title(node)}: is no function of one encoded tensor, element by element")
    (source,) = found
    x = graph.read(source, rows=True)
    if x.encoding.grid.width > LARGEST:
        raise UnsupportedModelError(f"{title(node)}: a table over {x.encoding.grid.width} bits; at most {LARGEST}")
    real = x.encoding.dequantize(np.arange(x.low, x.high + 1))
    if _is_double(graph, node):
        real = real.astype(np.float64)
    with np.errstate(over="ignore", divide="ignore"):
        return x, np.asarray(_evaluate(graph, node, source, real))


def sources(graph: Lowering, node: onnx.NodeProto) -> set[str]:
    """The encoded tensors that a function reads, through nodes whose results are not rounded.

    Empty where something between is no function, element by element.
    """
    found: set[str] = set()
    for name in filter(None, node.input):
        if name in graph.tensors and graph.tensors[name].constant is None:
            found.add(name)
        elif name not in graph.floats:
            inner = graph.producers.get(name)
            behind = sources(graph, inner) if inner is not None and inner.op_type in SHAPED_LIKE_INPUT else set()
            if not behind:
                return set()
            found |= behind
    return found


def _is_double(graph: Lowering, node: onnx.NodeProto) -> bool:
    """Whether the function is computed in double as a whole: where it has a node that is."""
    row = OPERATIONS.get(node.op_type)
    inner = (graph.producers[n] for n in node.input if n not in graph.tensors and n in graph.producers)
    return (row is not None and row.double is Double.ALWAYS) or any(_is_double(graph, other) for other in inner)


def _evaluate(graph: Lowering, node: onnx.NodeProto, source: str, real: NDArray[np.float32]) -> Any:
    """The node's value for every value of the source: (codes,), or (C, codes) behind one parameter per channel."""
    values = []
    for name in filter(None, node.input):
        if name == source:
            values.append(real)
        elif name in graph.floats:
            values.append(_parameter(graph, node, name))
        else:
            values.append(_evaluate(graph, graph.producers[name], source, real))
    return SHAPED_LIKE_INPUT[node.op_type](node, *values)


def _parameter(graph: Lowering, node: onnx.NodeProto, name: str) -> NDArray[np.float32]:
    """A constant as a scalar, or as (C, 1) where there is one per channel, the first dimension behind the batch."""
    value = graph.floats[name]
    if value.size == 1:
        return value.reshape(())
    rank = len(graph.shape(node.output[0]))
    shape = (1,) * (rank - value.ndim) + value.shape
    if value.size != shape[1] or value.size != graph.shape(node.output[0])[1]:
        raise UnsupportedModelError(f"{title(node)}: {name} is neither a scalar nor one value per channel")
    return value.reshape(-1, 1)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _hard_sigmoid(node: onnx.NodeProto, x: Any) -> Any:
    alpha, beta = (np.float32(attribute(node, name, default)) for name, default in (("alpha", 0.2), ("beta", 0.5)))
    return np.clip(x * alpha + beta, 0, 1)


def _elu(node: onnx.NodeProto, x: Any) -> Any:
    x = x.astype(np.float64)
    return np.where(x > 0, x, attribute(node, "alpha", 1.0) * (np.exp(x) - 1))


def _gelu(node: onnx.NodeProto, x: Any) -> Any:
    x = x.astype(np.float64)
    if attribute(node, "approximate", b"none") == b"tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / np.sqrt(2)))


def _sigmoid(node: onnx.NodeProto, x: Any) -> Any:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def _clip(node: onnx.NodeProto, x: Any, *ends: Any) -> Any:
    """The ends that are given, in their order; a missing lower one has no name."""
    lower = bool(len(node.input) > 1 and node.input[1])
    for bound, function in zip(ends, (np.maximum, np.minimum) if lower else (np.minimum,), strict=False):
        x = function(x, bound)
    return x


SHAPED_LIKE_INPUT: dict[str, Callable[..., Any]] = {
    "Abs": lambda node, x: np.abs(x),
    "Add": lambda node, a, b: a + b,
    "Asinh": lambda node, x: np.arcsinh(x.astype(np.float64)),
    "Atan": lambda node, x: np.arctan(x.astype(np.float64)),
    "Cast": lambda node, x: x.astype(np.float32),
    "Ceil": lambda node, x: np.ceil(x),
    "Clip": _clip,
    "Cos": lambda node, x: np.cos(x.astype(np.float64)),
    "Cosh": lambda node, x: np.cosh(x.astype(np.float64)),
    "Div": lambda node, a, b: a / b,
    "Elu": _elu,
    "Equal": lambda node, a, b: a == b,
    "Erf": lambda node, x: _erf(x.astype(np.float64)),
    "Exp": lambda node, x: np.exp(x.astype(np.float64)),
    "Floor": lambda node, x: np.floor(x),
    "Gelu": _gelu,
    "Greater": lambda node, a, b: a > b,
    "GreaterOrEqual": lambda node, a, b: a >= b,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda node, x: x * np.clip(x * np.float32(1 / 6) + np.float32(0.5), 0, 1),
    "LeakyRelu": lambda node, x: np.where(x < 0, x * np.float32(attribute(node, "alpha", 0.01)), x),
    "Less": lambda node, a, b: a < b,
    "LessOrEqual": lambda node, a, b: a <= b,
    "Log": lambda node, x: np.log(x.astype(np.float64)),
    "Max": lambda node, *values: np.maximum.reduce(np.broadcast_arrays(*values)),
    "Min": lambda node, *values: np.minimum.reduce(np.broadcast_arrays(*values)),
    "Mul": lambda node, a, b: a * b,
    "Neg": lambda node, x: -x,
    "Not": lambda node, x: np.logical_not(x),
    "PRelu": lambda node, x, slope: np.where(x < 0, x * slope, x),
    "Pow": lambda node, a, b: np.power(a.astype(np.float64), b),
    "Relu": lambda node, x: np.maximum(x, 0),
    "Sigmoid": _sigmoid,
    "Round": lambda node, x: np.rint(x),
    "Sign": lambda node, x: np.sign(x),
    "Sin": lambda node, x: np.sin(x.astype(np.float64)),
    "Sinh": lambda node, x: np.sinh(x.astype(np.float64)),
    "Sqrt": lambda node, x: np.sqrt(x.astype(np.float64)),
    "Sub": lambda node, a, b: a - b,
    "Tan": lambda node, x: np.tan(x.astype(np.float64)),
    "Tanh": lambda node, x: np.tanh(x.astype(np.float64)),
    "Where": lambda node, condition, a, b: np.where(condition, a, b),
}
"""The standard's functions by ONNX name; real values in float32, or float64 behind one that is computed so."""
