"""Modules that move values."""

from __future__ import annotations

import numpy as np
from torch import nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.writing import Formula, Node, OnnxGraph, Operator, Rows, formula, pads_of, plain
from pow2quant.operators import Kind


def _reshape(module: m.Reshape, node: Node, graph: OnnxGraph) -> None:
    shape = graph.constant(f"{node.name}.shape", np.array(module.shape, np.int64))
    graph.node("Reshape", [node.inputs[0], shape], node.output, node.name)


def _slice(module: m.Slice, node: Node, graph: OnnxGraph) -> None:
    dims, starts, stops, steps = zip(*module.slices, strict=True)
    ends = [2**31 - 1 if stop is None else stop for stop in stops]
    columns = {"starts": starts, "ends": ends, "axes": dims, "steps": steps}
    names = [graph.constant(f"{node.name}.{k}", np.array(v, np.int64)) for k, v in columns.items()]
    graph.node("Slice", [node.inputs[0], *names], node.output, node.name)


def _take(f: Formula, module: m.Take, x: str) -> str:
    return f("Gather", x, f.integers(module.indices.tolist()), axis=module.dim)


def _pad(module: m.ZeroPad | m.ConstantPad, node: Node, graph: OnnxGraph) -> None:
    rank = len(node.shapes[0])
    before, after = [0] * rank, [0] * rank
    for i in range(len(module.pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = module.pads[2 * i], module.pads[2 * i + 1]
    pads = graph.constant(f"{node.name}.pads", np.array(pads_of(before, after), np.int64))
    inputs = [node.inputs[0], pads]
    if isinstance(module, m.ConstantPad):
        inputs.append(graph.constant(f"{node.name}.value", np.float32(module.value)))
    graph.node("Pad", inputs, node.output, node.name, mode="constant")


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


def _topk(module: m.TopK, node: Node, graph: OnnxGraph) -> None:
    count = graph.constant(f"{node.name}.count", np.array([module.count], np.int64))
    graph.node("TopK", [node.inputs[0], count], node.output, node.name, axis=module.dim, largest=int(module.largest))
    graph.nodes[-1].output.append(f"{node.name}.places")


ROWS: Rows = {
    m.TopK: Operator("TopK", _topk, proved=True),
    m.Take: Operator("Gather", formula(_take), integers=True, proved=True),
    m.ConstantPad: Operator("Pad", _pad, own=Kind.COMPUTE, integers=True, proved=True),
    m.Concat: Operator("Concat", plain("Concat", lambda x: {"axis": x.dim}), integers=True, proved=True),
    nn.Flatten: Operator("Flatten", plain("Flatten", axis=1), integers=True, proved=True),
    m.Reshape: Operator("Reshape", _reshape, integers=True, proved=True),
    m.Permute: Operator("Transpose", plain("Transpose", lambda x: {"perm": list(x.dims)}), integers=True, proved=True),
    m.Slice: Operator("Slice", _slice, integers=True, proved=True),
    m.ZeroPad: Operator("Pad", _pad, integers=True, proved=True),
    m.NearestUpsample: Operator("Resize", _upsample, integers=True, proved=True),
}
