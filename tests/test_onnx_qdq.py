"""The QDQ format: exact round trips, the same bits in onnxruntime, foreign files, and errors that name the culprit."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from pow2quant.adapters.files import GRIDS
from pow2quant.adapters.onnx_qdq import export_qdq, from_qdq, load, save, to_qdq
from pow2quant.artifact import Artifact
from pow2quant.errors import EncodingError, FileFormatError, OutputError, UnsupportedModelError
from pow2quant.pow2_constraints import Encoding, IntGrid
from tests.strategies import encodings, grids, widths

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


def fake_quantized(artifact, x):
    """The first graph output: ONNX's reference implementation, node by node, and numpy's fake quantization."""
    graph, table = artifact.model.graph, artifact.encodings

    def quantized(name, value):
        return table[name].fake_quantize(value) if name in table else np.asarray(value)

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values[graph.input[0].name] = quantized(graph.input[0].name, x)
    for node in graph.node:
        results = ReferenceEvaluator(node).run(None, {name: values[name] for name in node.input})
        values |= {name: quantized(name, v) for name, v in zip(node.output, results, strict=False)}
    return values[graph.output[0].name]


def run(model, x, level=DISABLED):
    options = ort.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads, options.log_severity_level = level, 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def assert_same(one, other):
    """Equal tables, and equal models down to names, attributes, shapes and initializers' bytes."""
    assert one.encodings == other.encodings
    a, b = ({f.name: v for f, v in m.model.ListFields() if f.name != "graph"} for m in (one, other))
    assert a == b
    assert one.model.graph == other.model.graph


WIDTHS = [(2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8), (2, 8), (4, 8), (8, 4), (16, 3), (3, 12), (4, 10)]


@pytest.mark.parametrize(("w", "a"), WIDTHS)
@pytest.mark.parametrize("signed", [False, True])
def test_onnxruntime_gives_the_bits_of_the_fake_quantized_network(w, a, signed):
    artifact = network(w, a, signed, narrow=w % 2 == 1)
    model = to_qdq(artifact)
    onnx.checker.check_model(model, full_check=True)
    assert_same(from_qdq(model), artifact)
    x = np.random.default_rng(0).normal(0, 2, (64, 2, 4, 4)).astype(np.float32)
    expected = fake_quantized(artifact, x)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(run(model, x, DISABLED), expected)
    np.testing.assert_array_equal(run(model, x, ALL), expected)


def test_storage():
    artifact = network(5, 6)
    model = to_qdq(artifact)
    types = {t.name: TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
    assert types["conv1.weight_quantized"] == "INT8"
    assert types["conv1.bias_quantized"] == types["conv1.bias_zero_point"] == "INT32"
    assert types["x_zero_point"] == "UINT8"
    ops = [node.op_type for node in model.graph.node]
    quantized = set(artifact.encodings) - {t.name for t in artifact.model.graph.initializer}
    assert ops.count("QuantizeLinear") == len(quantized)
    assert ops.count("Clip") == len(quantized) - len(["pool", "concat", "flatten"])
    assert ops.count("DequantizeLinear") == len(artifact.encodings)
    assert [v.name for v in model.graph.output] == ["y"]
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert "neg.output" in {name for node in model.graph.node if node.op_type == "Add" for name in node.input}
    assert (model.ir_version, model.opset_import[0].version) == (10, 21)
    wide = {t.name: TensorProto.DataType.Name(t.data_type) for t in to_qdq(network(3, 16)).graph.initializer}
    assert (wide["conv1.weight_quantized"], wide["x_zero_point"]) == ("INT4", "UINT16")
    assert "Clip" not in {node.op_type for node in to_qdq(network(3, 16)).graph.node}
    assert "INT16" in {TensorProto.DataType.Name(t.data_type) for t in to_qdq(network(9, 8)).graph.initializer}


def test_without_our_metadata_the_width_of_the_storage_counts():
    model = to_qdq(network(5, 8))
    del model.metadata_props[:]
    read = from_qdq(model).encodings
    assert read["conv1.weight"].grid == IntGrid(8, True)
    assert read["x"] == network(5, 8).encodings["x"]


@st.composite
def artifacts(draw):
    """A network of one Gemm with any encoding at each of its tensors; each may also stay float."""
    n, power_of_2 = draw(st.integers(1, 4)), draw(st.booleans())
    bias = draw(encodings((n,), grids(widths(2, 32), signed=st.just(True)), power_of_2=power_of_2))
    table = {
        "x": draw(encodings(power_of_2=power_of_2)),
        "fc.weight": draw(encodings((n, 3), power_of_2=power_of_2)),
        "fc.bias": Encoding(bias.scale, 0, bias.grid, bias.axis),
        "y": draw(encodings(power_of_2=power_of_2)),
    }
    shapes = {"fc.weight": (n, 3), "fc.bias": (n,)}
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    values = {name: on_grid(rng, shape, table[name], spread=1 << 20) for name, shape in shapes.items()}
    node = helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["y"], "fc", transB=1)
    model = model_of([node], {"x": ["N", 3]}, {"y": ["N", n]}, values)
    kept = draw(st.sets(st.sampled_from(sorted(table))))
    return Artifact(model, {name: enc for name, enc in table.items() if name in kept})


