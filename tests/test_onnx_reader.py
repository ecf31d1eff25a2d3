"""Float ONNX files become networks: equal to onnxruntime, under the file's names, with PyTorch's codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from pow2quant import models
from pow2quant.errors import FileFormatError, Pow2QuantError, UnsupportedModelError, WeightsError
from pow2quant.frontends.onnx.network import read_network
from pow2quant.frontends.prepare import is_prepared, prepare
from pow2quant.runs import simulate


class Mixed(nn.Module):
    """On images: convolutions, SiLU, hard swish, a sum; on tokens: products as in attention, GELU, norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.pool = nn.MaxPool2d(2)
        self.position = nn.Parameter(torch.randn(1, 4, 8))
        self.norm = nn.LayerNorm(8)
        self.query = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.bn1(self.conv1(x)))
        x = self.pool(nn.functional.hardswish(self.conv2(x)) + x)
        tokens = x.flatten(2).transpose(1, 2) + self.position
        tokens = nn.functional.gelu(self.query(self.norm(tokens)))
        weights = torch.softmax(tokens @ tokens.transpose(1, 2) / 8**0.5, -1)
        result: Tensor = self.head((weights @ tokens).mean(1))
        return result


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    torch.manual_seed(0)
    model = Mixed()
    model.bn1.running_mean, model.bn1.running_var = torch.randn(8), torch.rand(8) + 0.5
    return model.eval()


def exported(model: nn.Module, x: Tensor, path: Path, **options: Any) -> Path:
    torch.onnx.export(model, (x,), path, verbose=False, input_names=["image"], output_names=["logits"], **options)
    return path


