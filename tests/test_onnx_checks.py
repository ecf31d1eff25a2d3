"""What a network read from an ONNX file is compared with, and which files the comparison may not refuse."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.modules import Normalize
from pow2quant.frontends.onnx.network import read_network
from pow2quant.frontends.onnx.rows import ROWS
from pow2quant.frontends.prepare import prepare
from tests.test_onnx_reader import INTS, N, floats, model_of


def test_values_that_nearly_cancel_are_compared_by_what_rounding_does_to_them() -> None:
    """The variance as E[x^2] - E[x]^2, of a thousand times its own size: no two programs agree to 1e-4."""
    nodes = [
        N("Gemm", ["x", "w", "b"], ["h"], "linear", transB=1),
        N("Mul", ["h", "h"], ["q"], "square"),
        N("ReduceMean", ["q"], ["mq"], "mean_of_squares", axes=[1]),
        N("ReduceMean", ["h"], ["m"], "mean", axes=[1]),
        N("Mul", ["m", "m"], ["mm"], "square_of_mean"),
        N("Sub", ["mq", "mm"], ["y"], "variance"),
    ]
    constants = {"w": floats(2000, 6) * 0.1, "b": np.full(2000, 30, np.float32)}
    model = model_of(nodes, [2, 6], constants)
    network, x = read_network(model), torch.from_numpy(floats(2, 6))
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})[0]
    far = float(np.abs(network(x).detach().numpy() - wanted).max() / np.abs(wanted).max())
    assert 1e-4 < far < 1e-1


def test_a_wrong_node_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of([N("Mul", ["x", "w"], ["p"], "scaled"), N("Cos", ["p"], ["y"], "wave")], [2, 6], {"w": floats(6)})
    read_network(model)
    monkeypatch.setitem(ROWS, "Cos", lambda s, x: torch.cos(x) * 1.001)
    with pytest.raises(UnsupportedModelError, match="'y' is not what onnxruntime computes"):
        read_network(model)


def test_a_wrong_node_is_found_when_the_sizes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file leaves them open, so nothing can be compared when it is read; also where a module calls the network."""
    monkeypatch.setitem(ROWS, "Cos", lambda s, x: torch.cos(x) * 1.001)
    for batch in ("n", 4):
        network = read_network(model_of([N("Cos", ["x"], ["y"], "wave")], [batch, 3, "height", "width"], {}))
        for model in (network, nn.Sequential(nn.Conv2d(3, 3, 1), copy.deepcopy(network))):
            with pytest.raises(UnsupportedModelError, match="'y' is not what onnxruntime computes"):
                prepare(model, torch.randn(2, 3, 4, 6))


def test_small_values_of_a_sigmoid_are_as_good_as_onnxruntime_computes_them() -> None:
    nodes = [N("Conv", ["x", "w", "b"], ["c"], "conv"), N("Sigmoid", ["c"], ["y"], "probability")]
    model = model_of(nodes, [1, 3, 6, 6], {"w": floats(4, 3, 3, 3) * 0.01, "b": np.full(4, -14, np.float32)})
    x = torch.from_numpy(floats(4, 3, 6, 6))
    assert prepare(read_network(model), x)(x).max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "pads", "mode"),
    [
        (["n", 4, 5, 3], [0, 1, 2, 0, 0, 3, 1, 0], "reflect"),
        (["n", 6, 3], [0, 2, 0, 0, 1, 0], "edge"),
        (["n", 9], [0, 3, 0, 2], "reflect"),
        (["n", 2, 3, 4], [0, 1, 0, 2, 0, 1, 0, 1], "wrap"),
        ([1, 3, 5, 5], [0, 0, 1, 1, 0, 0, 1, 1], "reflect"),
    ],
)
def test_any_dimension_but_the_batch_is_padded_by_values_of_its_own(
    shape: list[int | str], pads: list[int], mode: str
) -> None:
    model = model_of([N("Pad", ["x", "p"], ["y"], "pad", mode=mode)], shape, {"p": INTS(pads)}, 19)
    x = floats(2, *(int(d) for d in shape[1:]))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    parts = [x[:1], x[1:]] if shape[0] == 1 else [x]
    wanted = np.concatenate([session.run(None, {"x": part})[0] for part in parts])
    prepared = prepare(read_network(model), torch.from_numpy(x))
    np.testing.assert_array_equal(prepared(torch.from_numpy(x)), wanted)
    if len(shape) == 4 and not any(pads[:2]):
        assert len(list(prepared.graph.nodes)) == 4  # one `Take` for each dimension, nothing is moved for it


def test_inputs_that_differ_in_their_first_dimension_are_one_line() -> None:
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["n", 8]), ("state", [2, 1, 4]))
    ]
    graph = helper.make_graph(
        [N("Reshape", ["state", "flat"], ["s"], "flat"), N("Concat", ["x", "s"], ["y"], "join", axis=1)],
        "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(INTS([1, 8]), "flat")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(UnsupportedModelError, match=r"first dimension \('x': open, 'state': 2\); it must be the batch"):
        read_network(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_normalize_by_parts_is_one_operation(dynamo: bool, tmp_path: Path) -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(self.layer(x))

    torch.manual_seed(0)
    model, x = Embedding().eval(), torch.randn(4, 6)
    torch.onnx.export(model, (x[:1],), tmp_path / "m.onnx", dynamo=dynamo, verbose=False)
    both = [prepare(network, x) for network in (model, read_network(tmp_path / "m.onnx"))]
    assert [[type(module) for module in network.children()] for network in both] == [[nn.Linear, Normalize]] * 2
    torch.testing.assert_close(both[1](x), both[0](x), rtol=0, atol=0)
