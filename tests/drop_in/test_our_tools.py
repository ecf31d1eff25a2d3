"""AIMET's tools that are given a simulation, on `custom`: SeqMSE, batch norm re-estimation, mixed precision."""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pow2quant import QuantizationSimModel, quantsim
from pow2quant.errors import ConfigError, DataError
from tests.aimet_flows.digits import images, trained

DUMMY = torch.zeros(1, 1, 8, 8)
WEIGHTS = {"conv1.weight", "conv2.weight", "fc.weight"}


def simulated(**options):
    return QuantizationSimModel(trained(), DUMMY, **options)


def calibrated(sim):
    sim.compute_encodings(lambda model: model(images(64)))
    return sim


@torch.no_grad()
def run(model, x=None):
    return model(images(64) if x is None else x).clone()


def batches():
    return list(images(64).split(32))


def test_seq_mse_takes_the_exponents_of_least_output_error():
    """The first layer by brute force over exponents, its input quantized; then all are frozen."""
    sim = simulated(default_param_bw=3)
    quantsim.apply_seq_mse(sim, batches())
    chosen = sim.encodings()
    assert chosen.keys() == WEIGHTS == sim.frozen
    calibrated(sim)
    assert {name: sim.encodings()[name] for name in WEIGHTS} == chosen
    x = torch.from_numpy(sim.encodings()["x"].fake_quantize(images(64).numpy()))
    weight, found = sim.model.conv1.weight.detach(), chosen["conv1.weight"]
    errors = []
    for k in range(-8, 3):
        step = 2.0**k
        difference = (weight / step).round().clamp(-4, 3) * step - weight
        errors.append(F.conv2d(x, difference, padding=1).double().square().mean((0, 2, 3)))
    assert found.exponent.tolist() == (torch.stack(errors).argmin(0) - 8).tolist()


def test_seq_mse_leaves_frozen_and_excluded_layers():
    sim = calibrated(simulated(default_param_bw=4))
    sim.model.conv1.param_quantizers["weight"].set_range(-3.0, 3.0)
    sim.model.conv1.param_quantizers["weight"].allow_overwrite(False)
    before = sim.encodings()
    labelled = [(x, torch.zeros(32)) for x in batches()]
    quantsim.apply_seq_mse(sim, labelled, forward_fn=lambda m, b: m(b[0]), modules_to_exclude=[sim.model.fc])
    assert sim.frozen == {"conv1.weight", "conv2.weight"}
    same = {name for name, e in sim.encodings().items() if before[name] == e}
    assert before.keys() - same <= {"conv2.weight", "conv2.bias"}


@pytest.mark.parametrize(
    ("loader", "options", "error", "words"),
    [
        ([], {}, DataError, "gives nothing"),
        ([images(4)], {"forward_fn": lambda model, x: model(x=x)}, DataError, "in the order of its inputs"),
        ([images(4)], {"cache_dir": "/tmp"}, ConfigError, "cache_dir is not supported"),
        ([images(4)], {"num_candidates": 1}, ConfigError, "num_candidates: 1"),
        ([images(4)], {"modules_to_exclude": [nn.ReLU()]}, ConfigError, "ReLU is no module of sim.model"),
    ],
)
def test_what_seq_mse_cannot_do_is_named(loader, options, error, words):
    sim = calibrated(simulated())
    before = sim.encodings()
    with pytest.raises(error, match=words):
        quantsim.apply_seq_mse(sim, loader, **options)
    assert sim.encodings() == before
    assert not sim.frozen


def test_batch_norm_is_reestimated_and_undone():
    sim = simulated(default_param_bw=3)
    with pytest.raises(ConfigError, match=r"call sim\.compute_encodings before"):
        quantsim.reestimate_bn_stats(sim.model, batches())
    calibrated(sim)
    expected, before, encodings = run(trained().eval()), run(sim.model), sim.encodings()
    with quantsim.reestimate_bn_stats(sim.model, batches(), num_batches=2):
        after = run(sim.model)
    assert (after - expected).mean(0).abs().max() < 0.5 * (before - expected).mean(0).abs().max()
    assert torch.equal(run(sim.model), before)
    assert sim.encodings() == encodings


