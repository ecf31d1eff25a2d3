"""QDQ files that other tools wrote: what is read of them, and what cannot be read is named."""

from __future__ import annotations

import functools
from collections import OrderedDict

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from pow2quant.adapters.onnx_qdq import from_qdq, load, to_qdq
from pow2quant.errors import FileFormatError
from pow2quant.pow2_constraints import IntGrid
from tests.qdq_networks import assert_same, encoding, model_of, network, run


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


def bounded(op, *ends):
    """x -> Relu or Clip -> Q `q` to 4 bits -> DQ -> relu."""
    nodes = pair("s", "eight")
    nodes[0].input[0] = "bounded"
    return [helper.make_node(op, ["x", *ends], ["bounded"]), *nodes]


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
    (bounded("Relu"), "q stores 4 bits behind a Relu"),
    (bounded("Clip", "s", "s2"), "q stores 4 bits behind a Clip"),
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
    constants["eight"] = np.asarray(8).astype(helper.tensor_dtype_to_np_dtype(TensorProto.UINT4))
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


def test_a_model_that_onnx_cannot_convert_is_refused():
    model = chain(helper.make_node("Neg", ["x"], ["y"]))
    model.opset_import[0].version = 2
    model.graph.node.add(op_type="NoSuchOperator", input=["y"], output=["w"])
    with pytest.raises(FileFormatError, match=r"cannot be converted from opset 2 to 21: ."):
        from_qdq(model)
