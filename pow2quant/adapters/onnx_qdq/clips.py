"""Clips on codes: a reversible pair on a finished QDQ graph.

onnxruntime turns DQ -> Conv -> Q into one integer kernel, but DQ -> Conv -> Clip -> Q only where the Clip covers all
that Q can store; with a ReLU6, or a grid narrower than its storage, the convolution runs in float, several times
slower. Rounding and clipping to points of the grid commute, so the Clip may as well stand behind and clip codes:
Conv -> Q -> Clip -> DQ. (16-bit codes onnxruntime cannot clip; there the Clip stays in front of the Q.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from pow2quant.operators import OPERATIONS

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

MARK = "/codes"
"""What ends the names of the tensors that `postpone` adds."""

FUSED = tuple(op for op, row in OPERATIONS.items() if row.kernel)
"""The operators that have an integer kernel."""


def postpone(graph: onnx.GraphProto) -> None:
    """Moves every Clip that keeps such an operator from being fused behind its Q, in place."""
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    moved: dict[str, NodeProto] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "Clip" and node.output[0] not in outputs:
            quantizer = _quantizer(node, producers, readers)
            alone = all(len(readers[name]) == 1 for name in node.input[1:])
            codes = _codes(node, quantizer, constants) if quantizer is not None and alone else None
            if quantizer is not None and codes is not None:
                moved[quantizer.name] = _on_codes(graph, node, quantizer, codes)
                continue
        nodes.append(node)
        if node.name in moved:
            nodes.append(moved[node.name])
    del graph.node[:]
    graph.node.extend(nodes)


def restore(graph: onnx.GraphProto) -> None:
    """Moves the Clips back in front of their Q, in place."""
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    clips = {n.input[0]: n for n in graph.node if n.op_type == "Clip" and n.input[0].endswith(MARK)}
    nodes: list[NodeProto] = []
    for node in [n for n in graph.node if n.op_type != "Clip" or n.input[0] not in clips]:
        if node.op_type == "QuantizeLinear" and node.output[0] in clips:
            clip = clips[node.output[0]]
            scale, zero_point = (constants[name] for name in node.input[1:])
            for i in (1, 2):
                code, name = clip.input[i], clip.input[i].removesuffix(MARK)
                value = (constants[code].astype(np.int64) - int(zero_point)) * np.float64(scale)
                _exchange(graph, code, np.float32(value), name)
                clip.input[i] = name
            quantized, between = clip.output[0], clip.input[0].removesuffix(MARK)
            clip.input[0], clip.output[0], node.input[0], node.output[0] = node.input[0], between, between, quantized
            nodes.append(clip)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _quantizer(
    clip: NodeProto, producers: dict[str, NodeProto], readers: dict[str, list[NodeProto]]
) -> NodeProto | None:
    """The Q that alone reads a Clip that alone reads an operator with an integer kernel."""
    producer, behind = producers.get(clip.input[0]), readers.get(clip.output[0], [])
    if producer is None or producer.op_type not in FUSED or len(readers[clip.input[0]]) != 1:
        return None
    return behind[0] if len(behind) == 1 and behind[0].op_type == "QuantizeLinear" else None


def _codes(clip: NodeProto, quantizer: NodeProto, constants: dict[str, NDArray[Any]]) -> NDArray[Any] | None:
    """The Clip's bounds as codes; None unless they lie on the grid, and inside of what an 8-bit Q can store."""
    names = [*clip.input[1:], *quantizer.input[1:]]
    if len(names) != 4 or any(name not in constants or constants[name].size != 1 for name in names):
        return None
    low, high, scale = (float(constants[name]) for name in names[:3])
    zero_point = constants[names[3]]
    if zero_point.dtype not in (np.uint8, np.int8):
        return None
    stored = np.iinfo(zero_point.dtype)
    codes = np.array([low, high]) / scale + float(zero_point)
    inside = stored.min <= codes[0] and codes[1] <= stored.max
    covers = codes[0] == stored.min and codes[1] == stored.max
    return codes.astype(zero_point.dtype) if inside and not covers and (codes == np.rint(codes)).all() else None


def _on_codes(graph: onnx.GraphProto, clip: NodeProto, quantizer: NodeProto, codes: NDArray[Any]) -> NodeProto:
    """Leads the Q to the Clip's input, and the Clip, with integer bounds, to the Q's output."""
    bounds = [f"{name}{MARK}" for name in clip.input[1:]]
    for name, code, bound in zip(clip.input[1:], codes, bounds, strict=True):
        _exchange(graph, name, code, bound)
    quantized = quantizer.output[0]
    quantizer.input[0], quantizer.output[0] = clip.input[0], f"{clip.output[0]}{MARK}"
    return helper.make_node("Clip", [quantizer.output[0], *bounds], [quantized], clip.name)


def _exchange(graph: onnx.GraphProto, old: str, value: Any, new: str) -> None:
    """Puts another initializer in the place of one."""
    for tensor in graph.initializer:
        if tensor.name == old:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), new))