def test_mixed_precision_sets_widths(tmp_path):
    sim = simulated()
    configurator = quantsim.MixedPrecisionConfigurator(sim)
    configurator.set_precision(sim.model.conv2, "int8", {"weight": "int8"})
    configurator.set_precision(sim.model.conv2, "int16", {"weight": "int4"})  # the last one counts
    configurator.set_precision(nn.Linear, param={"weight": "int4"})
    configurator.set_model_input_precision(["int4"])
    configurator.set_model_output_precision("int16")
    log = io.StringIO()
    configurator.apply(log)
    assert "conv2.weight: 4 bits, for conv2" in log.getvalue()
    calibrated(sim)
    widths = {name: e.grid.bits for name, e in sim.encodings().items() if not name.endswith("bias")}
    assert {name for name, bits in widths.items() if bits == 4} == {"x", "conv2.weight", "fc.weight"}
    assert {name for name, bits in widths.items() if bits == 16} == {"relu1.output", "fc.output"}


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))

    def forward(self, x):
        return self.head(self.first(x) + self.second(x))


def test_sums_of_tensors_that_became_wide_are_exact():
    """The bits of a simulation that was made with 16 bits: its sums are float64, too."""
    torch.manual_seed(0)
    network = Joined().eval()
    made = QuantizationSimModel(network, DUMMY, default_output_bw=16)
    became = QuantizationSimModel(network, DUMMY)
    for _, quantizer in list(became.named_quantizers()):
        if quantizer.site.role != "weight":
            quantizer.bitwidth = 16
    calibrated(made)
    became.load_encodings({"param_encodings": {}, "activation_encodings": {}} | _saved(made))
    assert became.encodings() == made.encodings()
    assert torch.equal(run(became.model), run(made.model))


def _saved(sim):
    activations, parameters = sim.get_activation_param_encodings()
    return {"activation_encodings": activations, "param_encodings": parameters, "version": "0.6.1"}


@pytest.mark.parametrize("wide", [8, 16])
def test_ranges_are_trained_in_eval_mode_with_the_same_bits(wide):
    """As AIMET's are: what counts is that gradients are enabled. 16 bits: sums in float64."""
    sim = calibrated(QuantizationSimModel(Joined().eval(), DUMMY, "training_range_learning_with_tf_init", wide))
    graded = sim.model(images(64))
    assert torch.equal(graded, run(sim.model))
    graded.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sim.model.parameters())
    assert sum(bool(p.grad.any()) for p in sim.model.learned_ranges) > 4


def test_ranges_of_a_network_without_parameters():
    sim = QuantizationSimModel(nn.Sequential(nn.ReLU(), nn.Softmax(-1)), DUMMY, "training_range_learning_with_tf_init")
    assert len(calibrated(sim).model.learned_ranges) == len(list(sim.quantizers()))


def test_mixed_precision_that_contradicts_itself(tmp_path):
    sim = QuantizationSimModel(Joined().eval(), DUMMY)
    configurator = quantsim.MixedPrecisionConfigurator(sim)
    configurator.set_precision(sim.model.first, "int8")
    configurator.set_precision(sim.model.second, "int16")
    with pytest.raises(ConfigError, match="x: 8 bits for first and 16 bits for second"):
        configurator.apply(tmp_path / "log.txt")
    configurator.apply(tmp_path / "log.txt", strict=False)
    assert (tmp_path / "log.txt").read_text() == "x: 16 bits, for second\n"
    assert sim.model.first.input_quantizers[0].bitwidth == 16
    for ask, words in (
        (lambda: configurator.set_precision(nn.Conv3d, "int8"), "no quantized module"),
        (lambda: configurator.set_precision(sim.model.first, "fp16"), 'fp16: .*backend="aimet"'),
        (lambda: configurator.set_precision(sim.model.first, param={"bias": "int8"}), "bias has no quantizer"),
        (lambda: configurator.set_precision(sim.model.first, ["int8", "int8"]), "2 widths for 1 tensors"),
        (lambda: configurator.set_model_input_precision("int3"), "'int3' is not one of int4, int8, int16"),
    ):
        with pytest.raises(ConfigError, match=words):
            ask()


@pytest.mark.filterwarnings("ignore")
def test_on_aimet_they_are_aimets_own():
    pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")
    from aimet_torch.mixed_precision import MixedPrecisionConfigurator

    sim = simulated(backend="aimet")
    assert type(quantsim.MixedPrecisionConfigurator(sim)) is MixedPrecisionConfigurator
    with pytest.raises(StopIteration):  # as AIMET answers to no data
        quantsim.apply_seq_mse(sim, [])
    calibrated(sim)
    before = run(sim.model)
    with quantsim.reestimate_bn_stats(sim.model, batches(), num_batches=2):
        assert not torch.equal(run(sim.model), before)