@settings(max_examples=150)
@given(artifacts())
def test_round_trip_is_exact(artifact):
    model = to_qdq(artifact)
    onnx.checker.check_model(model, full_check=True)
    assert_same(from_qdq(model), artifact)
    assert_same(from_qdq(onnx.load_from_string(model.SerializeToString())), artifact)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 5, 8, 11, 16])
def test_clip_is_exact_for_free_scales(bits, signed):
    grid = IntGrid(bits, signed, narrow=signed)
    free = Encoding(np.float32(0.37), np.int64(grid.qmin + 1), grid)
    model = model_of(
        [helper.make_node("Abs", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["y"])], {"x": ["N"]}, {"y": ["N"]}, {}
    )
    artifact = Artifact(model, {"x": free, "y": free})
    ends = np.linspace(-3, 3, 501) + np.array([[free.minimum], [0], [free.maximum]])
    x = np.concatenate([ends.ravel(), free.scale * (np.arange(-50, 50) + 0.5), [-3e38, 3e38]]).astype(np.float32)
    for level in (DISABLED, ALL):
        np.testing.assert_array_equal(run(to_qdq(artifact), x, level), fake_quantized(artifact, x))


def test_initializers_that_are_listed_as_inputs():
    """As files before IR version 4 have it."""
    listed = network().model
    listed.graph.input.append(helper.make_tensor_value_info("conv1.weight", TensorProto.FLOAT, [4, 2, 3, 3]))
    x = np.random.default_rng(0).normal(0, 2, (3, 2, 4, 4)).astype(np.float32)
    model = to_qdq(Artifact(listed, network().encodings))
    assert [value.name for value in model.graph.input] == ["x"]
    np.testing.assert_array_equal(run(model, x), fake_quantized(network(), x))


def test_names_that_are_taken_are_avoided():
    nodes = [
        helper.make_node("Relu", ["x"], ["x_dequantized"], "x/QuantizeLinear"),
        helper.make_node("Neg", ["x_dequantized"], ["x_scale"], "x_quantized"),
    ]
    model = model_of(nodes, {"x": ["n", 3]}, {"x_scale": ["n", 3]}, {})
    artifact = Artifact(model, {n: encoding(-4, 8, zero_point=128) for n in ("x", "x_dequantized", "x_scale")})
    onnx.checker.check_model(to_qdq(artifact), full_check=True)
    assert_same(from_qdq(to_qdq(artifact)), artifact)


def test_axes_other_than_0_and_unused_results():
    w, rng = encoding([-3, -2], 4, True, axis=1), np.random.default_rng(0)
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["t"], "up"),
        helper.make_node("MaxPool", ["t"], ["y", ""], "pool", kernel_shape=[1, 1]),
    ]
    model = model_of(nodes, {"x": ["N", 3, 2, 2]}, {"y": ["N", 2, 2, 2]}, {"w": on_grid(rng, (3, 2, 1, 1), w)})
    artifact = Artifact(model, {"x": encoding(-4), "w": w, "t": encoding([0, 1], axis=1), "y": encoding(-4)})
    assert_same(from_qdq(to_qdq(artifact)), artifact)
    x = rng.normal(0, 2, (1, 3, 2, 2)).astype(np.float32)
    expected = fake_quantized(artifact, x)
    np.testing.assert_array_equal(run(to_qdq(artifact), x), expected)


