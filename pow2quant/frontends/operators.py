"""Every operation that a prepared network may hold: how it is quantized, and how it is written as ONNX.

A new operation is one row of `OPERATORS` and, where PyTorch has no module for it, one class in `modules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from torch import nn

from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends import modules as m
from pow2quant.operators import OPERATIONS, Kind

OPSET = 21


@dataclass
class OnnxGraph:
    """An ONNX graph under construction."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def node(self, op: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> None:
        """Appends a node with one result."""
        self.nodes.append(onnx.helper.make_node(op, list(inputs), [output], name=name, **attributes))

    def constant(self, name: str, value: ArrayLike) -> str:
        """Adds an initializer and returns its name."""
        self.initializers.append(onnx.numpy_helper.from_array(np.array(value), name))
        return name


@dataclass(frozen=True)
class Node:
    """What an emitter needs to know of a node: names as in ONNX, shapes (of any one batch) as in PyTorch."""

    name: str
    inputs: tuple[str, ...]
    output: str
    shapes: tuple[tuple[int, ...], ...]
    parameters: dict[str, str]


Emit = Callable[[Any, Node, OnnxGraph], None]


@dataclass(frozen=True)
class Operator:
    """A row: which ONNX operation a module is (of several, the one that is quantized), and how it is written."""

    onnx: str
    emit: Emit

    @property
    def kind(self) -> Kind:
        """How it treats encodings."""
        return OPERATIONS[self.onnx].kind


def operator(module: nn.Module) -> Operator | None:
    """The row of a module's exact type, or None."""
    return OPERATORS.get(type(module))


def weight_axis(module: nn.Module) -> int | None:
    """The output-channel axis of a weighted module's weight; None where one scale per channel is not expressible."""
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        return 1 if module.groups == 1 else None
    return 0


def _plain(op: str, **attributes: Any) -> Emit:
    return lambda module, node, graph: graph.node(op, node.inputs, node.output, node.name, **attributes)


def _weighted_inputs(node: Node) -> list[str]:
    return [
        node.inputs[0],
        node.parameters["weight"],
        *([node.parameters["bias"]] if "bias" in node.parameters else []),
    ]


def _pads(before: Sequence[int], after: Sequence[int]) -> list[int]:
    return [int(p) for p in (*before, *after)]


def conv_pads(module: nn.Conv1d | nn.Conv2d) -> tuple[list[int], list[int]]:
    """Zeros in front of and behind every spatial dimension, also for padding="same"."""
    if module.padding == "valid":
        return [0] * len(module.kernel_size), [0] * len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [t // 2 for t in total], [t - t // 2 for t in total]
    pads = [int(p) for p in module.padding]
    return pads, pads


def _conv(module: nn.Conv2d, node: Node, graph: OnnxGraph) -> None:
    graph.node(
        "Conv",
        _weighted_inputs(node),
        node.output,
        node.name,
        kernel_shape=list(module.kernel_size),
        strides=list(module.stride),
        pads=_pads(*conv_pads(module)),
        dilations=list(module.dilation),
        group=module.groups,
    )


def _conv_transpose(module: nn.ConvTranspose2d, node: Node, graph: OnnxGraph) -> None:
    pads = [int(p) for p in module.padding]
    graph.node(
        "ConvTranspose",
        _weighted_inputs(node),
        node.output,
        node.name,
        kernel_shape=list(module.kernel_size),
        strides=list(module.stride),
        pads=_pads(pads, pads),
        output_padding=[int(p) for p in module.output_padding],
        dilations=list(module.dilation),
        group=module.groups,
    )


def _linear(module: nn.Linear, node: Node, graph: OnnxGraph) -> None:
    graph.node("Gemm", _weighted_inputs(node), node.output, node.name, transB=1)


def _tuple(value: Any, n: int) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)] * n


def _pool(op: str, spatial: int) -> Emit:
    def emit(module: Any, node: Node, graph: OnnxGraph) -> None:
        kernel = _tuple(module.kernel_size, spatial)
        pads = _tuple(module.padding, spatial)
        attributes: dict[str, Any] = {
            "kernel_shape": kernel,
            "strides": _tuple(module.stride if module.stride is not None else kernel, spatial),
            "pads": _pads(pads, pads),
            "ceil_mode": int(module.ceil_mode),
        }
        if op == "MaxPool":
            attributes["dilations"] = _tuple(module.dilation, spatial)
        else:
            # Without padding it means nothing, but onnxruntime's kernel then also counts what lies beyond the map.
            attributes["count_include_pad"] = int(module.count_include_pad and any(pads))
        graph.node(op, node.inputs, node.output, node.name, **attributes)

    return emit


def _clip(low: float, high: float) -> Emit:
    return lambda module, node, graph: _emit_clip(low, high, node, graph)


