"""Single operations of float ONNX files: as in onnxruntime, and with the simulation's bits once they are quantized."""

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

from pow2quant import QuantPlan, prepare, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.onnx.network import read_network
from pow2quant.validation import ort

INTS = np.int64
ROWS = np.stack(np.meshgrid([1, 0], [3, 2, 2], indexing="ij"), -1)
"""Places of a matrix, (2, 3, 2)."""


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def of_sample(places: Any) -> np.ndarray[Any, Any]:
    """Places in the only sample of a batch."""
    given = np.asarray(places)[None]
    return np.concatenate([np.zeros_like(given[..., :1]), given], -1)


def node(
    kind: str, shape: tuple[Any, ...], *operands: Any, opset: int = 21, batch: int = 1, **attributes: Any
) -> onnx.ModelProto:
    """An operation of `x`, of this shape behind a batch of one, and constants; text names another tensor."""
    names = [v if isinstance(v, str) else "" if v is None else f"c{i}" for i, v in enumerate(operands)]
    constants = [numpy_helper.from_array(np.asarray(v), f"c{i}") for i, v in enumerate(operands) if v is not None]
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "one"], ["scaled"], "scale"),
            helper.make_node(kind, ["scaled", *names], ["y"], "it", **attributes),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [*constants, numpy_helper.from_array(np.float32(1.5), "one")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def resized(
    high: float, wide: float, place: str = "half_pixel", rounding: str = "round_prefer_floor"
) -> onnx.ModelProto:
    """The nearest values of a map of 7 x 6."""
    how = {"mode": "nearest", "coordinate_transformation_mode": place, "nearest_mode": rounding}
    return node("Resize", (2, 7, 6), None, np.float32([1, 1, high, wide]), **how)


FILES: dict[str, onnx.ModelProto] = {
    "GatherElements": node("GatherElements", (4, 5), INTS([[[0, 3], [1, 1]]]), axis=1),
    "GatherND": node("GatherND", (4, 5), INTS(of_sample(ROWS))),
    "GatherND, rows": node("GatherND", (4, 5), INTS(of_sample([[3], [0]]))),
    "ScatterND": node("ScatterND", (4, 5), INTS(of_sample(ROWS)), floats(1, 2, 3)),
    "ScatterND, rows": node("ScatterND", (4, 5), INTS(of_sample([[-1], [0]])), floats(1, 2, 5)),
    "ScatterND, added": node("ScatterND", (4,), INTS(of_sample([[1], [1]])), floats(1, 2), reduction="add"),
    "ScatterElements": node(
        "ScatterElements", (4, 5), INTS([[[0, 3], [1, 1]]]), floats(1, 2, 2), axis=1
    ),
    "ScatterElements, added": node(
        "ScatterElements", (4,), INTS([[1, 1]]), floats(1, 2), axis=1, reduction="add"
    ),
    "GridSample": node("GridSample", (2, 4, 5), np.tanh(floats(1, 3, 3, 2)), opset=20),
    "GridSample, opset 16": node(
        "GridSample", (2, 4, 5), np.tanh(floats(1, 3, 3, 2)), opset=16, mode="nearest",
        padding_mode="border", align_corners=1,
    ),
    "AffineGrid": node("AffineGrid", (2, 3), INTS([1, 1, 4, 5]), opset=20),
    "Swish": node("Swish", (4, 5), opset=24, alpha=0.5),
    "ReduceLogSum": node("ReduceLogSum", (4,), INTS([1])),
    "CumSum from the end": node("CumSum", (4, 5), INTS(1), reverse=1),
    "Mod, of the dividend's sign": node("Mod", (4, 5), np.float32(0.7), fmod=1),
    "Shrink, hard": node("Shrink", (4, 5), lambd=0.3),
    "Shrink, soft": node("Shrink", (4, 5), lambd=0.3, bias=0.3),
    "Mean": node("Mean", (4, 5), "x", floats(4, 5)),
    "ReduceProd of two dimensions": node("ReduceProd", (2, 3), INTS([1, 2]), keepdims=0),
    "GlobalLpPool": node("GlobalLpPool", (4, 5)),
    "Selu, of other constants": node("Selu", (4, 5), alpha=3.0, gamma=0.7),
    "PRelu along the last dimension": node("PRelu", (4, 5), np.abs(floats(5))),
    "Resize to half": resized(0.5, 0.5),
    "Resize by its scales, not by the sizes": resized(1.5, 0.7, "asymmetric", "floor"),
    **{
        f"Resize, {place}, {rounding}": resized(2.0, 3.0, place, rounding)
        for place in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    },
    "MaxPool as a small YOLO has it": node(
        "MaxPool", (2, 7, 9), kernel_shape=[2, 2], strides=[1, 1], auto_pad="SAME_UPPER"
    ),
    "MaxPool, padded in front": node("MaxPool", (2, 7, 9), kernel_shape=[3, 3], strides=[1, 2], pads=[1, 1, 0, 0]),
    "MaxPool, a window in the padding": node(
        "MaxPool", (2, 7, 9), kernel_shape=[2, 2], strides=[2, 2], pads=[1] * 4, ceil_mode=1
    ),
    "AveragePool, padded in front alone": node(
        "AveragePool", (2, 7, 9), kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_LOWER"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_an_operation_is_as_in_onnxruntime_and_has_the_simulations_bits(name: str, tmp_path: Path) -> None:
    onnx.save(FILES[name], tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    x = torch.rand(2, *(d.dim_value for d in FILES[name].graph.input[0].type.tensor_type.shape.dim[1:]))
    network = prepare(read_network(tmp_path / "net.onnx"), x)
    with torch.no_grad():
        expected = np.concatenate([session.run(None, {"x": one[None].numpy()})[0] for one in x])
        bound = 1e-4 if name == "GridSample" else 1e-6  # constant weights have a common divisor
        np.testing.assert_allclose(network(x).numpy(), expected, 1e-5, bound)
    sim = simulate(network, x, QuantPlan.default())
    sim.calibrate([x])
    path = onnx_qdq.export_qdq(sim.export(x), tmp_path / "run")
    with torch.no_grad():
        expected = sim.model(x).numpy()
    assert all(np.array_equal(e.run([x.numpy()])[0], expected) for e in ort.executors(path))


class Scripted(nn.Module):
    """What torch's older exporter writes with a state of zeros, a sequence of tensors, and values at places."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        x[:, 1:3] = 0
        first, second = torch.tensor_split(self.cell(x)[0], 2, 1)
        return torch.cat([second, first], 1)


def test_tokens_are_chosen_as_by_an_embedding(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("OneHot", ["tokens", "depth", "ends"], ["h"], "hot"),
            helper.make_node("MatMul", ["h", "w"], ["y"], "table"),
        ],
        "g",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in (("depth", INTS(5)), ("ends", np.float32([0, 1])), ("w", floats(5, 3)))
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "t.onnx")
    tokens = torch.tensor([[0, 4, 1, 3], [2, 2, 0, 1]])
    with torch.no_grad():
        found = prepare(read_network(tmp_path / "t.onnx"), tokens)(tokens).numpy()
    np.testing.assert_array_equal(found, floats(5, 3)[tokens.numpy()])


def test_a_quotient_of_integers_is_rounded_towards_zero(tmp_path: Path) -> None:
    nodes = [
        *(("Sub", ["tokens", "shift"], "s"), ("Div", ["s", "by"], "q")),
        *(("Add", ["q", "shift"], "t"), ("Gather", ["w", "t"], "y")),
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, given, [to]) for kind, given, to in nodes],
        "g",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in (("shift", INTS(4)), ("by", INTS(3)), ("w", floats(9, 3)))
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "t.onnx")
    tokens = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 8]])
    with torch.no_grad():
        found = prepare(read_network(tmp_path / "t.onnx"), tokens)(tokens).numpy()
    np.testing.assert_array_equal(found, floats(9, 3)[[[3, 3, 4, 4], [4, 4, 4, 5]]])


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_torchs_older_exporter_is_as_in_onnxruntime(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", torch.randn(2, 6)
    torch.onnx.export(Scripted(), (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        found = prepare(read_network(path), x)(x).numpy()
    np.testing.assert_allclose(found, session.run(None, {"x": x.numpy()})[0], 1e-5, 1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.ELU(), nn.Hardtanh()], ids=repr)
def test_a_file_that_was_not_optimized(activation: nn.Module, tmp_path: Path) -> None:
    """Constants are cast to the type of what is computed."""
    path, x = tmp_path / "net.onnx", torch.randn(2, 6)
    network = nn.Sequential(nn.Linear(6, 5), activation).eval()
    torch.onnx.export(network, (x,), path, dynamo=True, optimize=False, verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(prepare(read_network(path), x)(x), network(x))


@pytest.mark.parametrize("opset", [13, 17, 19, 21])
def test_weights_that_are_stored_in_8_bits(opset: int, tmp_path: Path) -> None:
    codes, scale = np.arange(-6, 6, dtype=np.int8).reshape(4, 3), np.float32(0.25)
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["c", "s"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(codes, "c"), numpy_helper.from_array(scale, "s")],
    )
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "net.onnx")
    x = torch.randn(2, 4)
    with torch.no_grad():
        found = prepare(read_network(tmp_path / "net.onnx"), x)(x)
    torch.testing.assert_close(found, x @ torch.from_numpy(codes * scale))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (node("ScatterND", (4,), INTS([[[0, 1]], [[1, 2]]]), floats(2, 1), batch=2), "not the same in each sample"),
        (node("ScatterND", (4,), INTS(of_sample([[1]])), floats(1, 1), reduction="max"), "reduction 'max'"),
        (node("CumSum", (4, 5), INTS(1), exclusive=1), "exclusive sums"),
        (node("ArgMax", (4, 5), select_last_index=1), "the last of equal values"),
        (node("Shrink", (4, 5), bias=0.1), "a bias other than 0 and lambd"),
    ],
)
def test_what_is_not_read_is_named(model: onnx.ModelProto, words: str, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "net.onnx")
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    with pytest.raises(UnsupportedModelError, match=f"node 'it' .*{words}"):
        prepare(read_network(tmp_path / "net.onnx"), torch.randn(2, *shape))
