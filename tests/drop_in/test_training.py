"""`sim.model` on `custom` in training, and what of it would otherwise differ from AIMET without a word."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pow2quant import QuantizationSimModel
from pow2quant.backends import aimet
from pow2quant.errors import ConfigError, EncodingError, FileFormatError
from pow2quant.pow2_constraints import Encoding, IntGrid

X = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Dropout as a module of two kinds, as a function, and at the end; batch norm folded and on its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout2d(0.5), nn.ReLU())
        self.fc = nn.Linear(64, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.25))

    def forward(self, x):
        x = torch.flatten(self.features(self.norm(x).neg().neg()), 1)
        y = self.fc(F.dropout(x, 0.125, self.training))
        return y + self.head(y)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Net().eval()


def calibrated(network, **options):
    sim = QuantizationSimModel(network, X[:1], **options)
    sim.compute_encodings(lambda model: model(X))
    return sim


@pytest.fixture
def sim(network):
    return calibrated(network)


def run(sim):
    with torch.no_grad():
        return sim.model(X)


def dropouts(model):
    return {name: m.p for name, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)}


@pytest.mark.parametrize("options", [{}, {"backend": "aimet", "placement": "pow2quant"}], ids=["custom", "aimet"])
def test_dropout_drops_in_training_mode_only(network, options):
    if options:
        pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")
    with aimet.quiet():
        sim = calibrated(network, **options)
    assert dropouts(sim.model) == {"features.2": 0.5, "head.1": 0.25, "dropout": 0.125}
    expected = run(sim)
    sim.model.train()
    assert not torch.equal(run(sim), run(sim))
    for name in dropouts(sim.model):  # each of them does it alone
        for other in dropouts(sim.model):
            sim.model.get_submodule(other).p = 0.5 * (other == name)
        assert not torch.equal(run(sim), run(sim)), name
    sim.model.eval()
    assert torch.equal(run(sim), expected)


def test_dropout_is_not_exported(sim, tmp_path):
    import onnx

    sim.onnx.export(X[:1], tmp_path / "m.onnx")
    assert "Dropout" not in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}


def test_dropout_of_two_in_a_row_and_of_the_result():
    network = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Identity(), nn.Dropout(0.5)).eval()
    sim = QuantizationSimModel(network, X[:1, 0, 0])
    sim.compute_encodings(lambda model: model(X[:, 0, 0]))
    sim.model.train()
    share = float((sim.model(X[:, 0, 0]) == 0).float().mean())
    assert 0.65 < share < 0.85


def test_what_cannot_drop_here_is_said_once():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x)[0]

    sim = QuantizationSimModel(Attention().eval(), X[:1, 0])
    sim.compute_encodings(lambda model: model(X[:, 0]))
    sim.model.train()
    with pytest.warns(UserWarning, match="in training, inner drop nothing here"):
        sim.model(X[:, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sim.model(X[:, 0])


def test_batch_norm_answers_that_it_is_folded(network, sim):
    assert [type(m).__name__ for m in sim.model.features][1:] == ["FoldedBatchNorm", "Dropout2d", "ReLU"]
    for found in (sim.model.features[1], sim.model.norm.batch_norm, copy.deepcopy(sim.model).features[1]):
        assert isinstance(found.eval(), nn.modules.batchnorm._BatchNorm)
        for use in (lambda m: m.running_mean, lambda m: m.weight, lambda m: setattr(m, "momentum", 0.1)):
            with pytest.raises(AttributeError, match=r'(features\.1|norm): batch norm is folded.*backend="aimet"'):
                use(found)
    assert "FoldedBatchNorm(features.1)" in repr(sim.model)
    with pytest.raises(AttributeError, match=r"features\.1: batch norm is folded"):
        sim.model.features.load_state_dict(network.features.state_dict(), strict=False)


def test_aimets_batch_norm_reestimation_is_refused(sim):
    pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")
    from aimet_torch.bn_reestimation import reestimate_bn_stats

    with pytest.raises(AttributeError, match="batch norm is folded, it has no running_mean"):
        reestimate_bn_stats(sim.model, [X], 1)


def test_a_state_has_the_encodings(network, sim, tmp_path):
    torch.save(sim.model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh, other = QuantizationSimModel(network, X[:1], default_param_bw=4), calibrated(network)
    other.compute_encodings(lambda model: model(5 * X))
    for loaded in (fresh, other):
        loaded.model.load_state_dict(state)
        assert loaded.simulation.encodings() == sim.simulation.encodings()
        assert torch.equal(run(loaded), run(sim))
    plain = {k: v for k, v in state.items() if not k.endswith(".encoding")}
    fresh.model.load_state_dict(plain)  # of a float network: encodings stay
    assert torch.equal(run(fresh), run(sim))


def test_what_a_quantizer_cannot_take_is_an_error(sim):
    quantizer = sim.model.fc.param_quantizers["weight"]
    for name in ("signed", "qmax", "use_strict_symmetric"):
        with pytest.raises(AttributeError, match=rf'fc\.weight: {name} cannot be set.*backend="aimet"'):
            setattr(quantizer, name, True)
    weight = sim.model.fc.weight
    assert torch.equal(quantizer(weight), sim.model.fc.weight_quantizer(weight))
    sim.model.fc.output_quantizers = nn.ModuleList([None])
    with pytest.raises(ConfigError, match=r"fc\.output_quantizers was replaced"):
        run(sim)


def test_float_entries_stay_float(network, sim, tmp_path):
    activations, parameters = sim.get_activation_param_encodings()
    parameters["fc.weight"] = [{"bitwidth": 16, "dtype": "float"}]
    document = {"activation_encodings": activations, "param_encodings": parameters}
    sim.load_encodings(document)
    assert sim.model.fc.param_quantizers["weight"] is None
    sim.compute_encodings(lambda model: model(X))
    assert sim.model.fc.param_quantizers["weight"] is None
    everything = {"activation_encodings": {}, "param_encodings": {"fc.weight": parameters["fc.weight"]}}
    with pytest.raises(EncodingError, match="all entries are float"):
        sim.load_encodings(everything)


def test_a_file_of_another_number_of_channels_is_named(sim):
    _, parameters = sim.get_activation_param_encodings()
    document = {"activation_encodings": {}, "param_encodings": {"fc.weight": parameters["fc.weight"][:3]}}
    with pytest.raises(EncodingError, match=r"fc\.weight: 3 scales for 8 channels"):
        sim.load_encodings(document)


@pytest.mark.parametrize("options", [{}, {"backend": "aimet"}], ids=["custom", "aimet"])
def test_pytorchs_exporter_traces_the_simulation(network, options, tmp_path):
    import onnx

    if options:
        pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")
    with aimet.quiet():
        sim = calibrated(network, **options)
        traced = torch.jit.trace(sim.model, X, check_trace=not options)  # AIMET's counts its calls
        torch.onnx.export(sim.model, (X,), str(tmp_path / "m.onnx"), dynamo=False)
    assert torch.equal(traced(X), run(sim))
    assert "Round" in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}


@pytest.mark.parametrize(
    "scheme", ["training_range_learning_with_tf_init", "training_range_learning_with_tf_enhanced_init"]
)
def test_ranges_are_trained_under_the_schemes_that_say_so(network, scheme, tmp_path):
    sim = calibrated(network, quant_scheme=scheme)
    before, weights = sim.simulation.encodings(), sim.model.fc.weight.detach().clone()
    ranges = list(sim.model.learned_ranges)
    optimizer = torch.optim.Adam(sim.model.parameters(), 0.2)
    assert {id(p) for p in ranges} <= {id(p) for p in optimizer.param_groups[0]["params"]}
    sim.model.train()
    for _ in range(6):
        optimizer.zero_grad()
        (sim.model(X) - 4).square().mean().backward()
        assert all(p.grad is not None for p in (*ranges, *sim.model.parameters()))
        optimizer.step()
    sim.model.eval()
    changed = sim.encodings()
    assert any(changed[name] != before[name] for name in before if not name.endswith("bias"))
    assert not torch.equal(sim.model.fc.weight, weights)
    assert all(e.is_power_of_two for e in changed.values())
    for layer in sim.simulation.placement.layers:
        at = [changed[site.name].exponent for site in (layer.input, layer.weight, layer.bias)]
        assert (at[0] + at[1] == at[2]).all()
    other = calibrated(network, quant_scheme=scheme)
    held = list(other.model.learned_ranges)  # by an optimizer
    other.model.load_state_dict(sim.model.state_dict())
    assert other.encodings() == changed
    assert all(a is b for a, b in zip(held, other.model.learned_ranges, strict=True))
    assert torch.equal(run(other), run(sim))
    again = copy.deepcopy(sim)
    assert torch.equal(run(again), run(sim))
    assert len(again.model.learned_ranges) == len(ranges)


def test_frozen_ranges_are_not_trained_and_other_schemes_keep_all(network):
    sim = calibrated(network, quant_scheme="training_range_learning_with_tf_init")
    sim.model.fc.param_quantizers["weight"].allow_overwrite(False)
    sim.compute_encodings(lambda model: model(X))
    sim.model.train()(X).sum().backward()
    assert sum(p.grad is None for p in sim.model.learned_ranges) == 1
    assert len(sim.model.learned_ranges) == len([s for s in sim.sites if s.role != "bias"])
    sim.model.fc.param_quantizers["weight"].allow_overwrite(True)
    sim.model.fc.param_quantizers["weight"] = None
    sim.model.train()(X).sum().backward()
    with torch.no_grad():
        for parameter in sim.model.learned_ranges:
            parameter += 0.75
    run(sim)
    assert "fc.weight" not in sim.encodings()
    assert not hasattr(calibrated(network).model, "learned_ranges")


def trained_ranges(sim, optimizer):
    """How many ranges have a gradient in a step of training, of those that an optimizer knows."""
    optimizer.zero_grad()
    (sim.model.train()(X) - 4).square().mean().backward()
    optimizer.step()
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return sum(p.grad is not None and id(p) in known for p in sim.model.learned_ranges)


LEARNING = {"quant_scheme": "training_range_learning_with_tf_init"}


def test_an_optimizer_from_before_the_calibration_trains_ranges(network):
    sim = QuantizationSimModel(network, X[:1], **LEARNING)
    optimizer = torch.optim.Adam(sim.model.parameters(), 0.2)
    sim.compute_encodings(lambda model: model(X))
    assert trained_ranges(sim, optimizer) == len(sim.model.learned_ranges)
    sim.model.fc.param_quantizers["weight"].allow_overwrite(False)
    assert trained_ranges(sim, optimizer) == len(sim.model.learned_ranges) - 1


def test_a_state_right_behind_a_step_is_that_of_the_step(network):
    sim = calibrated(network, **LEARNING)
    optimizer = torch.optim.Adam(sim.model.parameters(), 0.3)
    for _ in range(3):
        trained_ranges(sim, optimizer)
    state = sim.model.state_dict()
    sim.model.eval()
    other = QuantizationSimModel(network, X[:1], **LEARNING)
    resumed = torch.optim.Adam(other.model.parameters(), 0.3)
    other.model.load_state_dict(state)
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(run(other), run(sim))
    assert trained_ranges(other, resumed) == len(other.model.learned_ranges)


def test_a_model_without_its_simulation_goes_on(network):
    model = calibrated(network, **LEARNING).model
    optimizer = torch.optim.Adam(model.parameters(), 0.2)
    model.train()(X).sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.learned_ranges)
    assert model.fc.param_quantizers["weight"].bitwidth == 8


def test_a_state_of_another_width_sets_the_width(network):
    narrow, sim = calibrated(network, default_param_bw=4), calibrated(network)
    sim.model.load_state_dict(narrow.model.state_dict())
    assert torch.equal(run(sim), run(narrow))
    assert sim.model.fc.param_quantizers["weight"].bitwidth == 4
    sim.compute_encodings(lambda model: model(X))
    assert sim.encodings() == narrow.encodings()


def test_a_state_keeps_widths_of_channels_and_names_what_is_damaged(sim):
    weight = next(s.name for s in sim.sites if s.name.startswith("fc.weight"))
    e = sim.encodings()[weight]
    mixed = Encoding(e.scale, e.zero_point, IntGrid((4, 8) * (len(e.scale) // 2), signed=True), e.axis)
    sim.simulation.load(sim.encodings() | {weight: mixed})
    state = sim.model.state_dict()
    sim.simulation.load(sim.encodings() | {weight: e})
    sim.model.load_state_dict(state)
    assert sim.encodings()[weight] == mixed
    (key,) = (key for key in state if "fc" in key and key.endswith(".encoding") and "weight" in key)
    with pytest.raises(FileFormatError, match=re.escape(key)):
        sim.model.load_state_dict(state | {key: state[key][:-3]})
