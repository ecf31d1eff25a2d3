"""The drop-in with AIMET's own placement: AIMET's class, sites and members; only the scales differ."""

import copy
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from pow2quant import QuantizationSimModel
from pow2quant.adapters import aimet_encodings, onnx_qdq
from pow2quant.backends import aimet
from pow2quant.errors import ConfigError, DataError
from tests.aimet_flows.digits import accuracy, images, train, trained

DUMMY = torch.zeros(1, 1, 8, 8)


@pytest.fixture(autouse=True)
def theirs():
    with aimet.quiet():
        yield pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")


@pytest.fixture
def sim():
    return QuantizationSimModel(trained(), DUMMY, backend="aimet", placement="aimet")


def calibrated(sim):
    sim.compute_encodings(lambda model: model(images()))
    return sim


def scales(sim):
    return {name: q.get_scale().detach().numpy() for name, q in sim.named_quantizers()}


def sites(sim):
    return [(name, q.shape, q.bitwidth, q.symmetric) for name, q in sim.named_quantizers()]


def is_constrained(sim):
    return all((np.frexp(s)[0] == 0.5).all() for s in scales(sim).values())


def test_it_has_aimets_class_and_sites(sim, theirs):
    plain = theirs.QuantizationSimModel(trained(), DUMMY)
    assert isinstance(sim, theirs.QuantizationSimModel)
    assert isinstance(sim, QuantizationSimModel)
    assert type(QuantizationSimModel(trained(), DUMMY, backend="aimet")) is type(sim)
    assert sites(sim) == sites(plain)
    assert list(sim.model.state_dict()) == list(plain.model.state_dict())


def test_it_cannot_run_before_it_is_calibrated(sim):
    with pytest.raises(RuntimeError, match="not initialized"):
        sim.model(images())
    calibrated(sim).model(images())
    assert is_constrained(sim)


def test_the_smallest_power_of_two_that_covers_is_taken(sim, theirs):
    plain = calibrated(theirs.QuantizationSimModel(trained(), DUMMY))
    free = scales(plain)
    for name, scale in scales(calibrated(sim)).items():
        assert (scale > 0.99 * free[name]).all(), name
        assert (scale < 4.01 * free[name]).all(), name
    assert accuracy(sim.model) > accuracy(plain.model) - 0.02


def test_training_keeps_the_constraint(sim):
    calibrated(sim)
    before = scales(sim)
    train(sim.model, 1, 1e-2)
    assert is_constrained(sim)
    assert any((before[name] != scale).any() for name, scale in scales(sim).items())


def test_saved_encodings_load_to_the_last_bit(sim, tmp_path):
    calibrated(sim).save_encodings_to_json(str(tmp_path), "e")
    again = QuantizationSimModel(trained(), DUMMY, backend="aimet", placement="aimet")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again.load_encodings(json.loads((tmp_path / "e.json").read_text()))
    with torch.no_grad():
        assert torch.equal(again.model(images()), sim.model(images()))
    other = QuantizationSimModel(trained(), DUMMY, backend="aimet", placement="aimet")
    other.model.load_state_dict(sim.model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.model(images()), sim.model(images()))


def test_free_scales_of_a_file_are_said(sim, theirs, tmp_path):
    plain = calibrated(theirs.QuantizationSimModel(trained(), DUMMY))
    plain.save_encodings_to_json(str(tmp_path), "e")
    with pytest.warns(UserWarning, match=r"conv1\.weight: scale .* is not a power of two"):
        sim.load_encodings(json.loads((tmp_path / "e.json").read_text()))
    assert is_constrained(sim)


def test_settings_of_aimets_quantizers_hold(sim):
    sim.model.fc.param_quantizers["weight"].bitwidth = 4
    sim.model.relu1.output_quantizers[0].symmetric = True
    sim.model.conv2.param_quantizers["weight"] = None
    sim.exclude_layers_from_quantization([sim.model.pool])
    calibrated(sim)
    assert is_constrained(sim)
    assert sim.model.fc.param_quantizers["weight"].bitwidth == 4
    assert sim.model.relu1.output_quantizers[0].symmetric
    assert sim.model.conv2.param_quantizers["weight"] is None


def test_quantizers_that_the_user_makes_are_constrained_or_refused(sim, theirs):
    affine = theirs.quantization.affine
    sim.model.conv1.param_quantizers["weight"] = affine.QuantizeDequantize(
        (16, 1, 1, 1), 4, symmetric=True, block_size=(1, 1, 3, 3)
    )
    sim.model.conv2.output_quantizers[0] = affine.QuantizeDequantize((), 8, symmetric=False)
    calibrated(sim)
    assert is_constrained(sim)
    sim.model.fc.param_quantizers["weight"] = affine.GroupedBlockQuantizeDequantize(
        (10, 16), 4, symmetric=True, decompressed_bw=8, block_size=(1, 16), block_grouping=(1, 16)
    )
    with pytest.raises(ConfigError, match=r"fc\.weight: the scales of a GroupedBlockQuantizeDequantize"):
        sim.compute_encodings(lambda model: model(images()))


@pytest.mark.parametrize(("qmin", "qmax", "symmetric"), [(0, 255, True), (-128, 127, False), (0, 15, False)])
def test_every_full_grid_is_constrained(sim, theirs, qmin, qmax, symmetric):
    sim.model.fc.output_quantizers[0] = theirs.quantization.affine.QuantizeDequantize((), qmin, qmax, symmetric)
    calibrated(sim)
    quantizer = sim.model.fc.output_quantizers[0]
    assert is_constrained(sim)
    assert (quantizer.qmin, quantizer.qmax) == (qmin, qmax)
    x = torch.linspace(float(quantizer.get_min()), float(quantizer.get_max()), 1000)
    with torch.no_grad():
        logits, error = sim.model(images()), quantizer(x) - x
    assert len(logits.unique()) <= qmax - qmin + 1
    assert error.abs().max() <= quantizer.get_scale() / 2