def test_requantization_is_an_identity_that_bears_the_encoding():
    fine, coarse = encoding(-4), encoding(-2, zero_point=2)
    nodes = [
        helper.make_node("Identity", ["x"], ["t"], "requantize"),
        helper.make_node("Relu", ["t"], ["y"], "relu"),
    ]
    artifact = Artifact(model_of(nodes, {"x": ["N"]}, {"y": ["N"]}, {}), {"x": fine, "t": coarse, "y": coarse})
    assert_same(from_qdq(to_qdq(artifact)), artifact)
    x = np.random.default_rng(0).normal(0, 9, 50).astype(np.float32)
    np.testing.assert_array_equal(run(to_qdq(artifact), x, ALL), fake_quantized(artifact, x))


# Other tools' files


def assert_read_exactly(foreign, x, opset=21):
    """What was read computes, written again, the same bits; returns it."""
    artifact = from_qdq(foreign)
    onnx.checker.check_model(artifact.model, full_check=True)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in artifact.model.graph.node}
    assert artifact.model.opset_import[0].version == opset
    np.testing.assert_array_equal(run(to_qdq(artifact), x), run(foreign, x))
    assert_same(from_qdq(to_qdq(artifact)), artifact)
    return artifact


class Batches(CalibrationDataReader):
    def __init__(self, x):
        self.left = [x]

    def get_next(self):
        return {"x": self.left.pop()} if self.left else None


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize(
    ("activations", "weights", "per_channel"),
    [("QUInt8", "QInt8", True), ("QInt8", "QInt8", False), ("QUInt8", "QUInt8", False), ("QUInt16", "QInt8", True)],
)
def test_files_of_onnxruntime_quantizer(tmp_path, opset, activations, weights, per_channel):
    floats = network().model
    floats.opset_import[0].version = opset
    floats.ir_version = 8
    x = np.random.default_rng(0).normal(0, 2, (16, 2, 4, 4)).astype(np.float32)
    quantize_static(
        floats,
        tmp_path / "q.onnx",
        Batches(x),
        per_channel=per_channel,
        activation_type=QuantType[activations],
        weight_type=QuantType[weights],
    )
    artifact = assert_read_exactly(load(tmp_path / "q.onnx"), x)
    table = artifact.encodings
    assert {"x", "y", "conv1.weight", "conv1.bias", "fc.weight", "fc.bias"} <= table.keys()
    bits = 16 if activations.endswith("16") else 8
    assert table["x"].grid == IntGrid(bits, activations.startswith("QI"))
    assert table["conv1.bias"].grid == IntGrid(32, True)
    assert (table["conv1.weight"].axis, table["fc.weight"].axis) == ((0, 0) if per_channel else (None, None))
    assert table["conv1.weight"].grid == IntGrid(8, weights.startswith("QI"))
    product = table["x"].scale * table["conv1.weight"].scale
    assert table["conv1.bias"].scale.ravel() == pytest.approx(product.ravel(), rel=1e-6)


@pytest.fixture(scope="module")
def aimet_files(tmp_path_factory):
    """AIMET's QDQ files of one network by (weight bits, activation bits, weights as integers)."""
    aimet = pytest.importorskip("aimet_torch")
    import torch
    from aimet_torch.onnx import export

    torch.manual_seed(0)
    layers = {
        "conv": torch.nn.Conv2d(3, 4, 3),
        "relu": torch.nn.ReLU(),
        "pool": torch.nn.MaxPool2d(2),
        "flatten": torch.nn.Flatten(),
        "fc": torch.nn.Linear(36, 5),
    }
    net, x = torch.nn.Sequential(OrderedDict(layers)).eval(), torch.randn(8, 3, 8, 8)
    files = {}
    for w, a in ((8, 8), (4, 16)):
        sim = aimet.QuantizationSimModel(net, x, default_param_bw=w, default_output_bw=a, config_file="default")
        sim.compute_encodings(lambda model: model(x))
        for integers in (True, False):
            path = tmp_path_factory.mktemp("aimet") / f"{w}-{a}-{integers}.onnx"
            names = {"input_names": ["x"], "output_names": ["y"]}
            export(sim, x, str(path), opset_version=21, dynamo=False, prequantize_constants=integers, **names)
            files[w, a, integers] = path
    return files, x.numpy()


