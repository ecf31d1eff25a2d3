"""How long every layer takes in onnxruntime on this machine: the table of a chip that is at hand."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import yaml
from onnx import helper, shape_inference

from pow2quant.adapters import onnx_qdq
from pow2quant.artifact import Artifact
from pow2quant.study.candidates import Plan
from pow2quant.study.costs import Chip, LayerShape

if TYPE_CHECKING:
    import onnxruntime

SAMPLES = 15
"""A median of so many."""

SAMPLE_SECONDS = 0.004
"""Process time that a sample takes at least: so many runs are counted together."""

LEAST = 0.01
"""Microseconds that a layer takes at least: what is less is the clock's noise."""


def measured(networks: Iterable[tuple[Plan, Artifact]], layers: Sequence[LayerShape], name: str) -> Chip:
    """Every weighted layer's time, with the activation function that shares its quantizer, from integers to integers.

    networks: plans, and the whole network so quantized. One thread, all optimizations, one image; process
    time, so that other processes do not count; the median of `SAMPLES`, less that of a network that does nothing. What
    stands between layers is left out.
    """
    found: dict[str, dict[str, float]] = {layer.name: {} for layer in layers}
    idle = microseconds(_nothing())
    for plan, artifact in networks:
        keys = {layer.name: "x".join(layer.widths(plan)) for layer in layers}
        for layer, model in parts(artifact, [name for name, key in keys.items() if key not in found[name]]):
            found[layer][keys[layer]] = round(max(microseconds(model) - idle, LEAST), 3)
    return Chip(name=name, layers=found)


def parts(artifact: Artifact, layers: Sequence[str]) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Every layer as a QDQ model of its own, from the integers that it reads to those that it computes."""
    model = shape_inference.infer_shapes(_for_one_image(artifact.model), strict_mode=True, data_prop=True)
    shapes = {v.name: v for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for layer in layers:
        nodes = [next(n for n in model.graph.node if n.name == layer)]
        while nodes[-1].output[0] not in artifact.encodings and len(readers.get(nodes[-1].output[0], ())) == 1:
            nodes.append(readers[nodes[-1].output[0]][0])
        wanted = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            layer,
            [shapes[nodes[0].input[0]]],
            [shapes[nodes[-1].output[0]]],
            initializer=[t for t in model.graph.initializer if t.name in wanted],
        )
        part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        names = wanted | {name for node in nodes for name in node.output}
        table = {k: v for k, v in artifact.encodings.items() if k in names}
        yield layer, _on_integers(onnx_qdq.to_qdq(Artifact(part, table)))


def microseconds(model: onnx.ModelProto) -> float:
    """The median process time of one run."""
    session = _session(model)
    rng = np.random.default_rng(0)
    feed: dict[str, Any] = {}
    for i in session.get_inputs():
        codes = rng.integers(0, 100, i.shape)
        feed[i.name] = codes.astype(helper.tensor_dtype_to_np_dtype(_element_type(model, i.name)))

    def seconds(runs: int) -> float:
        started = time.process_time()
        for _ in range(runs):
            session.run(None, feed)
        return time.process_time() - started

    runs = 1
    while (passed := seconds(runs)) < SAMPLE_SECONDS:
        runs = max(2 * runs, int(runs * SAMPLE_SECONDS / max(passed, 1e-6))) if passed else 2 * runs
    return median(seconds(runs) for _ in range(SAMPLES)) / runs * 1e6


def dump(chip: Chip) -> str:
    """The YAML that `costs.load_chip` reads."""
    return str(yaml.safe_dump(asdict(chip), sort_keys=False, width=120))


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _on_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the QuantizeLinear of the input and the DequantizeLinear of the output, which neighbours would spare."""
    graph = model.graph
    (entering,), (leaving,) = graph.input, graph.output
    first = next((n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == entering.name), None)
    last = next((n for n in graph.node if n.op_type == "DequantizeLinear" and n.output[0] == leaving.name), None)
    types = {t.name: t.data_type for t in graph.initializer}
    for node, value, name in ((first, entering, first and first.output[0]), (last, leaving, last and last.input[0])):
        if node is not None and name is not None:
            value.name = name
            value.type.tensor_type.elem_type = types[node.input[2]]
            graph.node.remove(node)
    return model


def _element_type(model: onnx.ModelProto, name: str) -> int:
    return int(next(v.type.tensor_type.elem_type for v in model.graph.input if v.name == name))


def _nothing() -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "nothing", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _for_one_image(model: onnx.ModelProto) -> onnx.ModelProto:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    values: Any = (*fixed.graph.input, *fixed.graph.output)
    for value in values:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = 1
    return fixed