def test_nan_is_named(sim):
    with pytest.raises(DataError, match="NaN or infinity"):
        sim.compute_encodings(lambda model: model(images() * torch.nan))


def test_the_exported_pair_is_constrained_and_computes_alike(sim, tmp_path):
    calibrated(sim).onnx.export(DUMMY, str(tmp_path / "m.onnx"), input_names=["x"], output_names=["y"], dynamo=False)
    model = onnx_qdq.load(tmp_path / "m.onnx")
    table = aimet_encodings.load(tmp_path / "m.encodings", aimet_encodings.channel_axes(model))
    assert all(e.is_power_of_two for e in table.values())
    floats = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = floats.run(None, {"x": images()[:1].numpy()})
    assert np.isfinite(result).all()


def test_it_can_be_copied_and_pickled(sim):
    calibrated(sim)
    for other in (copy.deepcopy(sim.model), pickle.loads(pickle.dumps(sim.model))):
        with torch.no_grad():
            assert torch.equal(other(images()), sim.model(images()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"placement": "aimet"}, 'placement: AIMET\'s own places need backend="aimet"'),
        ({"placement": "here", "backend": "aimet"}, "placement: 'here' is not one of pow2quant, aimet"),
        ({"placement": "aimet", "backend": "aimet", "default_output_bw": 20}, "all codes of 2 to 16 bits"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        QuantizationSimModel(nn.Sequential(nn.Conv2d(1, 2, 3)), DUMMY, **options)


def test_every_shipped_configuration_gives_aimets_own_sites(theirs):
    from aimet_torch.common import quantsim_config

    paths = sorted(Path(quantsim_config.__file__).parent.glob("*.json"))
    assert len(paths) > 15
    for path in ["default", "htp_v81", *map(str, paths)]:
        plain = theirs.QuantizationSimModel(trained(), DUMMY, config_file=path)
        ours = QuantizationSimModel(trained(), DUMMY, config_file=path, backend="aimet", placement="aimet")
        found, expected = (
            [(n, q.shape, q.bitwidth, q.symmetric) for n, q in s.named_quantizers()] for s in (ours, plain)
        )
        assert found == expected, path


class Dropped(nn.Module):
    """A layer whose input no quantizer of AIMET's writes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.drop, self.fc = nn.Conv2d(1, 4, 3), nn.Dropout(0.1), nn.Linear(144, 5)

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.conv(x)).flatten(1)))


def test_a_bias_whose_input_has_no_scale_stays_float(tmp_path):
    sim = calibrated(QuantizationSimModel(Dropped().eval(), DUMMY, backend="aimet"))
    options = {"encoding_version": "2.0.0", "dynamo": False, "input_names": ["x"], "output_names": ["y"]}
    with pytest.warns(UserWarning, match="fc: the bias stays float, since nothing quantizes the input"):
        sim.onnx.export(DUMMY, str(tmp_path / "m.onnx"), dynamic_axes={"x": {0: "n"}, "y": {0: "n"}}, **options)
    model = onnx_qdq.load(tmp_path / "m.onnx")
    table = aimet_encodings.load(tmp_path / "m.encodings", aimet_encodings.channel_axes(model))
    assert "conv.bias" in table
    assert "fc.bias" not in table
    assert all(e.is_power_of_two for e in table.values())


def test_a_quantizer_that_comes_later_is_constrained(sim, theirs, tmp_path):
    from aimet_torch.quantization.affine import QuantizeDequantize

    name, module = next((n, m) for n, m in calibrated(sim).model.named_modules() if isinstance(m, nn.Linear))
    module.output_quantizers[0] = QuantizeDequantize((), 0, 255, symmetric=False)
    module.output_quantizers[0].set_range(-2.9, 3.0)
    sim.model(images())
    assert is_constrained(sim)
    module.output_quantizers[0] = QuantizeDequantize((), 0, 255, symmetric=False)
    module.output_quantizers[0].set_range(-2.9, 3.0)
    sim.save_encodings_to_json(str(tmp_path), "saved")
    entry = json.loads((tmp_path / "saved.json").read_text())["activation_encodings"][name]["output"]["0"]
    assert np.frexp(entry["scale"])[0] == 0.5
    assert is_constrained(copy.deepcopy(sim))


@pytest.mark.parametrize("placement", ["aimet", "pow2quant"])
def test_odd_zero_points_of_a_file_stay_in_a_state_too(placement, tmp_path):
    made = [QuantizationSimModel(trained(), DUMMY, backend="aimet", placement=placement) for _ in range(2)]
    sim, other = map(calibrated, made)
    sim.save_encodings_to_json(str(tmp_path), "saved")
    document = json.loads((tmp_path / "saved.json").read_text())
    ends = [
        e for module in document["activation_encodings"].values() for slots in module.values() for e in slots.values()
    ]
    entry = next(e for e in ends if e["is_symmetric"] == "False")
    offset, scale = -101, entry["scale"]
    entry |= {"offset": offset, "min": scale * offset, "max": scale * (255 + offset)}
    sim.load_encodings(document)
    found = [q.get_offset().item() for _, q in sim.named_quantizers() if not q.symmetric]
    assert offset in found
    state = sim.model.state_dict()
    for _ in range(2):  # loading leaves the state as it is
        other.model.load_state_dict(state)
    assert [q.get_offset().item() for _, q in other.named_quantizers() if not q.symmetric] == found
    with torch.no_grad():
        assert torch.equal(sim.model(images()), other.model(images()))