@pytest.mark.filterwarnings("ignore")  # torch and AIMET announce what they will remove
@pytest.mark.parametrize(("w", "a"), [(8, 8), (4, 16)])
@pytest.mark.parametrize("integers", [True, False])
def test_files_of_aimet(aimet_files, w, a, integers):
    files, x = aimet_files
    table = assert_read_exactly(load(files[w, a, integers]), x).encodings
    assert {"x", "conv.weight", "conv.bias", "fc.weight", "fc.bias", "y"} <= table.keys()
    assert table["conv.weight"].grid == IntGrid(w, True)
    assert table["conv.weight"].axis == 0
    assert table["y"].grid == IntGrid(a, False)


def quantize(x, scale, y, zero_point="", name="", **attributes):
    return helper.make_node("QuantizeLinear", [x, scale, zero_point][: 2 + bool(zero_point)], [y], name, **attributes)


def dequantize(x, scale, y, zero_point="", name="", **attributes):
    return helper.make_node("DequantizeLinear", [x, scale, zero_point][: 2 + bool(zero_point)], [y], name, **attributes)


def test_constant_nodes_missing_zero_points_identities_and_duplicated_results():
    """As PyTorch's exporter and Brevitas write: everything is a Constant node, one Q feeds several DQs."""
    w = np.float32([[0.5, -1, 0.3], [2, 0.25, 3]])
    constant = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value)))
        for name, value in {"w": w, "wz": np.int8([0, 0]), "z": np.int8(0), "w2": np.int8([[3, -4], [5, 6]])}.items()
    ]
    nodes = [
        *constant,
        helper.make_node("Constant", [], ["s64"], value=numpy_helper.from_array(np.float64(0.25))),
        helper.make_node("Cast", ["s64"], ["s"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["ws"], value_floats=[0.25, 0.5]),
        helper.make_node("Identity", ["w"], ["w_again"]),
        quantize("x", "s", "xq"),
        helper.make_node("Identity", ["xq"], ["xq_again"]),
        dequantize("xq_again", "s", "xd"),
        dequantize("xq", "s", "xd_again"),
        quantize("w_again", "ws", "wq", "wz", axis=-2),
        dequantize("wq", "ws", "wd", "wz", axis=0),
        helper.make_node("Gemm", ["xd", "wd"], ["t"], "fc", transB=1),
        quantize("t", "s", "tq", "z"),
        dequantize("tq", "s", "td", "z"),
        dequantize("w2", "s", "w2d"),
        helper.make_node("MatMul", ["td", "w2d"], ["u"], "fc2"),
        helper.make_node("ReduceSum", ["xd_again"], ["r"], "sum"),
        helper.make_node("Add", ["u", "r"], ["y"], "add"),
    ]
    x = np.random.default_rng(0).normal(0, 3, (9, 3)).astype(np.float32)
    artifact = assert_read_exactly(model_of(nodes, {"x": ["N", 3]}, {"y": ["N", 2]}, {}), x)
    assert [node.op_type for node in artifact.model.graph.node] == ["Gemm", "MatMul", "ReduceSum", "Add"]
    assert artifact.encodings == {
        "x": encoding(-2),
        "w_again": encoding([-2, -1], 8, True, axis=0),
        "t": encoding(-2, 8, True),
        "w2d": encoding(-2, 8, True),
    }
    folded = {t.name: numpy_helper.to_array(t) for t in artifact.model.graph.initializer}
    np.testing.assert_array_equal(folded["w_again"], np.float32([[0.5, -1, 0.25], [2, 0, 3]]))
    np.testing.assert_array_equal(folded["w2d"], np.float32([[0.75, -1], [1.25, 1.5]]))


def test_integers_that_are_clipped_between_q_and_dq():
    """As Brevitas (QCDQ) and PyTorch write widths that ONNX does not have."""
    values = {"w": np.float32([[1, -3, 0.3], [2, 0.2, 3]]), "k": np.int8([[3, -4], [2, 1]]), "s": np.float32(0.25)}
    values |= {"i8": np.int8(0), "low": np.int8(-3), "high": np.int8(3), "four": np.int8(-4), "u7": np.uint8(127)}
    clip = functools.partial(helper.make_node, "Clip")
    nodes = [
        *(quantize("x", "s", "xq"), clip(["xq", "", "u7"], ["xc"]), dequantize("xc", "s", "xd")),
        *(quantize("w", "s", "wq", "i8"), clip(["wq", "low", "high"], ["wc"]), dequantize("wc", "s", "wd", "i8")),
        *(clip(["k", "four", "high"], ["kc"]), dequantize("kc", "s", "kd")),
        helper.make_node("Gemm", ["xd", "wd"], ["t"], "fc", transB=1),
        helper.make_node("MatMul", ["t", "kd"], ["y"], "mm"),
    ]
    model = model_of(nodes, {"x": ["N", 3]}, {"y": ["N", 2]}, values)
    x = np.random.default_rng(0).normal(0, 30, (9, 3)).astype(np.float32)
    assert assert_read_exactly(model, x).encodings == {
        "x": encoding(-2, 7),
        "w": encoding(-2, 3, True, narrow=True),
        "kd": encoding(-2, 3, True),
    }


def test_the_exporter_of_torch(tmp_path):
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(144, 5)
            self.register_buffer("scale", torch.linspace(0.01, 0.04, 4))
            self.register_buffer("zero", torch.zeros(4, dtype=torch.int32))

        def forward(self, x):
            per_tensor = torch.fake_quantize_per_tensor_affine
            w = torch.fake_quantize_per_channel_affine(self.conv.weight, self.scale, self.zero, 0, -128, 127)
            y = torch.nn.functional.conv2d(per_tensor(x, 0.05, 128, 0, 255), w, self.conv.bias).relu()
            return self.fc(per_tensor(y, 0.02, 0, 0, 127).flatten(1))

    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(Net().eval(), (x,), tmp_path / "m.onnx", dynamo=False, opset_version=17, input_names=["x"])
    table = assert_read_exactly(load(tmp_path / "m.onnx"), x.numpy()).encodings
    assert table["x"].grid == IntGrid(8, False)
    assert table["conv.weight"].scale.shape == (4,)
    assert {e.grid for e in table.values()} == {IntGrid(8, False), IntGrid(8, True), IntGrid(7, False)}


SCALES = {"s": np.float32(0.25), "s2": np.float32(0.5), "z": np.uint8(0), "z8": np.uint8(8), "i8": np.int8(0)}


def chain(*nodes, opset=21, inputs=None, outputs=None, initializers=None):
    return model_of(nodes, inputs or {"x": ["N"]}, outputs or {"y": ["N"]}, SCALES | (initializers or {}), opset)


X = np.random.default_rng(1).normal(0, 20, 40).astype(np.float32)


def test_requantization_and_shared_tensors_become_identities():
    q = [quantize("x", "s", "a", "z"), dequantize("a", "s", "b", "z")]
    again = assert_read_exactly(chain(*q, quantize("b", "s2", "c", "z8", "again"), dequantize("c", "s2", "y", "z8")), X)
    assert [(n.op_type, n.name) for n in again.model.graph.node] == [("Identity", "again")]
    assert again.encodings == {"x": encoding(-2), "y": encoding(-1, zero_point=8)}
    q_again = [quantize("b", "s", "c", "z"), dequantize("c", "s", "d", "z")]
    same = assert_read_exactly(chain(*q, *q_again, helper.make_node("Neg", ["d"], ["y"])), X)
    assert [node.op_type for node in same.model.graph.node] == ["Neg"]
    passes = assert_read_exactly(chain(quantize("x", "s", "a", "z"), dequantize("a", "s", "y", "z")), X)
    assert passes.encodings == {"x": encoding(-2), "y": encoding(-2)}
    shared = assert_read_exactly(chain(*q, helper.make_node("Add", ["x", "b"], ["y"])), X)
    assert shared.encodings == {"b": encoding(-2)}
    neg = helper.make_node("Neg", ["x"], ["n"])
    one, other = (
        [quantize("n", "s", "a"), dequantize("a", "s", "b")],
        [quantize("n", "s2", "c"), dequantize("c", "s2", "d")],
    )
    both = assert_read_exactly(chain(neg, *one, *other, helper.make_node("Add", ["b", "d"], ["y"])), X)
    assert both.encodings == {"b": encoding(-2), "d": encoding(-1)}
    to_y, to_z = dequantize("a", "s", "y"), dequantize("a", "s", "u")
    visible = assert_read_exactly(chain(neg, one[0], to_y, outputs={"y": ["N"], "n": ["N"]}), X)
    assert visible.encodings == {"y": encoding(-2)}
    twice = assert_read_exactly(chain(neg, one[0], to_y, to_z, outputs={"y": ["N"], "u": ["N"]}), X)
    assert twice.encodings == {"y": encoding(-2), "u": encoding(-2)}


def test_quantizers_that_are_not_read_go():
    idle = [quantize("x", "s", "a", "z"), quantize("w", "s2", "b", "i8"), helper.make_node("Neg", ["x"], ["y"])]
    artifact = assert_read_exactly(chain(*idle, opset=22, initializers={"w": np.float32([1, 2])}), X, opset=22)
    assert artifact.encodings == {}
    assert [node.op_type for node in artifact.model.graph.node] == ["Neg"]
    assert not {"s", "s2", "z", "w", "i8"} & {tensor.name for tensor in artifact.model.graph.initializer}


def test_weights_that_several_nodes_share():
    w = {"w": np.float32([1, 2.2, 3]), "k": np.int8([1, 2, 3])}
    x = X[:39].reshape(13, 3)
    shape = {"inputs": {"x": ["N", 3]}, "outputs": {"y": ["N", 3]}, "initializers": w}
    nodes = [quantize("w", "s", "wq"), dequantize("wq", "s", "wd"), helper.make_node("Add", ["x", "wd"], ["a"])]
    both = assert_read_exactly(chain(*nodes, helper.make_node("Mul", ["a", "w"], ["y"]), **shape), x)
    assert both.encodings == {"wd": encoding(-2)}
    one = [dequantize("k", "s", "k1"), dequantize("k", "s", "k2", "i8"), dequantize("k", "s2", "k3")]
    sums = [helper.make_node("Sum", ["x", "k1", "k2", "k3"], ["y"])]
    tied = assert_read_exactly(chain(*one, *sums, **shape), x)
    assert tied.encodings == {"k1": encoding(-2, 8, True), "k3": encoding(-1, 8, True)}


def test_local_functions_are_inlined():
    body = [quantize("a", "s", "q"), dequantize("q", "s", "b")]
    scale = helper.make_node("Constant", [], ["s"], value_float=0.5)
    opsets = [helper.make_opsetid("", 21)]
    function = helper.make_function("local", "FakeQuant", ["a"], ["b"], [scale, *body], opsets)
    graph = chain(helper.make_node("Neg", ["x"], ["y"])).graph
    del graph.node[:], graph.initializer[:]
    graph.node.append(helper.make_node("Neg", ["x"], ["n"]))
    graph.node.append(helper.make_node("FakeQuant", ["n"], ["y"], domain="local"))
    model = helper.make_model(
        graph, opset_imports=[*opsets, helper.make_opsetid("local", 1)], functions=[function], ir_version=10
    )
    assert assert_read_exactly(model, X).encodings == {"y": encoding(-1)}


E4M3 = np.zeros((), helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN))
RELU = helper.make_node("Relu", ["b"], ["y"], "relu")


