"""AIMET's documented flows with our imports, and what AIMET's arguments mean here."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pow2quant import QuantizationSimModel, QuantScheme
from pow2quant.adapters import aimet_encodings
from pow2quant.backends import aimet
from pow2quant.errors import ConfigError
from tests.aimet_flows.digits import images, train, trained
from tests.drop_in.networks import DUMMY, in_onnxruntime, prepared, run, table

FLOWS = Path(__file__).parents[1] / "aimet_flows"


OURS = {
    "from aimet_torch import QuantizationSimModel": "from pow2quant import QuantizationSimModel",
    "from aimet_torch.adaround.adaround_weight import": "from pow2quant.quantsim import",
}


ON_AIMET = """
from functools import partial
from pow2quant import QuantizationSimModel
QuantizationSimModel = partial(QuantizationSimModel, backend="aimet", placement="pow2quant")
"""


def flow(name, folder, lines):
    text = (FLOWS / f"{name}.py").read_text(encoding="utf-8")
    for old, new in lines.items():
        text = text.replace(old, new)
    torch.manual_seed(0)
    namespace = {"folder": str(folder)}
    with aimet.quiet():
        exec(compile(text, f"{name}.py", "exec"), namespace)
    return namespace


NAMES = ("quick_start", "ptq", "qat")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_the_scripts_are_valid_aimet(installed, name, tmp_path):
    sim = flow(name, tmp_path, {})["sim"]
    assert type(sim) is installed.QuantizationSimModel


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_the_scripts_run_here_with_other_imports_only(backend, name, tmp_path, request):
    if name != "quick_start":
        request.getfixturevalue("installed")  # they use AIMET's folding, equalization and AdaRound
    lines = OURS if backend == "custom" else OURS | {"from aimet_torch import QuantizationSimModel": ON_AIMET}
    sim = flow(name, tmp_path, lines)["sim"]
    assert isinstance(sim, QuantizationSimModel)
    assert all(e.is_power_of_two for e in table(sim).values())
    written = aimet_encodings.load(tmp_path / "model.encodings")
    assert len(written) >= len([s for s in sim.sites if s.role != "bias"])
    assert all(e.is_power_of_two for e in written.values())
    x = images()
    for result in in_onnxruntime(tmp_path / "model.onnx", tmp_path / "model.encodings", x):
        assert np.array_equal(result, run(sim.model, x).numpy())


def test_both_backends_choose_the_same(installed):
    for options in ({}, {"quant_scheme": "percentile"}, {"default_param_bw": 4, "quant_scheme": QuantScheme.min_max}):
        sims = [prepared(trained(), DUMMY, backend=b, **options) for b in ("custom", "aimet")]
        for sim in sims:
            sim.compute_encodings(lambda model: [model(x) for x in images().split(100)])
        assert table(sims[0]) == table(sims[1])
        assert torch.equal(*(run(sim.model) for sim in sims))


def test_the_scheme_names_the_chooser(make, installed):
    from aimet_torch.common.defs import QuantScheme as Theirs

    for scheme, expected in (
        (None, "mse"), ("tf", "minmax"), (Theirs.min_max, "minmax"), (Theirs.post_training_tf_enhanced, "mse"),
        (QuantScheme.post_training_tf, "minmax"), ("percentile", "percentile"),
    ):  # fmt: skip
        sim = make(quant_scheme=scheme)
        assert {s.range for s in sim.simulation.placement.specs.values() if s.bits == 8} == {expected}
        assert sim.quant_scheme is scheme or scheme is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_place": True}, "in_place"),
        ({"rounding_mode": "stochastic"}, "rounding_mode: 'stochastic'"),
        ({"quant_scheme": "best"}, "quant_scheme: 'best' is not one of"),
        ({"default_output_bw": 24}, "default_output_bw: 24 bits"),
        ({"default_param_bw": 1}, "default_param_bw: 1 bits"),
        ({"default_data_type": "float", "default_output_bw": 16}, "default_output_bw: 16 bits"),
        ({"config_file": "/no/such.json"}, r"config_file: /no/such\.json"),
    ],
)
def test_impossible_arguments_are_named(make, options, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        make(**options)


def test_32_bits_stay_float(make):
    sim = make(default_output_bw=32)
    sim.compute_encodings(lambda model: model(images()))
    assert {s.role for s in sim.simulation.sites} == {"weight"}
    sim = make(default_param_bw=32)
    assert {s.role for s in sim.simulation.sites} == {"input", "output"}


def test_the_callback_may_do_what_it_likes(make):
    """Both call styles, results, gradients off, eval mode; afterwards the modes are what they were."""
    seen = []

    def callback(model, count):
        for x in images(count).split(32):
            assert not model.training
            seen.append(model(x))

    sim = make()
    sim.model.train()
    sim.compute_encodings(callback, 64)
    assert sim.model.training
    assert [len(y) for y in seen] == [32, 32]
    assert not seen[0].requires_grad
    other = make()
    other.compute_encodings(lambda model: callback(model, 64))
    assert table(other) == table(sim)


def test_a_failed_callback_leaves_everything_as_it_was(calibrated):
    before = table(calibrated)

    def callback(model):
        model(images())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        calibrated.compute_encodings(callback)
    assert table(calibrated) == before


def test_200_steps_of_training_keep_every_scale(make, tmp_path):
    sim = make(default_param_bw=4)
    sim.compute_encodings(lambda model: model(images()))
    weight = sim.model.get_parameter("conv2.weight").detach().clone()
    train(sim.model, 11, 2e-3)  # 11 epochs of 19 batches
    assert not torch.equal(weight, sim.model.get_parameter("conv2.weight"))
    assert all(e.is_power_of_two for e in table(sim).values())
    sim.export(tmp_path, "m", DUMMY)
    assert all(e.is_power_of_two for e in aimet_encodings.load(tmp_path / "m.encodings").values())
    for result in in_onnxruntime(tmp_path / "m.onnx", tmp_path / "m.encodings", images()):
        assert np.array_equal(result, run(sim.model).numpy())


def test_names_and_opset_of_the_export(calibrated, tmp_path):
    calibrated.onnx.export(
        DUMMY, tmp_path / "m.onnx", input_names=["in"], output_names=["out"], opset_version=17, export_int32_bias=False
    )
    model = onnx.load(tmp_path / "m.onnx")
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["in", "out"]
    assert model.opset_import[0].version == 17
    written = aimet_encodings.load(tmp_path / "m.encodings")
    assert {"in", "out", "conv1.weight"} <= written.keys()
    assert not [name for name in written if name.endswith(".bias")]
    for options, words in (
        ({"input_names": ["a", "b"]}, "input_names: 2 names for 1"),
        ({"force_activation_as": "int8"}, "force_activation_as: 'int8' is not one of"),
        ({"custom_opsets": {}}, "custom_opsets: has no meaning here"),
        ({"opset_version": 8}, "opset_version: 8 is not one of 9 to 23"),
        ({"encoding_version": "3.0.0"}, "'3.0.0' is not one of"),
    ):
        with pytest.raises(ConfigError, match=words):
            calibrated.onnx.export(DUMMY, tmp_path / "x.onnx", **options)
    with pytest.raises(ConfigError, match="export_to_torchscript=True"):
        calibrated.export(tmp_path, "m", DUMMY, export_to_torchscript=True)
