"""ONNX files as further tools want them: an older opset, one batch size, TensorRT's rules; each with the same bits."""

from __future__ import annotations

import json
from functools import cache

import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from pow2quant import plugins, runs, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.adapters.onnx_qdq.float_biases import BIASES
from pow2quant.config import RunConfig, plan_of, with_values
from pow2quant.errors import ConfigError, FileFormatError, UnsupportedModelError
from pow2quant.validation import ort
from pow2quant.validation.agreement import compare
from pow2quant.validation.networks import Named, first_difference
from tests.target_networks import NETWORKS

FORMS = [("qdq", "onnxruntime"), ("tensorrt", "tensorrt")]


@cache
def quantized(network: str, target: str, **values):
    """A network, calibrated for a target, and its inputs."""
    torch.manual_seed(0)
    x = torch.randn(8, *NETWORKS[network].shape)
    plan = plan_of(with_values(RunConfig(), {"target": target, **values}))
    sim = simulate(NETWORKS[network]().eval(), x[:1], plan)
    sim.calibrate([x])
    return sim, sim.export(x[:1]), x.numpy()


@pytest.mark.parametrize(("form", "target"), FORMS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("opset", "batch"), [(13, None), (15, 4), (18, None), (20, 8), (None, 1), (None, None)])
def test_a_file_in_another_opset_or_batch_has_the_same_bits_and_is_read_back(
    form, target, network, opset, batch, tmp_path
):
    sim, artifact, x = quantized(network, target)
    file = plugins.resolve("exporters", form)(artifact, tmp_path, opset=opset, batch=batch)
    model = onnx_qdq.load(file)
    assert model.opset_import[0].version == (opset or 21)
    assert {v.type.tensor_type.shape.dim[0].dim_value for v in (*model.graph.input, *model.graph.output)} == {
        batch or 0
    }
    assert first_difference(Named("ours", artifact), Named("read", onnx_qdq.from_qdq(model))) is None
    n = batch or len(x)
    with torch.no_grad():
        expected = sim.model(torch.from_numpy(x)).numpy()
    for executor in ort.executors(file):
        for start in range(0, len(x), n):
            (got,) = executor.run([x[start : start + n]])
            assert int((got != expected[start : start + n]).sum()) == 0


@pytest.mark.parametrize("network", NETWORKS)
def test_tensorrts_rules_hold_in_its_file(network, tmp_path):
    _, artifact, x = quantized(network, "tensorrt")
    file = plugins.resolve("exporters", "tensorrt")(artifact, tmp_path)
    graph = onnx_qdq.load(file).graph
    constants = {t.name: t for t in graph.initializer}
    made = {n.output[0]: n.op_type for n in graph.node}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = constants[node.input[2]]
            assert zero_point.data_type == TensorProto.INT8
            assert not numpy_helper.to_array(zero_point).any()
        if node.op_type == "DequantizeLinear":
            assert made.get(node.input[0], "QuantizeLinear") == "QuantizeLinear"
        if node.op_type in ("Conv", "Gemm"):
            assert constants[node.input[2]].data_type == TensorProto.FLOAT
    reference, *others = (*plugins.resolve("validators", "engine")(file), *ort.executors(file))
    for agreement in compare(reference, others, [[x]], artifact, proof=True):
        assert (agreement.differing, agreement.claim) == (0, "proved")


def test_a_wrong_bias_is_seen(tmp_path):
    sim, artifact, x = quantized("Everything", "tensorrt")
    file = plugins.resolve("exporters", "tensorrt")(artifact, tmp_path)
    model = onnx.load(file)
    bias = next(t for t in model.graph.initializer if t.name == "last.bias")
    step = artifact.encodings["last.output"].scale
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 2 * step, bias.name))
    onnx.save(model, file)
    with torch.no_grad():
        expected = sim.model(torch.from_numpy(x)).numpy()
    assert all((e.run([x])[0] != expected).any() for e in ort.executors(file))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda entries: [], "expected an object"),
        (lambda entries: {"none": entries["last.bias"]}, "none is no constant of the file"),
        (lambda entries: {"last.bias": entries["last.bias"] | {"scale": [4.0] * 10}}, "last.bias: .* not on the grid"),
        (lambda entries: {"last.bias": {k: v for k, v in entries["last.bias"].items() if k != "scale"}}, "last.bias"),
    ],
)
def test_damaged_notes_on_biases_are_named(damage, message):
    _, artifact, _ = quantized("Everything", "tensorrt")
    from pow2quant.adapters.tensorrt import to_tensorrt

    model = to_tensorrt(artifact)
    entry = next(e for e in model.metadata_props if e.key == BIASES)
    entry.value = json.dumps(damage(json.loads(entry.value)))
    with pytest.raises(FileFormatError, match=f"{BIASES}: {message}"):
        onnx_qdq.from_qdq(model)


def test_what_a_form_cannot_hold_is_named(tmp_path):
    def export(artifact, form="qdq", **options):
        plugins.resolve("exporters", form)(artifact, tmp_path, **options)

    _, asymmetric, x = quantized("Everything", "onnxruntime")
    with pytest.raises(UnsupportedModelError, match=r"x: codes of type uint8; TensorRT takes int8"):
        export(asymmetric, "tensorrt")
    with pytest.raises(ConfigError, match="opset: 12 is not legal; legal: 13 to 21"):
        export(asymmetric, opset=12)
    with pytest.raises(ConfigError, match="batch: 0 is not legal"):
        export(asymmetric, batch=0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Softmax(1)).eval()
    sim = simulate(
        network, torch.from_numpy(x[:1]), plan_of(with_values(RunConfig(), {"quantization.output.bitwidth": 16}))
    )
    sim.calibrate([torch.from_numpy(x)])
    with pytest.raises(UnsupportedModelError, match=r"node .*0.output.*: opset 20 does not have codes of type uint16"):
        export(sim.export(), opset=20)
    with pytest.raises(ConfigError, match="opset: the format c has no such option"):
        runs.export(asymmetric, "c", tmp_path / "c", opset=13)