def pair(scale, zero_point="", between=(), **attributes):
    """x -> Q `q` -> DQ -> relu."""
    return [
        *between,
        quantize("x", scale, "a", zero_point, "q", **attributes),
        dequantize("a", scale, "b", zero_point, "dq", **attributes),
        RELU,
    ]


def clipped(high, zero_point="z"):
    """x -> Q `q` -> Clip `clip` of the integers -> DQ -> relu."""
    q, dq, relu = pair("s", zero_point)
    dq.input[0] = "clipped"
    return [q, helper.make_node("Clip", ["a", "", high], ["clipped"], "clip"), dq, relu]


UNREADABLE = [
    (
        [helper.make_node("QLinearMatMul", ["x"] * 8, ["y"], "mm")],
        "QLinearMatMul mm computes on integers: .* QDQ format",
    ),
    ([helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "", ""], "d")], "DynamicQuantizeLinear d computes on"),
    ([dequantize("x", "s", "b", name="dq"), RELU], "DequantizeLinear dq reads x, which is neither constant nor"),
    ([quantize("x", "s", "b"), RELU], "Relu relu reads the integers of QuantizeLinear b; only DequantizeLinear"),
    ([pair("s")[0], dequantize("a", "s2", "b", name="dq"), RELU], "dq has another scale or zero point than .* q"),
    (pair("abs", between=[helper.make_node("Abs", ["x"], ["abs"])]), "QuantizeLinear q has a scale that is computed"),
    (pair("s", "zx"), "QuantizeLinear q has a zero point that is not constant"),
    (pair("half", "z"), "QuantizeLinear q has a scale of type float16; only constant float32 scales"),
    (clipped("hundred"), r"Clip clip clips integers to \[0, 100\], which are not the ends of a grid within 8 bits"),
    (clipped("seven", "z8"), r"QuantizeLinear q has an impossible encoding: zero point 8 is .* \[0, 7\]"),
    (
        [*clipped("seven"), dequantize("a", "s", "c")],
        "QuantizeLinear q feeds DequantizeLinear nodes behind .* different",
    ),
    (pair("s", "f8"), "QuantizeLinear q is of type float8_e4m3fn; only integers"),
    (pair("three", axis=-1), "QuantizeLinear q counts axis -1 from the end"),
    (
        [dequantize("k", "two", "b", name="dq", axis=0, block_size=2), RELU],
        "dq has one scale for each block of 2",
    ),
    ([dequantize("k", "zero", "b", name="dq"), RELU], "dq has an impossible encoding: scale must be positive"),
    ([dequantize("k", "three", "b", name="dq", axis=0), RELU], "dq cannot be computed: .* no 3 channels along axis 0"),
    ([dequantize("k", "three", "b", name="dq", axis=1), RELU], "dq has axis 1, which a tensor of 1 dimensions"),
    ([quantize("nan", "s", "a", name="q"), *pair("s")[1:]], "QuantizeLinear q cannot be computed: .*NaN"),
    ([quantize("k", "s", "a", name="q"), *pair("s")[1:]], "QuantizeLinear q quantizes a constant of type int8"),
]


