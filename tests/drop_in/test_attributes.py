"""What scripts do with `sim.model` on `custom`: its quantizers as AIMET shows them, and the user's own members."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pow2quant import QuantizationSimModel
from pow2quant.errors import ConfigError
from pow2quant.integer.certificate import certify
from pow2quant.quantsim import check_accumulator_overflow
from tests.aimet_flows.digits import accuracy, images, trained

DUMMY = torch.zeros(1, 1, 8, 8)


def calibrated(sim):
    sim.compute_encodings(lambda model: model(images()))
    return sim


@pytest.fixture
def sim():
    return calibrated(QuantizationSimModel(trained(), DUMMY))


def encodings(sim):
    return sim.simulation.encodings()


def test_quantizers_stand_where_they_are_simulated(sim):
    names = [name for name, _ in sim.named_quantizers()]
    assert names == [
        "conv1.param_quantizers.weight",
        "conv1.input_quantizers.0",
        "relu1.output_quantizers.0",
        "conv2.param_quantizers.weight",
        "relu2.output_quantizers.0",
        "fc.param_quantizers.weight",
        "fc.output_quantizers.0",
    ]
    conv = sim.model.conv1
    assert list(conv.output_quantizers) == [None]
    assert dict(conv.param_quantizers.items())["bias"] is None
    quantizer, found = conv.param_quantizers["weight"], encodings(sim)["conv1.weight"]
    assert (quantizer.bitwidth, quantizer.symmetric, quantizer.qmin, quantizer.qmax) == (8, True, -128, 127)
    assert quantizer.shape == (16, 1, 1, 1)
    assert np.array_equal(quantizer.get_scale().flatten().numpy(), found.scale)
    assert np.array_equal(quantizer.max.flatten().numpy(), found.maximum)


def test_widths_and_symmetry_hold(sim):
    weight, output = sim.model.fc.param_quantizers["weight"], sim.model.relu1.output_quantizers[0]
    widest = weight.get_max().max()
    weight.bitwidth, output.symmetric = 4, True
    assert weight.get_max().max() >= widest * 7 / 8  # the range is kept until the next calibration
    calibrated(sim)
    found = encodings(sim)
    assert found["fc.weight"].grid.bits == 4
    assert found["relu1.output"].symmetric
    assert all(e.is_power_of_two for e in found.values())
    assert accuracy(sim.model) > 0.9


def test_none_takes_a_quantizer_away_and_it_can_be_put_back(sim):
    slots = sim.model.fc.param_quantizers
    quantizer, before = slots["weight"], encodings(sim)
    slots["weight"] = None
    assert slots["weight"] is None
    assert before.keys() - encodings(sim).keys() == {"fc.weight", "fc.bias"}
    calibrated(sim)
    slots["weight"] = quantizer
    assert encodings(calibrated(sim)) == before
    with pytest.raises(ConfigError, match=r'fc\.weight: only None can be put here; use backend="aimet"'):
        slots["weight"] = nn.Identity()


def test_layers_and_parameters_can_be_excluded(sim):
    sim.exclude_layers_from_quantization([sim.model.conv2])
    sim.exclude_param_from_quantization("weight")
    assert {s.role for s in sim.sites} == {"input", "output"}
    assert encodings(calibrated(sim)).keys() == {s.name for s in sim.sites}
    with pytest.raises(ConfigError, match="Linear is no module of sim"):
        sim.exclude_layers_from_quantization([nn.Linear(1, 1)])


def test_a_container_is_excluded_with_what_it_holds():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Flatten()).eval()
    sim = QuantizationSimModel(model, torch.randn(2, 1, 6, 6), placement="pow2quant")
    sim.exclude_layers_from_quantization([sim.model.get_submodule("0")])
    assert not sim.sites


def test_ranges_are_set_and_frozen(sim):
    quantizer = sim.model.relu1.output_quantizers[0]
    quantizer.set_range(0, 30)
    assert (float(quantizer.get_min()), float(quantizer.get_scale())) == (0, 2**-3)
    quantizer.allow_overwrite(False)
    calibrated(sim)
    assert float(quantizer.get_scale()) == 2**-3
    quantizer.allow_overwrite(True)
    assert quantizer.is_overwrite_allowed()
    calibrated(sim)
    assert float(quantizer.get_scale()) != 2**-3
    with pytest.raises(ConfigError, match="requires_grad"):
        quantizer.requires_grad_(True)
    with pytest.raises(AttributeError, match=r'relu1\.output: encoding_analyzer: only quantizers of backend="aimet"'):
        quantizer.encoding_analyzer  # noqa: B018


def test_what_is_not_possible_leaves_everything_as_it_was(sim):
    before = encodings(sim)
    quantizer = sim.model.fc.output_quantizers[0]
    for bits in (1, 17):
        with pytest.raises(ConfigError):
            quantizer.bitwidth = bits
    assert quantizer.bitwidth == 8
    assert encodings(sim) == before


def test_the_percentile(sim):
    wide = calibrated(QuantizationSimModel(trained(), DUMMY, quant_scheme="percentile"))
    before = encodings(wide)
    wide.set_percentile_value(60)
    narrow = encodings(calibrated(wide))
    assert narrow["relu2.output"].exponent < before["relu2.output"].exponent
    sim.set_percentile_value(60)  # another scheme: nothing changes, as with AIMET
    assert encodings(calibrated(sim)) == encodings(calibrated(QuantizationSimModel(trained(), DUMMY)))
    with pytest.raises(ConfigError, match="set_percentile_value: 0 is not over 0"):
        wide.set_percentile_value(0)


class Own(nn.Sequential):
    """A user's network."""

    def predict(self, x):
        return self(x).argmax(1)