def _emit_clip(low: float, high: float, node: Node, graph: OnnxGraph) -> None:
    bounds = [graph.constant(f"{node.name}.{n}", np.float32(v)) for n, v in (("min", low), ("max", high))]
    graph.node("Clip", [node.inputs[0], *bounds], node.output, node.name)


def _hardtanh(module: nn.Hardtanh, node: Node, graph: OnnxGraph) -> None:
    _emit_clip(module.min_val, module.max_val, node, graph)


def _silu(module: nn.SiLU, node: Node, graph: OnnxGraph) -> None:
    graph.node("Sigmoid", node.inputs, f"{node.name}.sigmoid", f"{node.name}.sigmoid")
    graph.node("Mul", [node.inputs[0], f"{node.name}.sigmoid"], node.output, node.name)


def _gelu(module: nn.GELU, node: Node, graph: OnnxGraph) -> None:
    graph.node("Gelu", node.inputs, node.output, node.name, approximate=module.approximate)


def _leaky_relu(module: nn.LeakyReLU, node: Node, graph: OnnxGraph) -> None:
    graph.node("LeakyRelu", node.inputs, node.output, node.name, alpha=module.negative_slope)


def _elu(module: nn.ELU, node: Node, graph: OnnxGraph) -> None:
    graph.node("Elu", node.inputs, node.output, node.name, alpha=module.alpha)


def _prelu(module: nn.PReLU, node: Node, graph: OnnxGraph) -> None:
    slope = module.weight.detach().cpu().numpy()
    shape = (-1, *[1] * (len(node.shapes[0]) - 2)) if slope.size > 1 else (1,)
    graph.node(
        "PRelu", [node.inputs[0], graph.constant(f"{node.name}.slope", slope.reshape(shape))], node.output, node.name
    )


def _softmax(module: nn.Softmax, node: Node, graph: OnnxGraph) -> None:
    graph.node("Softmax", node.inputs, node.output, node.name, axis=module.dim)


def _layer_norm(module: nn.LayerNorm, node: Node, graph: OnnxGraph) -> None:
    inputs = [node.inputs[0]]
    for name in ("weight", "bias"):
        value = getattr(module, name)
        if value is not None:
            inputs.append(graph.constant(f"{node.name}.{name}", value.detach().cpu().numpy()))
        elif name == "weight":
            inputs.append(graph.constant(f"{node.name}.{name}", np.ones(module.normalized_shape, np.float32)))
    axis = -len(module.normalized_shape)
    graph.node("LayerNormalization", inputs, node.output, node.name, axis=axis, epsilon=module.eps)


def _scale(module: m.Scale, node: Node, graph: OnnxGraph) -> None:
    current = node.inputs[0]
    steps = [("Mul", "factor", float(module.factor), 1.0), ("Add", "offset", float(module.offset), 0.0)]
    wanted = [s for s in steps if s[2] != s[3]] or steps[:1]
    for op, label, value, _ in wanted:
        last = op == wanted[-1][0]
        result = node.output if last else f"{node.name}.scaled"
        constant = graph.constant(f"{node.name}.{label}", np.float32(value))
        graph.node(op, [current, constant], result, node.name if last else f"{node.name}.{label}")
        current = result


def _concat(module: m.Concat, node: Node, graph: OnnxGraph) -> None:
    graph.node("Concat", node.inputs, node.output, node.name, axis=module.dim)


def _mean(module: m.Mean, node: Node, graph: OnnxGraph) -> None:
    axes = graph.constant(f"{node.name}.axes", np.array(module.dims, np.int64))
    graph.node("ReduceMean", [node.inputs[0], axes], node.output, node.name, keepdims=int(module.keepdim))


def _flatten(module: nn.Flatten, node: Node, graph: OnnxGraph) -> None:
    graph.node("Flatten", node.inputs, node.output, node.name, axis=1)


def _reshape(module: m.Reshape, node: Node, graph: OnnxGraph) -> None:
    shape = graph.constant(f"{node.name}.shape", np.array(module.shape, np.int64))
    graph.node("Reshape", [node.inputs[0], shape], node.output, node.name)


def _permute(module: m.Permute, node: Node, graph: OnnxGraph) -> None:
    graph.node("Transpose", node.inputs, node.output, node.name, perm=list(module.dims))


def _slice(module: m.Slice, node: Node, graph: OnnxGraph) -> None:
    dims, starts, stops, steps = zip(*module.slices, strict=True)
    ends = [2**31 - 1 if stop is None else stop for stop in stops]
    columns = {"starts": starts, "ends": ends, "axes": dims, "steps": steps}
    names = [graph.constant(f"{node.name}.{k}", np.array(v, np.int64)) for k, v in columns.items()]
    graph.node("Slice", [node.inputs[0], *names], node.output, node.name)