@pytest.mark.parametrize(("nodes", "text"), UNREADABLE)
def test_what_cannot_be_read_is_named(nodes, text):
    constants = {"k": np.int8([1, 2, 3, 4]), "nan": np.float32([np.nan]), "half": np.float16(0.5), "f8": E4M3, **SCALES}
    constants |= {"hundred": np.uint8(100), "seven": np.uint8(7)}
    constants |= {"zero": np.float32(0), "two": np.float32([1, 2]), "three": np.float32([1, 2, 4])}
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
            helper.make_tensor_value_info("zx", TensorProto.UINT8, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    with pytest.raises(FileFormatError, match=text):
        from_qdq(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda _: "{", "metadata: pow2quant.grids: not JSON"),
        (lambda _: "[]", "metadata: pow2quant.grids: expected an object, got list"),
        (lambda t: t.replace("narrow", "wide"), "pow2quant.grids: .*: expected the keys bits, signed, narrow and axis"),
        (lambda t: t.replace('"bits": 5', '"bits": true'), "conv1.weight: impossible grid"),
        (lambda t: t.replace('"bits": 5', '"bits": 77'), "conv1.weight: bits: 77 is not a width"),
        (lambda t: t.replace('"bits": 5', '"bits": 11'), "conv1.weight/DequantizeLinear stores 8 bits, which cannot"),
        (lambda t: t.replace('"bits": 5', '"bits": 2'), "conv1.weight/DequantizeLinear holds values off the grid"),
        (lambda t: t.replace('"axis": 0', '"axis": null'), "conv1.weight/DequantizeLinear does not fit the metadata"),
        (lambda t: t.replace('"bits": 6', '"bits": 7', 1), "metadata: pow2quant.grids: x is not quantized to the grid"),
        (lambda t: t.replace('"bits": 6', '"bits": 7'), "relu1.output/QuantizeLinear has no Clip to the 7 bits"),
    ],
)
def test_corrupt_metadata(change, text):
    model = to_qdq(network(5, 6))
    for entry in model.metadata_props:
        entry.value = change(entry.value) if entry.key == GRIDS else entry.value
    with pytest.raises(FileFormatError, match=text):
        from_qdq(model)


