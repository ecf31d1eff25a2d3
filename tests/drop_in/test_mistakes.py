"""What AIMET does silently wrong, through the drop-in and through `simulate`."""

import copy

import pytest
import torch
from torch import nn

from pow2quant import QuantizationSimModel, QuantPlan, simulate
from pow2quant.errors import ConfigError, DataError, NotCalibratedError, UnsupportedModelError, WeightsError
from tests.aimet_flows.digits import Net, images, trained
from tests.drop_in.networks import DUMMY, prepared, table


@pytest.fixture(params=["drop-in", "simulate"])
def calibrate(request, backend):
    """(model, batches): builds a simulation and calibrates it with them; returns it."""

    def drop_in(model, batches):
        sim = prepared(model, DUMMY, backend=backend)
        sim.compute_encodings(lambda model: [model(x) for x in batches])
        return sim.simulation

    def plain(model, batches):
        sim = simulate(model, DUMMY, QuantPlan.default(), backend)
        sim.calibrate(batches)
        return sim

    return drop_in if request.param == "drop-in" else plain


def test_no_data(calibrate):
    with pytest.raises(DataError, match=r"^x: nothing was observed; the calibration data are empty"):
        calibrate(trained(), [])


def test_nan_in_the_data(calibrate):
    spoilt = images(8).clone()
    spoilt[3, 0, 2, 2] = torch.nan
    with pytest.raises(DataError, match=r"calibration data, batch 1"):
        calibrate(trained(), [images(8), spoilt])


def test_nan_in_the_weights(calibrate):
    model = trained()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(WeightsError, match=r"^conv2\.weight: the weights hold NaN"):
        calibrate(model, [images(8)])


def test_nan_in_the_weights_later(make, calibrated):
    before = table(calibrated)
    with torch.no_grad():
        calibrated.model.get_parameter("fc.weight")[0, 0] = torch.inf
    with pytest.raises((WeightsError, DataError), match=r"^fc\.\w+: (the network gives |holds )?NaN or infinity"):
        calibrated.compute_encodings(lambda model: model(images(8)))
    assert table(calibrated) == before


def test_a_quantizer_that_was_removed_is_named(installed):
    """Our placement on AIMET exports every site."""
    for remove in (
        lambda sim: sim.model.fc.output_quantizers.__setitem__(0, None),
        lambda sim: sim.exclude_layers_from_quantization([sim.model.fc]),
    ):
        sim = prepared(trained(), DUMMY, backend="aimet")
        remove(sim)
        with pytest.raises(ConfigError, match=r"fc\.\w+: its quantizer was removed"):
            sim.compute_encodings(lambda model: model(images()))


def test_a_part_that_is_never_run(make):
    with pytest.raises(DataError, match=r"^(relu1|x|relu2|fc)[\w.]*: nothing was observed"):
        make().compute_encodings(lambda model: model.get_submodule("conv1")(images(8)))


class Reused(Net):
    def forward(self, x):
        x = self.relu1(self.conv1(x))
        return self.fc(self.flatten(self.pool(self.relu1(self.conv2(x)))))


def test_a_reused_module_has_a_quantizer_at_each_place(calibrate):
    sim = calibrate(Reused(), [images(8)])
    assert {"relu1.output", "relu1_1.output"} <= sim.encodings().keys()


class Branching(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_control_flow_that_depends_on_data(calibrate):
    with pytest.raises(UnsupportedModelError, match=r'test_mistakes\.py:\d+ "return super\(\)\.forward\(x if x\.sum'):
        calibrate(Branching(), [images(8)])


def test_a_module_that_forward_never_calls_is_not_there(calibrate):
    model = trained()
    model.spare = nn.Linear(3, 3)
    assert not [name for name in calibrate(model, [images(8)]).encodings() if name.startswith("spare")]


def test_a_layer_that_is_replaced():
    sim = prepared(trained(), DUMMY)
    sim.compute_encodings(lambda model: model(images()))
    sim.model.fc = nn.Linear(sim.model.fc.in_features, 10)
    with pytest.raises(ConfigError, match="fc was replaced, and would compute in float"):
        sim.model(images(4))


def test_encodings_of_weights_alone(make, calibrated):
    _, weights = calibrated.get_activation_param_encodings()
    sim = make()
    sim.load_encodings({"activation_encodings": {}, "param_encodings": weights, "version": "0.6.1"})
    with pytest.raises(NotCalibratedError, match="the model has no encoding for "):
        sim.model(images(4))


def test_a_copy_that_is_not_calibrated():
    with pytest.raises(NotCalibratedError, match="the model has no encodings yet"):
        copy.deepcopy(prepared(trained(), DUMMY)).model(images(4))


class Masked(nn.Module):
    """A network that may be given something more."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, mask=None):
        return self.fc(x) if mask is None else self.fc(x) * mask


def test_arguments_that_the_network_was_prepared_without():
    x = torch.randn(8, 4)
    sim = QuantizationSimModel(Masked(), x[:1])
    sim.compute_encodings(lambda model: model(x, mask=None))
    assert torch.equal(sim.model(x, None), sim.model(x))
    for call in (lambda: sim.model(x, mask=x), lambda: sim.model(x, x)):
        with pytest.raises(ConfigError, match=r"(mask|argument 1): the network was prepared without it"):
            call()
    assert sim.model.fc.param_quantizers["weight"].get_scale(dtype=torch.float64).dtype == torch.float64