def _zero_pad(module: m.ZeroPad, node: Node, graph: OnnxGraph) -> None:
    rank = len(node.shapes[0])
    before, after = [0] * rank, [0] * rank
    for i in range(len(module.pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = module.pads[2 * i], module.pads[2 * i + 1]
    pads = graph.constant(f"{node.name}.pads", np.array(_pads(before, after), np.int64))
    graph.node("Pad", [node.inputs[0], pads], node.output, node.name, mode="constant")


def _upsample(module: m.NearestUpsample, node: Node, graph: OnnxGraph) -> None:
    scales = graph.constant(f"{node.name}.scales", np.array([1, 1, *module.factors], np.float32))
    graph.node(
        "Resize",
        [node.inputs[0], "", scales],
        node.output,
        node.name,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


OPERATORS: dict[type[nn.Module], Operator] = {
    nn.Conv1d: Operator("Conv", _conv),
    nn.Conv2d: Operator("Conv", _conv),
    nn.ConvTranspose1d: Operator("ConvTranspose", _conv_transpose),
    nn.ConvTranspose2d: Operator("ConvTranspose", _conv_transpose),
    nn.Linear: Operator("Gemm", _linear),
    nn.ReLU: Operator("Relu", _plain("Relu")),
    nn.ReLU6: Operator("Clip", _clip(0.0, 6.0)),
    nn.Hardtanh: Operator("Clip", _hardtanh),
    m.Sigmoid: Operator("Sigmoid", _plain("Sigmoid")),
    m.Tanh: Operator("Tanh", _plain("Tanh")),
    nn.Hardsigmoid: Operator("HardSigmoid", _plain("HardSigmoid", alpha=1 / 6, beta=0.5)),
    m.HardSwish: Operator("HardSwish", _plain("HardSwish")),
    m.SiLU: Operator("Mul", _silu),
    m.GELU: Operator("Gelu", _gelu),
    m.ELU: Operator("Elu", _elu),
    nn.LeakyReLU: Operator("LeakyRelu", _leaky_relu),
    nn.PReLU: Operator("PRelu", _prelu),
    m.Softmax: Operator("Softmax", _softmax),
    m.LayerNorm: Operator("LayerNormalization", _layer_norm),
    nn.AvgPool1d: Operator("AveragePool", _pool("AveragePool", 1)),
    nn.AvgPool2d: Operator("AveragePool", _pool("AveragePool", 2)),
    m.Add: Operator("Add", _plain("Add")),
    m.Sub: Operator("Sub", _plain("Sub")),
    m.Mul: Operator("Mul", _plain("Mul")),
    m.MatMul: Operator("MatMul", _plain("MatMul")),
    m.Scale: Operator("Mul", _scale),
    m.Mean: Operator("ReduceMean", _mean),
    m.Concat: Operator("Concat", _concat),
    nn.MaxPool1d: Operator("MaxPool", _pool("MaxPool", 1)),
    nn.MaxPool2d: Operator("MaxPool", _pool("MaxPool", 2)),
    nn.Flatten: Operator("Flatten", _flatten),
    m.Reshape: Operator("Reshape", _reshape),
    m.Permute: Operator("Transpose", _permute),
    m.Slice: Operator("Slice", _slice),
    m.ZeroPad: Operator("Pad", _zero_pad),
    m.NearestUpsample: Operator("Resize", _upsample),
}


def _constraints(module: nn.Module) -> str | None:
    """Why this configuration of a known module cannot be quantized, or None."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}, only with 'zeros'"
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d)) and module.return_indices:
        return "return_indices=True"
    if (
        isinstance(module, (nn.AvgPool1d, nn.AvgPool2d))
        and module.ceil_mode
        and module.count_include_pad
        and any(_tuple(module.padding, 1))
    ):
        return "ceil_mode=True and count_include_pad=True (executors disagree about the last window's divisor)"
    if isinstance(module, nn.AvgPool2d) and module.divisor_override is not None:
        return "divisor_override is set"
    if isinstance(module, nn.Softmax) and module.dim is None:
        return "dim=None"
    if isinstance(module, nn.Hardtanh) and not (
        math.isfinite(module.min_val) and math.isfinite(module.max_val) and module.min_val <= 0 <= module.max_val
    ):
        return f"clips to [{module.min_val}, {module.max_val}], which does not hold zero"
    return None


def check(module: nn.Module, where: str) -> None:
    """Raises UnsupportedModelError, naming `where`, unless the module can be quantized."""
    if operator(module) is None:
        known = ", ".join(sorted({t.__name__ for t in OPERATORS}))
        raise UnsupportedModelError(f"{where}: {type(module).__name__} is not supported; supported are {known}")
    reason = _constraints(module)
    if reason:
        raise UnsupportedModelError(f"{where}: {type(module).__name__} is not supported with {reason}")