EXPORTS: dict[str, dict[str, Any]] = {
    "dynamo": {"dynamo": True, "dynamic_shapes": {"x": {0: "n"}}},
    "dynamo, fixed batch": {"dynamo": True},
    "script, opset 13": {"dynamo": False, "opset_version": 13, "dynamic_axes": {"image": {0: "n"}}},
    "script, opset 17, fixed batch": {"dynamo": False, "opset_version": 17},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", EXPORTS)
def test_codes_are_those_of_the_pytorch_network(mixed: nn.Module, tmp_path: Path, form: str) -> None:
    path = exported(
        mixed, torch.randn(2 if "dynamic" in str(EXPORTS[form]) else 1, 3, 8, 8), tmp_path / "m.onnx", **EXPORTS[form]
    )
    network = models.build(str(path))
    x = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(network(x), mixed(x), rtol=1e-5, atol=1e-6)
    results = []
    for model in (mixed, network):
        sim = simulate(model, x)
        sim.calibrate([x])
        with torch.no_grad():
            results.append(sim.model(x))
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore")
def test_names_stay_and_the_network_trains(mixed: nn.Module, tmp_path: Path) -> None:
    network = read_network(exported(mixed, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", **EXPORTS["dynamo"]))
    nodes = {n.name for n in onnx.load(tmp_path / "m.onnx").graph.node}
    prepared = prepare(network, torch.randn(2, 3, 8, 8))
    assert is_prepared(prepared)
    called = [str(n.target) for n in prepared.graph.nodes if n.op == "call_module"]
    assert {"conv1", "conv2", "position", "norm", "query", "head"} <= set(called)
    assert {"node_softmax", "node_mean"} <= set(called) & nodes
    assert [n.target for n in prepared.graph.nodes if n.op == "placeholder"] == ["image"]
    prepared.train()
    prepared(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())


def model_of(
    nodes: list[onnx.NodeProto], shape: list[Any], constants: dict[str, Any], opset: int = 17, outputs: int = 1
) -> onnx.ModelProto:
    names = [f"y{i}" if i else "y" for i in range(outputs)]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


N = helper.make_node
INTS = np.int64
W = floats(4, 3, 3, 3)
FILES: dict[str, onnx.ModelProto] = {
    "NHWC between transposes, SAME_UPPER": model_of(
        [
            N("Transpose", ["x"], ["t"], "in", perm=[0, 3, 1, 2]),
            N("Conv", ["t", "w"], ["c"], "conv", auto_pad="SAME_UPPER", strides=[2, 2]),
            N("Clip", ["c", "low", "six"], ["r"], "relu6"),
            N("Transpose", ["r"], ["y"], "out", perm=[0, 2, 3, 1]),
        ],
        ["n", 8, 8, 3],
        {"w": W, "low": np.float32(0), "six": np.float32(6)},
    ),
    "shape arithmetic": model_of(
        [
            N("Shape", ["x"], ["s"], "shape"),
            N("Constant", [], ["zero"], "zero", value_int=0),
            N("Gather", ["s", "zero"], ["n"], "gather"),
            N("Unsqueeze", ["n", "axes"], ["n1"], "unsqueeze"),
            N("Concat", ["n1", "rest"], ["wanted"], "concat", axis=0),
            N("Reshape", ["x", "wanted"], ["r"], "reshape"),
            N("MatMul", ["r", "m"], ["p"], "product"),
            N("Add", ["b", "p"], ["y"], "bias"),
        ],
        ["n", 3, 2],
        {"axes": INTS([0]), "rest": INTS([-1]), "m": floats(6, 5), "b": floats(5)},
    ),
    "heads of a fixed batch": model_of(
        [
            N("Reshape", ["x", "split"], ["h"], "split"),
            N("Transpose", ["h"], ["t"], "heads", perm=[0, 2, 1, 3]),
            N("Reshape", ["t", "merged"], ["m"], "merge"),
            N("Relu", ["m"], ["r"], "relu"),
            N("Reshape", ["r", "flat"], ["y"], "flat"),
        ],
        [1, 5, 6],
        {"split": INTS([1, 5, 2, 3]), "merged": INTS([2, 5, 3]), "flat": INTS([1, -1])},
    ),
    "flattened with a batch of one": model_of(
        [N("Relu", ["x"], ["r"], "relu"), N("Flatten", ["r"], ["y"], "flat", axis=0)], [1, 5, 6], {}, 9
    ),
    "layer norm by parts": model_of(
        [
            N("ReduceMean", ["x"], ["m"], "mean", axes=[-1]),
            N("Sub", ["x", "m"], ["d"], "centre"),
            N("Mul", ["d", "d"], ["q"], "square"),
            N("ReduceMean", ["q"], ["v"], "variance", axes=[-1]),
            N("Add", ["v", "eps"], ["e"], "shift"),
            N("Sqrt", ["e"], ["s"], "root"),
            N("Div", ["d", "s"], ["u"], "normed"),
            N("Mul", ["scale", "u"], ["g"], "scaled"),
            N("Add", ["g", "b"], ["y"], "norm"),
        ],
        ["n", 4, 8],
        {"eps": np.float32(1e-5), "scale": floats(8), "b": floats(8)},
    ),
    "hard swish by parts, opset 9": model_of(
        [
            N("Conv", ["x", "w"], ["c"], "conv", pads=[0, 0, 1, 1]),
            N("Add", ["c", "three"], ["a"], "add"),
            N("Clip", ["a"], ["k"], "clip", min=0.0, max=6.0),
            N("Mul", ["c", "k"], ["p"], "mul"),
            N("Div", ["p", "six"], ["y"], "swish"),
        ],
        ["n", 3, 6, 6],
        {"w": W, "three": np.float32(3), "six": np.float32(6)},
        9,
    ),
    "tanh gelu by parts": model_of(
        [
            N("Pow", ["x", "three"], ["c"], "cube"),
            N("Mul", ["c", "k"], ["ck"], "ck"),
            N("Add", ["x", "ck"], ["i"], "inner"),
            N("Mul", ["i", "root"], ["u"], "u"),
            N("Tanh", ["u"], ["t"], "tanh"),
            N("Add", ["t", "one"], ["a"], "a"),
            N("Mul", ["x", "a"], ["p"], "p"),
            N("Mul", ["p", "half"], ["y"], "gelu"),
        ],
        ["n", 4, 8],
        {"three": np.float32(3), "k": np.float32(0.044715), "root": np.float32((2 / np.pi) ** 0.5),
         "one": np.float32(1), "half": np.float32(0.5)},
    ),
    "a window over the edge, a result that nothing reads": model_of(
        [
            N("Dropout", ["x"], ["d", "mask"], "dropout"),
            N("AveragePool", ["d"], ["y"], "mean", kernel_shape=[7, 7], pads=[0, 0, 1, 1]),
        ],
        ["n", 4, 6, 6],
        {},
        9,
    ),
    "several outputs, split, pad, pools": model_of(
        [
            N("Pad", ["x", "pads"], ["p"], "pad"),
            N("Split", ["p"], ["a", "b"], "split", axis=1),
            N("MaxPool", ["a"], ["y"], "max", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
            N("AveragePool", ["b"], ["y1"], "mean", kernel_shape=[2, 2], strides=[2, 2]),
        ],
        ["n", 4, 8, 8],
        {"pads": INTS([0, 0, 0, 0, 0, 0, 0, 0])},
        outputs=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_what_onnxruntime_gives_for_every_batch(name: str, tmp_path: Path) -> None:
    onnx.save(FILES[name], tmp_path / "m.onnx")
    network = read_network(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    fixed = session.get_inputs()[0].shape[0] == 1
    x = floats(4, *session.get_inputs()[0].shape[1:])
    parts = [x[i : i + 1] for i in range(4)] if fixed else [x]
    expected = [np.concatenate(runs) for runs in zip(*(session.run(None, {"x": p}) for p in parts), strict=True)]
    for model in (network, prepare(network, torch.from_numpy(x))):
        with torch.no_grad():
            results = model(torch.from_numpy(x))
        for got, wanted in zip(results if isinstance(results, tuple) else (results,), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(np.abs(wanted).max()))


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("layer norm by parts", nn.LayerNorm),
        ("hard swish by parts, opset 9", nn.Hardswish),
        ("tanh gelu by parts", nn.GELU),
        ("shape arithmetic", nn.Linear),
    ],
)
def test_functions_by_parts_become_one_module(name: str, operation: type[nn.Module]) -> None:
    model = FILES[name]
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    prepared = prepare(read_network(model), torch.randn(2, *shape))
    kinds = [type(prepared.get_submodule(str(n.target))) for n in prepared.graph.nodes if n.op == "call_module"]
    assert (
        sum(issubclass(kind, operation) or kind.__name__.lower() == operation.__name__.lower() for kind in kinds) == 1
    )
    assert len(kinds) == len([n for n in kinds if n.__name__ != "Add" and n.__name__ != "Scale"])


def test_weights_beside_the_file_are_read_and_paths_outside_are_not(tmp_path: Path) -> None:
    model = FILES["shape arithmetic"]
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    assert read_network(tmp_path / "m.onnx")(torch.randn(3, 3, 2)).shape == (3, 5)
    stored = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    (tmp_path / "inner").mkdir()
    for tensor in stored.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../m.bin"
    (tmp_path / "inner" / "m.onnx").write_bytes(stored.SerializeToString())
    with pytest.raises(FileFormatError, match=r"external data .* are not a file in"):
        read_network(tmp_path / "inner" / "m.onnx")


def test_hostile_sizes_are_refused_before_they_are_made() -> None:
    huge = INTS([1, 1 << 20, 1 << 20])
    expand = model_of([N("Expand", ["x", "s"], ["y"], "grow")], ["n", 1, 1], {"s": huge})
    with pytest.raises(UnsupportedModelError, match=r"node 'grow' \(Expand\): makes a tensor of shape"):
        read_network(expand)
    constant = model_of(
        [N("ConstantOfShape", ["s"], ["c"], "fill"), N("Add", ["x", "c"], ["y"], "add")], ["n", 1, 1], {"s": huge}
    )
    with pytest.raises(UnsupportedModelError, match=r"node 'fill' \(ConstantOfShape\): .*more than"):
        read_network(constant)


def test_errors_are_one_line_with_file_node_and_operation(tmp_path: Path) -> None:
    onnx.save(model_of([N("Det", ["x"], ["y"], "determinant")], ["n", 3, 3], {}), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModelError, match=r"m\.onnx: node 'determinant' \(Det\): Det is not supported"):
        models.build(str(tmp_path / "m.onnx"))
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf")
    for name, error in (("bad.onnx", FileFormatError), ("none.onnx", FileFormatError)):
        with pytest.raises(error, match=name):
            models.build(str(tmp_path / name))
    weights = model_of([N("MatMul", ["x", "w"], ["y"], "p")], ["n", 2], {"w": np.full((2, 2), np.nan, np.float32)})
    with pytest.raises(WeightsError, match="w holds NaN"):
        read_network(weights)
    cycle = model_of([N("Relu", ["y"], ["z"], "a"), N("Relu", ["z"], ["y"], "b")], ["n", 2], {})
    with pytest.raises(Pow2QuantError, match="a cycle, or a missing tensor"):
        read_network(cycle)
