"""What the drop-in writes on `custom`: AIMET's fields, defaults and options."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from pow2quant import QuantizationSimModel
from pow2quant.errors import ConfigError
from tests.aimet_flows.digits import images

DUMMY = torch.zeros(1, 1, 8, 8)


class Many(nn.Module):
    """Operations that older opsets write in other ways."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(36, 10)

    def forward(self, x):
        x = nn.functional.pad(nn.functional.relu6(self.conv(x)), (0, 1, 0, 1))
        a, b = nn.functional.max_pool2d(x, 2).unsqueeze(1).squeeze(1).split(2, 1)
        return self.fc(torch.cat([a[:, :, 1:], b[:, :, :2]], 1).flatten(1)[:, :1].repeat(1, 36)).softmax(-1)


@pytest.fixture(scope="module")
def sim():
    torch.manual_seed(0)
    made = QuantizationSimModel(Many().eval(), DUMMY, quant_scheme="tf")
    made.compute_encodings(lambda model: model(images(64)))
    return made


def written(sim, folder, **options):
    sim.onnx.export(DUMMY, folder / "m.onnx", **options)
    return onnx.load(folder / "m.onnx"), json.loads((folder / "m.encodings").read_text())


def batch_of(model):
    return [v.type.tensor_type.shape.dim[0] for v in (*model.graph.input, *model.graph.output)]


def run(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images(1).numpy()})[0]


def test_every_opset_from_9_to_23_computes_the_same(sim, tmp_path):
    expected = run(written(sim, tmp_path)[0])
    for opset in range(9, 24):
        model, _ = written(sim, tmp_path, opset_version=opset)
        assert model.opset_import[0].version == opset
        assert np.array_equal(run(model), expected), opset
    assert written(sim, tmp_path)[0].opset_import[0].version == 17


def test_a_softmax_over_another_axis_needs_opset_13(tmp_path):
    made = QuantizationSimModel(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softmax(1)).eval(), DUMMY)
    made.compute_encodings(lambda model: model(images(8)))
    written(made, tmp_path, opset_version=13)
    with pytest.raises(ConfigError, match="opset_version: Softmax over an axis that is not the last needs opset 13"):
        written(made, tmp_path, opset_version=12)


def test_without_a_word_the_least_opset_from_17_up_is_taken(tmp_path):
    made = QuantizationSimModel(nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)).eval(), DUMMY)
    made.compute_encodings(lambda model: model(images(8)))
    model, _ = written(made, tmp_path)
    assert model.opset_import[0].version == (
        21 if "GroupNormalization" in {n.op_type for n in model.graph.node} else 17
    )


def test_the_batch_is_the_examples_unless_dynamic_axes_free_it(sim, tmp_path):
    assert [d.dim_value for d in batch_of(written(sim, tmp_path)[0])] == [1, 1]
    axes = {"in": {0: "n"}, "out": [0]}
    free, _ = written(sim, tmp_path, input_names=["in"], output_names=["out"], dynamic_axes=axes)
    assert [d.dim_param for d in batch_of(free)] == ["n", "out_dynamic_axes_0"]


def test_biases_are_written_from_version_2_on_unless_told(sim, tmp_path):
    for version, option, expected in (
        ("0.6.1", None, False), ("1.0.0", None, False), ("1.0.0", True, True), ("2.0.0", None, True),
        ("2.1.0", None, True), ("2.1.0", False, False),
    ):  # fmt: skip
        _, document = written(sim, tmp_path, encoding_version=version, export_int32_bias=option)
        assert ("conv.bias" in json.dumps(document)) == expected, (version, option)
        assert document["version"] == version
        assert document["producer"]["package"] == "pow2quant"


def test_codes_of_activations_are_signed_or_unsigned_on_request(sim, tmp_path):
    def codes(**options):
        _, document = written(sim, tmp_path, encoding_version="2.0.0", **options)
        return {e["name"]: (e["output_dtype"], e.get("y_zero_point", 0)) for e in document["encodings"]}

    for name, (kind, zero_point) in codes().items():
        if not name.endswith((".weight", ".bias")):
            assert kind == "uint8"
            assert codes(force_activation_as="signed")[name] == ("int8", zero_point - 128)
    assert codes(force_activation_as="signed")["conv.weight"] == codes()["conv.weight"]


def test_the_arguments_of_the_simulation_are_said(sim, tmp_path):
    _, document = written(sim, tmp_path)
    assert document["quantizer_args"]["quant_scheme"] == "tf"
    assert document["quantizer_args"]["param_bitwidth"] == 8
    sim.save_encodings_to_json(tmp_path, "saved")
    assert json.loads((tmp_path / "saved.json").read_text())["quantizer_args"]["quant_scheme"] == "tf"


def test_the_version_is_aimets_global_one(sim, tmp_path, monkeypatch):
    monkeypatch.setitem(
        __import__("sys").modules, "aimet_torch.common.quantsim", SimpleNamespace(encoding_version="0.6.1")
    )
    assert written(sim, tmp_path)[1]["version"] == "0.6.1"


def test_a_buffer_gets_the_model(sim, tmp_path):
    buffer = io.BytesIO()
    sim.onnx.export(DUMMY, buffer)
    assert onnx.load_from_string(buffer.getvalue()) == written(sim, tmp_path)[0]


def test_export_writes_aimets_files(sim, tmp_path):
    arguments = SimpleNamespace(kwargs={"opset_version": 13, "input_names": ["in"], "output_names": None})
    sim.export(tmp_path / "new", "m", DUMMY, arguments)
    names = {path.name for path in Path(tmp_path / "new").iterdir()}
    assert names == {"m.onnx", "m.pth", "m.encodings", "m_torch.encodings"}
    model = onnx.load(tmp_path / "new" / "m.onnx")
    assert (model.graph.input[0].name, model.opset_import[0].version) == ("in", 13)
    network = torch.load(tmp_path / "new" / "m.pth", weights_only=False)
    with torch.no_grad():
        assert np.allclose(network(images(1)).numpy(), run(model), atol=1e-6)
    weights = sim.simulation.encodings()["conv.weight"]
    stored = network.get_parameter("conv.weight").detach().numpy()
    assert np.array_equal(weights.fake_quantize(stored), stored)
    for option in ("propagate_encodings", "export_to_torchscript", "use_embedded_encodings"):
        with pytest.raises(ConfigError, match=f'{option}=True is not supported; use backend="aimet"'):
            sim.export(tmp_path, "m", DUMMY, **{option: True})
