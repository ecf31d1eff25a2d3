"""Small artifacts for tests of QDQ files, and how they are run."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from pow2quant.artifact import Artifact
from pow2quant.pow2_constraints import Encoding, IntGrid

DISABLED, ALL = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL


def encoding(k, bits=8, signed=False, zero_point=0, axis=None, narrow=False):
    return Encoding(np.exp2(np.float32(k)), zero_point, IntGrid(bits, signed, narrow), axis)


def on_grid(rng, shape, enc, spread=None):
    """Random float32 values on the grid, the extremes included."""
    low, high = (np.broadcast_to(enc.along(end, shape), shape) for end in (enc.grid.qmin, enc.grid.qmax))
    if spread is not None:
        low, high = np.maximum(low, -spread), np.minimum(high, spread)
    return enc.dequantize(rng.integers(low, high, endpoint=True))


def model_of(nodes, inputs, outputs, initializers, opset=21, **named):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10, **named)
    onnx.checker.check_model(model)
    return model


def network(w=8, a=8, signed=False, narrow=False):
    """conv + relu, maxpool, conv, a float site, add, concat, flatten, gemm; w-bit weights, a-bit activations."""

    def activation(k, zero_point=0 if signed else 1 << (a - 1) & ~1):
        return encoding(k - a, a, signed, zero_point, narrow=narrow and signed)

    def weight(*k):
        return encoding([i - w for i in k], w, True, axis=0, narrow=narrow)

    table = {
        "x": activation(3),
        "conv1.weight": weight(0, 1, 0, 2),
        "relu1.output": activation(2, 0),
        "pool.output": activation(2, 0),
        "conv2.weight": weight(1, 0, 0, 0),
        "conv2.output": activation(4),
        "add.output": activation(4),
        "concat.output": activation(4),
        "flatten.output": activation(4),
        "fc.weight": weight(0, 0, 1),
        "y": activation(5),
    }
    shapes = {"conv1": (4, 2, 3, 3), "conv2": (4, 4, 1, 1), "fc": (3, 32)}
    rng, initializers = np.random.default_rng(w + 1), {}
    for name, source in (("conv1", "x"), ("conv2", "pool.output"), ("fc", "flatten.output")):
        product = table[source].exponent + table[f"{name}.weight"].exponent
        table[f"{name}.bias"] = encoding(product, 32, True, axis=0)
        initializers[f"{name}.weight"] = on_grid(rng, shapes[name], table[f"{name}.weight"])
        initializers[f"{name}.bias"] = on_grid(rng, shapes[name][:1], table[f"{name}.bias"], spread=1 << (w + a - 2))
    nodes = [
        helper.make_node("Conv", ["x", "conv1.weight", "conv1.bias"], ["conv1.output"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv1.output"], ["relu1.output"], "relu1"),
        helper.make_node("MaxPool", ["relu1.output"], ["pool.output"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["pool.output", "conv2.weight", "conv2.bias"], ["conv2.output"], "conv2"),
        helper.make_node("Neg", ["pool.output"], ["neg.output"], "neg"),
        helper.make_node("Add", ["conv2.output", "neg.output"], ["add.output"], "add"),
        helper.make_node("Concat", ["add.output", "conv2.output"], ["concat.output"], "concat", axis=1),
        helper.make_node("Flatten", ["concat.output"], ["flatten.output"], "flatten"),
        helper.make_node("Gemm", ["flatten.output", "fc.weight", "fc.bias"], ["y"], "fc", transB=1),
    ]
    model = model_of(nodes, {"x": ["N", 2, 4, 4]}, {"y": ["N", 3]}, initializers, producer_name="tests")
    model.metadata_props.add(key="user", value="keeps this")
    return Artifact(model, table)


def run(model, x, level=DISABLED):
    options = ort.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads, options.log_severity_level = level, 1, 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # x86 without VNNI saturates otherwise
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def assert_same(one, other):
    """Equal tables, and equal models down to names, attributes, shapes and initializers' bytes."""
    assert one.encodings == other.encodings
    a, b = ({f.name: v for f, v in m.model.ListFields() if f.name != "graph"} for m in (one, other))
    assert a == b
    assert one.model.graph == other.model.graph
