"""QONNX: Quant nodes say the encodings, and the network is read back whole; what the format cannot say is named."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper

from pow2quant import plugins, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.adapters.qonnx import DOMAIN, from_qonnx, to_qonnx
from pow2quant.config import RunConfig, plan_of, with_values
from pow2quant.errors import FileFormatError, MissingExtraError, UnsupportedModelError
from pow2quant.validation.networks import Named, first_difference
from tests.target_networks import NETWORKS

ODD = {"bits": 8, "signed": True, "narrow": False, "axis": 0}


def quantized(network, target="qonnx", **values):
    torch.manual_seed(0)
    x = torch.randn(8, *getattr(network, "shape", (3, 8, 8)))
    sim = simulate(network.eval(), x[:1], plan_of(with_values(RunConfig(), {"target": target, **values})))
    sim.calibrate([x])
    return sim.export(x[:1])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("batch", [None, 1])
def test_a_network_is_read_back_whole(network, bits, batch, tmp_path):
    artifact = quantized(NETWORKS[network](), **{"quantization.weight.bitwidth": bits})
    file = plugins.resolve("exporters", "qonnx")(artifact, tmp_path, batch=batch)
    back = from_qonnx(onnx_qdq.load(file))
    assert back.encodings == artifact.encodings
    assert first_difference(Named("ours", artifact), Named("read", back)) is None


def test_a_scale_per_channel_of_a_single_channel_is_read_back():
    artifact = quantized(torch.nn.Sequential(torch.nn.Conv2d(3, 1, 3), torch.nn.ReLU(), torch.nn.Conv2d(1, 1, 1)))
    assert artifact.encodings["0.weight"].axis == 0
    assert from_qonnx(to_qonnx(artifact)).encodings == artifact.encodings


def test_every_quant_says_its_encoding_by_itself():
    artifact = quantized(NETWORKS["Everything"](), **{"quantization.weight.bitwidth": 4})
    graph = to_qonnx(artifact).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quants = {node.name.removesuffix("/Quant"): node for node in graph.node if node.domain == DOMAIN}
    assert quants.keys() == artifact.encodings.keys()
    for name, node in quants.items():
        encoding = artifact.encodings[name]
        scale, zero_point, bits = (constants[each] for each in node.input[1:])
        said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert (scale.ravel() == encoding.scale.ravel()).all()
        assert not zero_point.any()
        assert bits == encoding.grid.bits
        assert said == {
            "signed": encoding.grid.signed,
            "narrow": encoding.grid.narrow,
            "rounding_mode": b"ROUND",
        }
        if node.input[0] in constants:  # dividing by the scale gives whole codes
            codes = constants[node.input[0]] / scale
            assert (codes == np.rint(codes)).all()
            assert np.abs(codes).max() <= 2 ** (int(bits) - 1)


def test_what_the_format_cannot_say_is_named(tmp_path):
    with pytest.raises(UnsupportedModelError, match="x: a zero point; QONNX adds it before it rounds"):
        to_qonnx(quantized(NETWORKS["Everything"](), "onnxruntime"))
    with pytest.raises(UnsupportedModelError, match="target esp32-s3 does not round half to even"):
        plugins.resolve("exporters", "qonnx")(quantized(NETWORKS["Everything"](), "esp32-s3"), tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda q, m: q.attribute.remove(q.attribute[0]), "node x/Quant: no Quant that can be read"),
        (lambda q, m: q.input.__setitem__(1, "none"), "node x/Quant: no Quant that can be read"),
        (
            lambda q, m: setattr(next(a for a in q.attribute if a.name == "rounding_mode"), "s", b"FLOOR"),
            "node x/Quant: only rounding_mode ROUND",
        ),
        (lambda q, m: setattr(m, "value", "{"), "metadata: pow2quant.grids"),
        (
            lambda q, m: setattr(m, "value", json.dumps({"y": ODD})),
            "metadata: pow2quant.grids",
        ),
    ],
)
def test_damaged_files_are_named(damage, message):
    model = to_qonnx(quantized(NETWORKS["Pools"]()))
    quant = next(node for node in model.graph.node if node.name == "x/Quant")
    damage(quant, next(entry for entry in model.metadata_props if entry.key == "pow2quant.grids"))
    with pytest.raises(FileFormatError, match=message):
        from_qonnx(model)


def test_qonnx_without_what_it_needs_is_absent(monkeypatch, tmp_path):
    onnx_qdq.export_qdq(quantized(NETWORKS["Everything"]()), tmp_path)
    monkeypatch.setitem(sys.modules, DOMAIN, None)  # its import fails
    with pytest.raises(MissingExtraError, match=r"qonnx is not installed"):
        plugins.resolve("validators", "qonnx")(tmp_path / "model.onnx")
