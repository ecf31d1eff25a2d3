"""The network as people draw it: operations with their activation functions, and the tensors between them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

    from pow2quant.artifact import Artifact

CLIPS = ("Relu", "Clip")
"""Operations that are drawn in one box with the one before them, if only they read its result and it stays float."""


def describe(artifact: Artifact) -> list[dict[str, Any]]:
    """A box per graph input and operation, in the order of computation, in JSON's types.

    `name`, `op` (such as `Conv + Relu`, `input`), `nodes`: the ONNX nodes in it. `reads`, `writes`: tensors that flow,
    parameters left out. `weight`: the weight's name or None. `detail`: the weight's shape, in a few words.
    """
    graph = artifact.model.graph
    parameters = {tensor.name: tensor for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    results = {value.name for value in graph.output}
    boxes = [
        _box(value.name, "input", [], [], value.name, None, "") for value in graph.input if value.name not in parameters
    ]
    by_result = {box["writes"]: box for box in boxes}
    for node in graph.node:
        reads = [name for name in node.input if name and name not in parameters]
        before = by_result.get(reads[0]) if reads else None
        alone = before is not None and before["nodes"] and readers[before["writes"]] == 1
        if before and alone and node.op_type in CLIPS and reads[0] not in artifact.encodings.keys() | results:
            before["op"] += f" + {node.op_type}"
            before["nodes"].append(node.name)
            before["writes"] = node.output[0]
        else:
            weight = next((n for n in node.input if n in parameters and n.endswith(".weight")), None)
            detail = _detail(node, parameters[weight]) if weight else ""
            boxes.append(_box(node.name, node.op_type, [node.name], reads, node.output[0], weight, detail))
            before = boxes[-1]
        by_result[node.output[0]] = before
    return boxes


def _box(
    name: str, op: str, nodes: list[str], reads: list[str], writes: str, weight: str | None, detail: str
) -> dict[str, Any]:
    return {
        "name": name or writes,
        "op": op,
        "nodes": nodes,
        "reads": reads,
        "writes": writes,
        "weight": weight,
        "detail": detail,
    }


def _detail(node: onnx.NodeProto, weight: onnx.TensorProto) -> str:
    """A weight (32, 16, 3, 3): its window and `16 → 32`, stride, groups. A matrix (10, 64): `64 → 10`."""
    integers = {a.name: list(a.ints) or [a.i] for a in node.attribute}
    dims, groups = list(weight.dims), integers.get("group", [1])[0]
    if len(dims) < 3:
        transposed = node.op_type == "Gemm" and integers.get("transB", [0])[0]
        return " → ".join(map(str, dims[::-1] if transposed else dims))
    inputs, outputs = (dims[1] * groups, dims[0]) if node.op_type == "Conv" else (dims[0], dims[1] * groups)
    words = ["\u00d7".join(map(str, dims[2:])), f"{inputs} → {outputs}"]
    if groups > 1:
        words.append("depthwise" if groups == inputs else f"{groups} groups")
    if max(integers.get("strides", [1])) > 1:
        words.append(f"stride {max(integers['strides'])}")
    return ", ".join(words)