def test_a_model_that_onnx_cannot_convert_is_refused():
    model = chain(helper.make_node("Neg", ["x"], ["y"]))
    model.opset_import[0].version = 2
    model.graph.node.add(op_type="NoSuchOperator", input=["y"], output=["w"])
    with pytest.raises(FileFormatError, match=r"cannot be converted from opset 2 to 21: ."):
        from_qdq(model)


# Errors in writing


@pytest.mark.parametrize(
    ("name", "enc", "text"),
    [
        ("conv9.weight", encoding(-3), "no tensor conv9.weight"),
        ("conv1.weight", encoding([-7, -7], 8, True, axis=0), r"conv1.weight: 2 scales on axis 0 .*\(4, 2, 3, 3\)"),
        ("conv1.weight", encoding(-3, 8, True), "conv1.weight: .* values are not on the grid"),
        ("conv1.weight", encoding(-9, 4, True), "conv1.weight: .* values are not on the grid"),
        ("conv1.bias", encoding(-15, 32, False), "conv1.bias: ONNX has no type for 32 bits, unsigned"),
        ("y", encoding(-8, 20, True), "y: ONNX has no type for 20 bits, signed: .* 8, 16 bits"),
        ("conv2.output", encoding([0, 0, 0, 0], 5, axis=1), "conv2.output: 5 bits per channel"),
    ],
)
def test_encodings_that_cannot_be_written(name, enc, text):
    artifact = network()
    with pytest.raises(EncodingError, match=text):
        to_qdq(Artifact(artifact.model, artifact.encodings | {name: enc}))


