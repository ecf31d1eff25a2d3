"""LSTM, GRU, RNN and Attention of ONNX files: what onnxruntime computes, unrolled, with PyTorch's codes."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import pow2quant
from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.onnx.network import read_network
from pow2quant.frontends.prepare import prepare
from pow2quant.frontends.unrolled import UNROLLED
from pow2quant.runs import simulate

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
LENGTH, CHANNELS, HIDDEN = 4, 5, 6
FORMS = [("forward", ("y",)), ("reverse", ("y", "h")), ("bidirectional", ("y", "h")), ("bidirectional", ("", "h"))]


def file_of(nodes, shapes, initializers, outputs, opset=14):
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    held = [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    graph = helper.make_graph(nodes, "g", inputs, ends, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10 if opset < 23 else 11)


def recurrent(kind, outputs, direction="forward", bias=True, state=False, **attributes):
    """A file whose input, state and results have the batch in front."""
    generator = np.random.default_rng(0)
    directions = 2 if direction == "bidirectional" else 1

    def weight(*shape):
        return generator.normal(size=shape).astype(np.float32) * 0.5

    rows = GATES[kind] * HIDDEN
    held = {"w": weight(directions, rows, CHANNELS), "r": weight(directions, rows, HIDDEN)}
    held |= {"b": weight(directions, 2 * rows)} if bias else {}
    operands = ["xt", "w", "r", "b" if bias else "", "", *(["st"] * (2 if kind == "LSTM" else 1) if state else [])]
    attributes |= {"linear_before_reset": 1} if kind == "GRU" and "linear_before_reset" not in attributes else {}
    nodes = [helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0, 2])]
    nodes += [helper.make_node("Transpose", ["s"], ["st"], perm=[1, 0, 2])] if state else []
    nodes.append(
        helper.make_node(kind, operands, outputs, "layer", hidden_size=HIDDEN, direction=direction, **attributes)
    )
    ends = [name for name in outputs if name]
    for name in ends:
        order = [2, 0, 1, 3] if name == "y" else [1, 0, 2]
        nodes.append(helper.make_node("Transpose", [name], [f"{name}_end"], perm=order))
    shapes = {"x": ["n", LENGTH, CHANNELS]} | ({"s": ["n", directions, HIDDEN]} if state else {})
    return file_of(nodes, shapes, held, [f"{name}_end" for name in ends])


def same_as_onnxruntime(model, *inputs):
    """Compares the network that is read, and the prepared one, for another batch than that of the preparation."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    expected = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    network = read_network(model)
    for one in (network, prepare(network, tuple(x[:2] for x in inputs))):
        with torch.no_grad():
            results = one(*inputs)
        for got, wanted in zip(results if isinstance(results, tuple) else (results,), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(("direction", "outputs"), FORMS)
def test_every_direction_and_result(kind, direction, outputs):
    same_as_onnxruntime(recurrent(kind, outputs, direction), torch.randn(3, LENGTH, CHANNELS))


@pytest.mark.parametrize("kind", GATES)
def test_no_bias_and_a_first_state_that_is_an_input(kind):
    model = recurrent(kind, ("y", "h"), "bidirectional", bias=False, state=True)
    same_as_onnxruntime(model, torch.randn(3, LENGTH, CHANNELS), torch.randn(3, 2, HIDDEN))


def test_the_last_cell_and_an_rnn_with_relu():
    x = torch.randn(3, LENGTH, CHANNELS)
    same_as_onnxruntime(recurrent("LSTM", ("", "", "c")), x)
    same_as_onnxruntime(recurrent("RNN", ("y",), activations=["Relu"]), x)


@pytest.mark.parametrize(
    ("kind", "attributes", "words"),
    [
        ("GRU", {"linear_before_reset": 0}, "linear_before_reset=0"),
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"]}, "activations Sigmoid, Relu, Tanh"),
        ("RNN", {"clip": 1.0}, "clip"),
    ],
)
def test_what_is_not_supported_is_one_line(kind, attributes, words):
    with pytest.raises(UnsupportedModelError, match=words) as error:
        read_network(recurrent(kind, ("y",), **attributes))
    assert "layer" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_codes_are_those_of_the_pytorch_layer(kind, tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = kind(CHANNELS, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 3)

        def forward(self, x):
            return self.head(self.layer(x)[0][:, -1])

    torch.manual_seed(0)
    same_codes(Network().eval(), tmp_path / "m.onnx")


def same_codes(model, path, dynamo=False):
    """Compares the simulations of a network and of the file that PyTorch exports of it."""
    x = torch.randn(8, LENGTH, CHANNELS)
    open_batch = {"dynamic_shapes": [{0: torch.export.Dim.DYNAMIC}]} if dynamo else {"dynamic_axes": {"x": {0: "n"}}}
    torch.onnx.export(model, (x,), path, input_names=["x"], dynamo=dynamo, verbose=False, **open_batch)
    network = read_network(path)
    assert {len(one.meta[UNROLLED]) for one in (prepare(model, x), prepare(network, x))} == {1}
    results = []
    for one in (model, network):
        simulation = simulate(one, x)
        simulation.calibrate([x])
        with torch.no_grad():
            results.append(simulation.model(x))
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize(
    ("cell", "options", "dynamo"),
    [
        (nn.LSTMCell, {}, True),
        (nn.LSTMCell, {"bias": False}, False),
        (nn.GRUCell, {}, False),
        (nn.RNNCell, {"nonlinearity": "relu"}, False),
    ],
)
def test_codes_are_those_of_a_loop_over_a_cell(cell, options, dynamo, tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = cell(CHANNELS, HIDDEN, **options), nn.Linear(HIDDEN, 3)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if cell is nn.LSTMCell else state)

    torch.manual_seed(0)
    same_codes(Network().eval(), tmp_path / "m.onnx", dynamo)


def test_two_layers_that_are_added_before_a_tanh_stay_two_layers():
    rows = {"w": (HIDDEN, CHANNELS), "r": (HIDDEN, HIDDEN), "b": (HIDDEN,)}
    held = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32) for name, shape in rows.items()}
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["left"], "left", transB=1),
        helper.make_node("Gemm", ["z", "r", "b"], ["right"], "right", transB=1),
        helper.make_node("Add", ["left", "right"], ["sum"], "sum"),
        helper.make_node("Tanh", ["sum"], ["y"], "tanh"),
    ]
    model = file_of(nodes, {"x": ["n", CHANNELS], "z": ["n", HIDDEN]}, held, ["y"])
    assert {"left", "right"} <= dict(read_network(model).named_modules()).keys()
    same_as_onnxruntime(model, torch.randn(3, CHANNELS), torch.randn(3, HIDDEN))


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("causal", [0, 1])
def test_attention(flat, causal):
    heads = {"q_num_heads": 4, "kv_num_heads": 2} if flat else {}
    wide, narrow = ([6, 32], [6, 16]) if flat else ([4, 6, 8], [2, 6, 8])
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], "attend", is_causal=causal, **heads)
    model = file_of([node], {"q": ["n", *wide], "k": ["n", *narrow], "v": ["n", *narrow]}, {}, ["y"], opset=23)
    same_as_onnxruntime(model, *(torch.randn(3, *shape) for shape in (wide, narrow, narrow)))