def test_the_users_members_are_there():
    model = Own(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    model.classes = 10
    sim = calibrated(QuantizationSimModel(model, DUMMY))
    assert isinstance(sim.model, Own)
    assert isinstance(sim.model[2], nn.ReLU)
    assert [isinstance(m, (nn.Conv2d, nn.Linear)) for m in sim.model] == [True, False, False, False, True]
    assert (len(sim.model), sim.model[-1].out_features, sim.model[0].kernel_size) == (5, 10, (3, 3))
    with pytest.raises(ConfigError, match="a part of a quantized Sequential"):
        sim.model[:2]
    assert sim.model.classes == 10
    with torch.no_grad():
        assert torch.equal(sim.model.predict(images()), sim.model(images()).argmax(1))
        for twin in (copy.deepcopy(sim).model, copy.deepcopy(sim.model)):
            assert torch.equal(twin(images()), sim.model(images()))
    twin = copy.deepcopy(sim)
    twin.model[4].param_quantizers["weight"] = None
    assert sim.model[4].param_quantizers["weight"] is not None


def test_it_returns_what_the_users_network_returns():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return {"y": y, "z": [y.relu()]}

    sim = calibrated(QuantizationSimModel(Two().eval(), DUMMY))
    with torch.no_grad():
        found = sim.model(images())
    assert found.keys() == {"y", "z"}
    assert found["z"][0].shape == found["y"].shape


def test_a_network_in_half_precision_is_simulated_in_float32():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).to(torch.bfloat16).eval()
    sim = QuantizationSimModel(nn.DataParallel(model), DUMMY.bfloat16())
    sim.compute_encodings(lambda model: model(images().bfloat16()))
    with torch.no_grad():
        found = sim.model(images().bfloat16())
        assert found.dtype is torch.float32
        assert torch.equal(found, sim.model(images().bfloat16().float()))
        assert torch.equal(found, sim.model(input=images().bfloat16()))
    assert isinstance(sim.model, nn.Sequential)


def test_the_report_names_every_quantizer(sim):
    lines = str(sim).splitlines()
    assert lines[0] == f"Quantized model: {len(sim.sites)} quantizers"
    assert [line.split()[0] for line in lines[1:]] == [s.name for s in sim.sites]
    assert lines[1].split()[1:] == ["8", "bits", "scale", "2^-7"]


def test_accumulators_are_bounded_as_the_certificate_says(sim):
    certified = {layer.node: layer.accumulator_max for layer in certify(sim.artifact(DUMMY)).layers}
    for bits in (16, 32):
        layer, share = check_accumulator_overflow(sim.model, 8, bits)
        assert certified[layer] <= share * 2 ** (bits - 1) <= 2 * certified[layer]
        assert (share > 1) == (bits == 16)
    with pytest.raises(ConfigError, match="give the calibrated"):
        check_accumulator_overflow(nn.Linear(1, 1))


def test_a_quantized_network_is_refused(sim):
    with pytest.raises(RuntimeError, match="the network is quantized already; give the float network"):
        QuantizationSimModel(sim.model, DUMMY)


def test_an_entry_that_fits_nothing_is_an_error_for_parameters_too(sim, tmp_path):
    sim.save_encodings_to_json(tmp_path, "e")
    other = QuantizationSimModel(trained(), DUMMY)
    other.set_and_freeze_param_encodings(tmp_path / "e.json")
    assert other.frozen == {"conv1.weight", "conv2.weight", "fc.weight"}
    other.model.fc.param_quantizers["weight"] = None
    for load in (other.set_and_freeze_param_encodings, other.load_and_freeze_encodings):
        with pytest.raises(RuntimeError, match=r"fc\.weight: the simulation has no quantizer"):
            load(tmp_path / "e.json")