def test_weights_that_are_not_finite_or_not_float32():
    for values, text in ((np.float32([[np.nan]]), "NaN"), (np.float64([[1]]), "float64")):
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        model = model_of([helper.make_node("Neg", ["w"], ["y"])], {}, {"y": [1, 1]}, {"w": values})
        model.graph.output[0].type.tensor_type.elem_type = kind
        with pytest.raises(EncodingError, match=f"^w: .*{text}"):
            to_qdq(Artifact(model, {"w": encoding(0, 8, True)}))


def test_control_flow_is_refused():
    then = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["t"])], "b", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, [1])]
    )
    node = helper.make_node("If", ["c"], ["y"], "branch", then_branch=then, else_branch=then)
    model = model_of([node], {"x": [1]}, {"y": [1]}, {"c": np.array(True)})
    for act in (lambda: to_qdq(Artifact(model, {})), lambda: from_qdq(model)):
        with pytest.raises(UnsupportedModelError, match="If branch"):
            act()


# Files


def test_export_and_load(tmp_path):
    artifact = network()
    path = export_qdq(artifact, tmp_path / "new")
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    assert_same(from_qdq(load(path)), artifact)
    export_qdq(network(4), tmp_path / "new")
    assert from_qdq(load(path)).encodings == network(4).encodings


def test_corrupt_files_are_named(tmp_path):
    good = to_qdq(network()).SerializeToString()
    contents = {f"truncated-{n}": good[:n] for n in (1, 7, 100, len(good) // 2, len(good) - 40, len(good) - 1)}
    contents |= {f"random-{n}": np.random.default_rng(n).bytes(300) for n in range(5)}
    contents |= {"empty": b"", "json.onnx": b'{"version": "1.0.0"}', "json.json": b'{"version": "1.0.0"}'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    external = onnx.load_from_string(good)
    onnx.save(external, tmp_path / "external", save_as_external_data=True, location="data", size_threshold=0)
    assert from_qdq(load(tmp_path / "external")).encodings == network().encodings
    (tmp_path / "data").unlink()
    for name in (*contents, "external", "missing"):
        with pytest.raises(
            FileFormatError,
            match=rf"^{tmp_path / name}: (not a valid ONNX file: .|cannot be read: (no such file|is empty))",
        ) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_output_errors_leave_no_temporary_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/model.onnx: cannot be written: "):
        export_qdq(network(), tmp_path / "file")
    path = tmp_path / "model.onnx"
    path.write_text("previous")
    code = (  # a limit on the size of files is what a full disk does, without root
        "import resource, signal, sys; from pathlib import Path; import onnx\n"
        "from pow2quant.adapters.onnx_qdq import save\n"
        "model = onnx.helper.make_model(onnx.helper.make_graph([], 'g' * 5000, [], []))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "save(model, Path(sys.argv[1]))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "OutputError" in result.stderr.splitlines()[-1]
    assert "File too large" in result.stderr.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model.onnx"]
    assert path.read_text() == "previous"
    save(onnx.ModelProto(ir_version=10), path)
    assert path.read_text() != "previous"
