"""What is AIMET's own about the `aimet` backend; tests/conformance holds it to what every backend does."""

import logging
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pow2quant.backends import aimet
from pow2quant.backends.aimet import AimetSimulation
from pow2quant.backends.aimet.quantizers import nearest_power_of_two
from pow2quant.backends.custom import CustomSimulation
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.config import QuantPlan, RunConfig, TensorSpec, plan_of
from pow2quant.errors import ConfigError, DataError, EncodingError, MissingExtraError, NotPowerOfTwoError
from pow2quant.frontends.prepare import prepare
from pow2quant.models import build
from pow2quant.pow2_constraints import Encoding, IntGrid

PLAN = plan_of(RunConfig())


@pytest.fixture
def installed():
    with aimet.quiet():
        return pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")


def prepared(name, x):
    torch.manual_seed(0)
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = None
    with torch.no_grad():
        model.train()(x)
    return fold_batch_norm(prepare(model.eval(), x))


@pytest.fixture
def digits():
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return prepared("digits-cnn", x), x


@pytest.fixture
def calibrated(installed, digits):
    network, x = digits
    sim = AimetSimulation(network, x, PLAN)
    sim.calibrate([x])
    return sim


def run(model, x):
    with torch.no_grad():
        return model(x).clone()


def test_without_aimet_one_line_says_what_to_install(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "aimet_torch", None)
    aimet.load_aimet.cache_clear()
    with pytest.raises(MissingExtraError, match=r"needs aimet-torch: pip install 'pow2quant\[aimet\]'$"):
        AimetSimulation(*digits, PLAN)


def test_nearest_power_of_two_is_exact():
    x = np.random.default_rng(0).uniform(1, 2, 10_000).astype(np.float32)
    x = np.ldexp(np.concatenate([x, [1, np.sqrt(np.float32(2))]]), np.arange(-90, 90)[:, None]).astype(np.float32)
    expected = np.ldexp(np.float32(1), np.rint(np.log2(x.astype(np.float64))).astype(np.int32))
    assert np.array_equal(nearest_power_of_two(torch.from_numpy(x)).numpy(), expected)
    assert (nearest_power_of_two(torch.tensor([0.0, 1e-45])) > 0).all()


def test_aimet_has_a_quantizer_at_every_site_and_nowhere_else(calibrated):
    placed = {q.site.name for q in calibrated.quantsim.quantizers()}
    assert placed == {s.name for s in calibrated.sites}
    assert len(list(calibrated.quantsim.quantizers())) == len(calibrated.sites)
    assert calibrated.quantsim.model is calibrated.model
    assert all(q.is_overwrite_allowed() == (q.site.role != "bias") for q in calibrated.quantsim.quantizers())


def test_aimets_own_calibration_is_constrained_too(calibrated, digits):
    _, x = digits
    before = calibrated.encodings()
    calibrated.quantsim.compute_encodings(lambda model: model(x * 3.1))
    after = calibrated.encodings()
    assert all(e.is_power_of_two and not (e.zero_point % 2).any() for e in after.values())
    assert after["x"].exponent > before["x"].exponent
    assert float(after["x"].maximum) >= float(x.max() * 3.1)
    assert after["fc.bias"] == before["fc.bias"]
    with aimet.quiet(), pytest.raises(DataError, match="NaN or infinity"):
        calibrated.quantsim.compute_encodings(lambda model: model(x * torch.nan))


def test_a_loaded_range_of_aimets_is_covered(calibrated):
    quantizer = calibrated.model.get_submodule("fc").output_quantizers[0]
    quantizer.set_range(-1.3, 2.1)
    assert quantizer.encoding.is_power_of_two
    assert float(quantizer.encoding.minimum) <= -1.3 + 2**-7
    assert float(quantizer.encoding.maximum) >= 2.1 - 2**-7


@pytest.mark.filterwarnings("ignore")
def test_aimets_own_qdq_export_agrees_with_onnxruntime(calibrated, digits, tmp_path):
    import onnxruntime
    from aimet_torch.onnx import export

    _, x = digits
    names = {"input_names": ["x"], "output_names": ["y"], "opset_version": 21, "dynamo": False}
    with aimet.quiet():
        export(calibrated.quantsim, x, str(tmp_path / "m.onnx"), prequantize_constants=True, **names)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # x86 without VNNI saturates otherwise
    (result,) = onnxruntime.InferenceSession(tmp_path / "m.onnx", options).run(None, {"x": x.numpy()})
    assert np.array_equal(result, run(calibrated.model, x).numpy())


