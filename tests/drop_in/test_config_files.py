"""AIMET's configuration files: what they quantize here, and what they cannot mean."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pow2quant import QuantizationSimModel
from pow2quant.backends import aimet
from pow2quant.errors import ConfigError
from tests.aimet_flows.digits import images, trained
from tests.drop_in.networks import CONFIG, DUMMY, changed, folded, in_onnxruntime, prepared, run, table


def axes(encodings):
    return [encodings[f"{module}.weight"].axis for module in ("conv1", "fc")]


def configured(make, folder, document):
    (folder / "config.json").write_text(json.dumps(document))
    sim = make(config_file=str(folder / "config.json"))
    sim.compute_encodings(lambda model: model(images()))
    return sim


@pytest.mark.parametrize(
    ("path", "value", "check"),
    [
        (("model_input",), {"is_input_quantized": "True"}, lambda t: axes(t) == [0, None]),
        (("model_input",), {}, lambda t: "x" not in t and "conv1.bias" not in t),
        (("defaults", "ops", "is_symmetric"), "True", lambda t: t["relu1.output"].symmetric and t["x"].symmetric),
        (("defaults", "per_channel_quantization"), "True", lambda t: t["fc.weight"].axis == 0),
        (("op_type", "Relu"), {"is_output_quantized": "False"}, lambda t: "relu1.output" not in t and "fc.output" in t),
        (("op_type", "Gemm"), {"params": {"weight": {"is_quantized": "False"}}}, lambda t: "fc.weight" not in t),
        (("op_type", "Gemm"), {"is_symmetric": "True"}, lambda t: t["fc.output"].symmetric),
        (("op_type", "Softmax"), {"encoding_constraints": {"min": 0.0, "max": 1.0}}, lambda t: "fc.output" in t),
    ],
)  # fmt: skip
def test_a_configuration_file_says_what_is_quantized(make, path, value, check, tmp_path):
    assert check(table(configured(make, tmp_path, changed(path, value))))


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        (("defaults", "strict_symmetric"), "True", "defaults.strict_symmetric"),
        (("defaults", "ops", "is_input_quantized"), "True", "defaults.ops.is_input_quantized"),
        (("defaults", "params", "is_symmetric"), "yes", "defaults.params.is_symmetric"),
        (("op_type", "Gemm"), {"encoding_constraints": {"min": 0.0}}, "op_type.Gemm.encoding_constraints"),
        (("op_type", "Relu"), {"encoding_constraints": {"min": 0.0, "max": 6.0}}, "op_type.Relu.encoding_constraints"),
        (("op_type", "Gemm"), {"is_input_quantized": "True"}, "op_type.Gemm.is_input_quantized"),
        (("params", "gamma"), {"is_quantized": "True"}, "params.gamma"),
        (("supergroups",), [{"op_list": ["Conv"]}], "supergroups[0]"),
        (("supergroup_pass_list",), ["FuseAll"], "supergroup_pass_list"),
        (("model_output",), {"is_input_quantized": "True"}, "model_output.is_input_quantized"),
        (("no_such_section",), {}, "no_such_section"),
    ],
)
def test_what_custom_cannot_mean_is_named(path, value, key, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(ConfigError) as raised:
        QuantizationSimModel(trained(), DUMMY, config_file=str(tmp_path / "config.json"))
    assert f"config.json: {key}: " in str(raised.value)


def test_aimets_own_configuration_files(make, backend, installed):
    """All that AIMET ships, and their aliases; widths and symmetry of weights are AIMET's."""
    from aimet_torch.common import quantsim_config

    paths = sorted(Path(quantsim_config.__file__).parent.glob("*.json"))
    assert len(paths) > 15
    for path in ["default", "htp_v73", *map(str, paths)]:
        sim = make(config_file=path)
        with aimet.quiet():
            theirs = installed.QuantizationSimModel(folded(), DUMMY, config_file=path)
        for name, spec in sim.simulation.placement.specs.items():
            if name.endswith(".weight"):
                expected = theirs.model.get_submodule(name[:-7]).param_quantizers["weight"]
                found = (spec.bits, spec.symmetric, spec.per_channel)
                assert found == (expected.bitwidth, expected.symmetric, bool(expected.shape)), (path, name)
    sim.compute_encodings(lambda model: model(images()))
    assert all(e.is_power_of_two for e in table(sim).values())


def test_a_supergroup_has_one_quantizer_behind_its_last_operation(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    ).eval()
    groups = [
        {"op_list": ["Conv", "Relu", "AveragePool"]},
        {"op_list": ["Relu", "MaxPool"]},
        {"op_list": ["Add", "Tanh"]},
    ]
    (tmp_path / "c.json").write_text(json.dumps(CONFIG | {"supergroups": groups}))
    sim = QuantizationSimModel(model, DUMMY, config_file=str(tmp_path / "c.json"))
    assert [s.name for s in sim.sites] == ["input", "0.weight", "0.bias", "2.output", "3.output"]
    sim.compute_encodings(lambda model: model(images()))
    assert len(run(sim.model).unique()) <= 256


def test_weights_with_a_zero_point(tmp_path):
    """AIMET's DSP file asks for them: simulated, exported, and the same in onnxruntime."""
    document = changed(("params", "weight"), {"is_quantized": "True", "is_symmetric": "False"})
    (tmp_path / "c.json").write_text(json.dumps(document))
    sim = QuantizationSimModel(trained(), DUMMY, config_file=str(tmp_path / "c.json"))
    with torch.no_grad():
        sim.model.fc.weight.add_(0.1)
    sim.compute_encodings(lambda model: model(images()))
    found = table(sim)["fc.weight"]
    assert not found.grid.signed
    assert found.zero_point.any()
    assert found.is_power_of_two
    sim.onnx.export(DUMMY, tmp_path / "m.onnx")
    for result in in_onnxruntime(tmp_path / "m.onnx", tmp_path / "m.encodings", images()):
        assert np.array_equal(result, run(sim.model).numpy())


def test_grids_that_cannot_be_constrained(installed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed(("defaults", "strict_symmetric"), "True")))
    with pytest.raises(ConfigError, match=r"config_file: .*config\.json: Strict symmetric is not supported"):
        prepared(trained(), DUMMY, config_file=str(tmp_path / "config.json"), backend="aimet")