def test_open_dimensions_written_as_minus_one_and_factors_beside_a_fixed_batch():
    resize = helper.make_node(
        "Resize", ["x", "", "scales"], ["y"], "up", mode="nearest", coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )  # fmt: skip
    scales = {"scales": np.array([1, 1, 2, 2], np.float32)}
    x = torch.randn(1, 3, 4, 4)
    for batch in (-1, 1):
        same_as_onnxruntime(file_of([resize], {"x": [batch, 3, 4, 4]}, scales, ["y"], 13), x)


def test_a_signal_without_channels_is_mirrored():
    pad = helper.make_node("Pad", ["x", "pads"], ["y"], "mirror", mode="reflect")
    held = {"pads": np.array([0, 3, 0, 2])}
    same_as_onnxruntime(file_of([pad], {"x": ["n", 8]}, held, ["y"], 13), torch.randn(3, 8))


def test_the_length_of_unrolled_layers_is_said():
    class Notes:
        def __init__(self):
            self.lines = []

        def track(self, items, title, total=None):
            yield from items

        def note(self, text):
            self.lines.append(text)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(CHANNELS), nn.GRU(CHANNELS, HIDDEN, batch_first=True)

        def forward(self, x):
            return self.layer(self.norm(x.transpose(1, 2)).transpose(1, 2))[0][:, -1]

    notes = Notes()
    result = pow2quant.quantize(Network(), [torch.randn(8, LENGTH, CHANNELS)], progress=notes)
    assert result.report["unrolled"] == {"layer": LENGTH}
    assert [line for line in notes.lines if line.startswith(f"layer: unrolled over {LENGTH} steps")]