def test_what_aimet_cannot_simulate_is_refused(calibrated, digits):
    with pytest.raises(ConfigError, match=r"plan\.output\.bitwidth: 24 is not legal; legal: an integer from 2 to 16"):
        AimetSimulation(*digits, replace(PLAN, output=TensorSpec(24, symmetric=False)))
    table = calibrated.encodings()
    weight = table["fc.weight"]
    widths = Encoding(weight.scale, weight.zero_point, IntGrid((4, *[8] * 9), signed=True), 0)
    free = Encoding(weight.scale * np.float32(1.1), weight.zero_point, weight.grid, 0)
    single = Encoding(weight.scale[0], weight.zero_point[0], weight.grid)
    for wrong, error, words in (
        (widths, EncodingError, "one width of 2 to 16 bits"),
        (free, NotPowerOfTwoError, "is not a power of two"),
        (single, EncodingError, "1 scales"),
    ):
        with pytest.raises(error, match=f"^fc.weight: .*{words}"):
            calibrated.load({**table, "fc.weight": wrong, "x": table["fc.output"]})
        assert calibrated.encodings() == table


def test_nothing_of_aimets_reaches_the_terminal(installed, digits, capfd, caplog):
    network, x = digits
    sim = AimetSimulation(network, x, PLAN)
    sim.calibrate([x])
    run(sim.model, x)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert logging.root.manager.disable == 0


@pytest.mark.filterwarnings("ignore")
def test_verbose_lets_it_through(installed, digits, caplog):
    with caplog.at_level(logging.DEBUG, logger="pow2quant"):
        AimetSimulation(*digits, PLAN)
    assert "Quant" in {record.name for record in caplog.records}


def test_it_can_be_pickled(calibrated, digits):
    _, x = digits
    twin = pickle.loads(pickle.dumps(calibrated))
    assert twin.encodings() == calibrated.encodings()
    assert torch.equal(run(twin.model, x), run(calibrated.model, x))


W4A8 = replace(PLAN, weight=TensorSpec(4, symmetric=True, per_channel=True))
SYMMETRIC = QuantPlan(*[TensorSpec(8, symmetric=True)] * 3, TensorSpec(32, symmetric=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_it_agrees_with_custom_to_the_last_bit(installed, name):
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = prepared(f"torchvision:{name}", x)
    for plan in (PLAN, W4A8, SYMMETRIC):
        ours, aimets = (backend(network, x, plan) for backend in (CustomSimulation, AimetSimulation))
        assert ours.calibrate([x]) == aimets.calibrate([x])
        assert torch.equal(run(ours.model, x), run(aimets.model, x))


@pytest.mark.filterwarnings("ignore:.*load_encodings is deprecated:DeprecationWarning")
def test_plain_aimet_gives_our_bits(installed, tmp_path):
    """Our encodings and on-grid parameters, in AIMET's own QuantSim on AIMET's own preparation of the network."""
    from aimet_torch import QuantizationSimModel as PlainAimet
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.model_preparer import prepare_model

    from pow2quant import QuantizationSimModel

    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    ).eval()
    batches = torch.randn(4, 32, 1, 12, 12).unbind()
    ours = QuantizationSimModel(model, batches[0], backend="custom")
    ours.compute_encodings(lambda m, _=None: [m(b) for b in batches])
    ours.save_encodings_to_json(str(tmp_path), "ours")

    network = prepare_model(model)
    fold_all_batch_norms(network, batches[0].shape, dummy_input=batches[0])
    plain = PlainAimet(network, batches[0])
    plain.load_encodings(str(tmp_path / "ours.json"), strict=False, partial=False)
    with torch.no_grad():
        for name, encoding in ours.simulation.encodings().items():
            if name.endswith((".weight", ".bias")):
                value = encoding.fake_quantize(ours.simulation.parameter(name).detach().numpy())
                plain.model.get_submodule(name.rpartition(".")[0]).get_parameter(name.rpartition(".")[2]).copy_(
                    torch.from_numpy(value)
                )
        for batch in batches:
            assert torch.equal(plain.model(batch), ours.model(batch))


class Positions(nn.Module):
    """A position embedding, a class token, and a mask of a softmax: constants beside the data."""

    def __init__(self):
        super().__init__()
        self.layer, self.position = nn.Linear(4, 6), nn.Parameter(torch.randn(1, 5, 6))
        self.token = nn.Parameter(torch.ones(6))

    def forward(self, x):
        y = self.layer(x) + self.position
        y = torch.cat([self.token.expand(len(y), 1, 6), y], 1)
        return torch.softmax(y @ y.mT + torch.full((6, 6), -torch.inf).triu(1), -1) @ y


def test_constants_are_wrapped_too(installed):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 4)
    network = prepare(Positions().eval(), x)
    simulations = [backend(network, x, PLAN) for backend in (CustomSimulation, AimetSimulation)]
    for sim in simulations:
        sim.calibrate([x])
    first, second = (sim.export(x) for sim in simulations)
    assert first.model == second.model
    assert first.encodings == second.encodings
    assert torch.equal(*(sim.model(x) for sim in simulations))
