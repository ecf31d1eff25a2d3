"""What is measured for a report: noise, histograms, samples, the drawing of the network, latency."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pow2quant import models
from pow2quant.backends import samples
from pow2quant.pow2_constraints import Encoding, IntGrid
from pow2quant.report import graph, histograms, network, statistics
from pow2quant.report.html import render
from pow2quant.runs import simulate
from pow2quant.validation import latency
from tests.quantized_graphs import Graph, encoding
from tests.reports import REPORT, STATISTICS, TENSOR, Page


def of_tensor(grid: Encoding, x: Any, role: str = "output", exact: Any = None, quantized: Any = None) -> dict[str, Any]:
    values = np.asarray(x, np.float32)
    reached = grid.fake_quantize(values) if quantized is None else np.asarray(quantized, np.float32)
    reference = values if exact is None else np.asarray(exact, np.float32)
    return statistics.of_tensor(grid, samples.Sampled(role, reference, values, reached))


def test_noise_clipping_and_histogram_of_a_tensor_by_hand():
    # steps of 1/2 on 0 … 3: 0.25 is a tie and becomes 0, 1 and 1.5 stay, 2 saturates to 1.5
    found = of_tensor(encoding(-1, bits=2), [0.25, 1.0, 1.5, 2.0], exact=[0.5, 1.0, 1.5, 2.0])
    signal, noise = 0.0625 + 1 + 2.25 + 4, 0.0625 + 0.25
    assert found["sqnr_db"] == round(10 * math.log10(signal / noise), 2)
    assert found["network_sqnr_db"] == round(10 * math.log10((0.25 + 1 + 2.25 + 4) / (0.25 + 0.25)), 2)
    assert found["clipped"] == 25.0
    bars = found["histogram"]
    edges = [bars["start"] + i * bars["width"] for i, count in enumerate(bars["counts"]) if count]
    assert (edges[0], sum(bars["counts"]), bars["low"], bars["high"]) == (0.5, 4, 0, 3)
    assert edges[1:3] == [2.0, 3.0]


def test_a_tensor_on_its_grid_has_no_noise():
    found = of_tensor(encoding(-3, 4), [0.125, -0.5, 2.0])
    assert found["sqnr_db"] is None
    assert found["clipped"] == 0


def test_a_weight_that_was_put_onto_its_grid_is_compared_with_the_float_network():
    grid = encoding([-1, -2], bits=4, signed=True, axis=0)
    exact, rounded = [[0.6, -0.9], [0.3, 0.1]], [[0.5, -1.0], [0.25, 0.0]]
    found = statistics.of_tensor(
        grid, samples.Sampled("weight", *(np.asarray(v, np.float32) for v in (exact, rounded, rounded)))
    )
    assert found["sqnr_db"] == statistics.sqnr_db(np.float32(exact), np.float32(rounded)) is not None
    assert "network_sqnr_db" not in found


def test_free_scales_lose_no_more_than_powers_of_two():
    rng = np.random.default_rng(0)
    grid = Encoding(np.full(8, 0.125, np.float32), np.zeros(8, np.int64), IntGrid((4,) * 8, True), 0)
    found = of_tensor(grid, rng.standard_normal((8, 500)) * 0.3, "weight")
    assert 0 < found["free_scale_db"] - found["power_of_2_db"] < 6.1
    assert found["power_of_2_db"] >= found["sqnr_db"] - 0.5


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
def test_a_histogram_counts_everything_in_few_bins(values):
    found = statistics.histogram(np.asarray(values), -128, 127)
    assert sum(found["counts"]) == len(values)
    assert len(found["counts"]) <= 2 * statistics.BINS
    assert math.log2(found["width"]).is_integer()
    drawn = histograms.draw("t", TENSOR | {"histogram": found}, {"words": "", "scale": 0.5, "bitwidth": 8})
    assert bool(drawn.outside) == any(not -128.5 <= v <= 127.5 for v in values) or found["width"] > 1


def test_a_histogram_far_from_the_grid_is_drawn():
    found = statistics.histogram(np.full(9, 6.77e15), 0, 255)
    assert "nan" not in str(histograms.draw("t", TENSOR | {"histogram": found}, {"words": "", "scale": 1.0}))


def test_values_that_saturate_are_drawn_apart():
    drawn = histograms.draw("t", STATISTICS["tensors"]["relu1.output"], {"words": "w", "scale": 0.5, "bitwidth": 4})
    assert drawn.outside.count("M") == 1
    assert drawn.inside.count("M") == 7 - 1
    assert [text for *_, text in drawn.labels] == ["\u22124", "0", "3.5"]
    assert drawn.words == "w · 4 bits · 0.5 % clipped"


def test_the_simulation_is_sampled_beside_the_float_network():
    torch.manual_seed(0)
    model, data = models.digits_cnn().eval(), torch.rand(40, 1, 8, 8)
    sim = simulate(model, data[:1])
    sim.calibrate([data])
    found, count = samples.sample(sim, [data[:24], data[24:]], seed=0)
    assert count == samples.SAMPLES
    assert found.keys() == {site.name for site in sim.sites if site.role != "bias"}
    x, logits = found["x"], found["fc.output"]
    assert len(x.exact) == samples.SAMPLES * 64
    assert np.array_equal(x.exact, data[: samples.SAMPLES].flatten().numpy())
    assert np.array_equal(x.quantized, sim.encodings()["x"].fake_quantize(x.exact))
    assert np.allclose(logits.exact, model(data[: samples.SAMPLES]).detach().flatten(), atol=1e-5)
    assert np.array_equal(logits.quantized, sim.model(data[: samples.SAMPLES]).detach().flatten().numpy())
    weight = found["conv1.weight"]
    assert weight.exact.shape == model.conv1.weight.shape
    assert np.array_equal(weight.quantized, sim.encodings()["conv1.weight"].fake_quantize(weight.entering))


def test_a_channel_that_does_not_vary_any_more_is_named():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU()).eval(), torch.rand(16, 1, 4, 4)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 1e-4, 0.0]).reshape(3, 1, 1, 1))
        model[0].bias.copy_(torch.tensor([0.0, 0.25, 0.5]))
    sim = simulate(model, data)
    sim.calibrate([data])
    found, _ = samples.sample(sim, [data], seed=0)
    assert found["1.output"].dead == (1,)
    tensor = statistics.of_tensor(sim.encodings()["1.output"], found["1.output"])
    text = Page(render(REPORT, STATISTICS | {"tensors": STATISTICS["tensors"] | {"1.output": tensor}}))
    assert text.tables["Dead channels"][1:] == [["1.output", "1"]]


def test_a_large_tensor_is_sampled_at_the_same_places(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "ELEMENTS", 320)
    sim = simulate(models.digits_cnn().eval(), torch.rand(1, 1, 8, 8))
    data = torch.rand(40, 1, 8, 8)
    sim.calibrate([data])
    found, count = samples.sample(sim, [data], seed=1)
    assert count == samples.SAMPLES
    assert len(found["x"].exact) == 320
    assert np.array_equal(found["x"].entering, found["x"].exact)


def residual() -> Graph:
    g = Graph()
    g.input("x", [2, 4, 4], encoding(-4))
    g.layer("Conv", "conv", "x", np.ones((2, 2, 3, 3)), grid=None, pads=[1, 1, 1, 1], strides=[1, 1])
    g.node("Relu", "relu", ["conv.output"], encoding(-3))
    g.layer("Conv", "down", "relu.output", np.ones((2, 1, 1, 1)), grid=encoding(-2), group=2, strides=[2, 2])
    g.layer("Conv", "side", "relu.output", np.ones((4, 2, 1, 1)), grid=encoding(-2), strides=[2, 2])
    g.node("Concat", "both", ["down.output", "side.output"], encoding(-2), axis=1)
    return g


def test_the_network_is_described_in_boxes():
    boxes = network.describe(residual().artifact("both.output"))
    assert [(b["name"], b["op"], b["reads"], b["writes"]) for b in boxes] == [
        ("x", "input", [], "x"),
        ("conv", "Conv + Relu", ["x"], "relu.output"),
        ("down", "Conv", ["relu.output"], "down.output"),
        ("side", "Conv", ["relu.output"], "side.output"),
        ("both", "Concat", ["down.output", "side.output"], "both.output"),
    ]
    assert boxes[1]["nodes"] == ["conv", "relu"]
    assert boxes[2]["detail"].endswith(", 2 → 2, depthwise, stride 2")
    assert boxes[3]["weight"] == "side.weight"


def test_the_graph_draws_every_tensor_that_is_read():
    boxes = network.describe(residual().artifact("both.output"))
    (strip,) = graph.draw(boxes, {b["writes"]: f"k{i}" for i, b in enumerate(boxes)}, {})
    assert [box.label for box in strip.boxes] == ["k0", "k1", None, "k3", None]
    assert [[label for *_, label in lane.enters] for lane in strip.lanes] == [["k1"], ["k2"]]
    assert strip.lanes[0].colour != strip.lanes[1].colour, "they overlap, so each has its own lane"


def test_a_dense_network_of_150_layers_is_a_column_of_strips():
    boxes = [
        {"name": f"b{i}", "op": "Concat", "nodes": [], "reads": [f"t{j}" for j in range(i)], "writes": f"t{i}"}
        | {"weight": None, "detail": ""}
        for i in range(150)
    ]
    strips = graph.draw(boxes, {}, {})
    names = [box.name for i, strip in enumerate(strips) for box in strip.boxes[i > 0 :]]
    assert names == [f"b{i}" for i in range(150)]
    for strip, following in pairwise(strips):
        assert 0 <= strip.y + strip.height - following.y <= 2, "strips under each other are one column"


def test_latency_is_measured_in_turn_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N, 4] x) => (float[N, 4] y) {y = Relu(x)}'
    )
    onnx.save(model, tmp_path / "m.onnx")
    files = {"float": tmp_path / "m.onnx", "quantized": tmp_path / "m.onnx"}
    found = latency.measure(files, [np.zeros((1, 4), np.float32)])
    assert found["calls"] == latency.CALLS[-1]
    assert 0 < found["float"] < 0.1
    assert found["shape"] == [1, 4]
    monkeypatch.setattr(latency, "BUDGET", 0.0)
    assert latency.measure(files, [np.zeros((1, 4), np.float32)])["calls"] == latency.CALLS[0]
