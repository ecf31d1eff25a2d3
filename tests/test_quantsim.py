"""The drop-in for AIMET's QuantizationSimModel, on both backends, and AIMET's own tools under the constraint."""

import copy
import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pow2quant import QuantizationSimModel, QuantPlan, QuantScheme, simulate
from pow2quant.adapters import aimet_encodings, onnx_qdq
from pow2quant.backends import aimet
from pow2quant.backends.aimet import constrained
from pow2quant.errors import (
    ConfigError,
    DataError,
    EncodingError,
    FileFormatError,
    NotPowerOfTwoError,
    UnsupportedModelError,
    WeightsError,
)
from tests.aimet_flows.digits import Net, accuracy, images, train, trained

prepared = partial(QuantizationSimModel, placement="pow2quant")

FLOWS = Path(__file__).parent / "aimet_flows"
DUMMY = torch.zeros(1, 1, 8, 8)
OURS = {
    "from aimet_torch import QuantizationSimModel": "from pow2quant import QuantizationSimModel",
    "from aimet_torch.adaround.adaround_weight import": "from pow2quant.quantsim import",
}
ON_AIMET = """
from functools import partial
from pow2quant import QuantizationSimModel
QuantizationSimModel = partial(QuantizationSimModel, backend="aimet", placement="pow2quant")
"""


@pytest.fixture
def installed():
    with aimet.quiet():
        return pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")


@pytest.fixture(params=["custom", "aimet"])
def backend(request):
    if request.param == "aimet":
        request.getfixturevalue("installed")
    return request.param


@pytest.fixture
def make(backend):
    """Makes a drop-in of the trained network on the backend."""
    return lambda model=None, **options: prepared(model or trained(), DUMMY, backend=backend, **options)


@pytest.fixture
def calibrated(make):
    sim = make()
    sim.compute_encodings(lambda model: model(images()))
    return sim


def table(sim):
    return sim.simulation.encodings()


def run(model, x=None):
    with torch.no_grad():
        return model(images() if x is None else x).clone()


def in_onnxruntime(model, encodings, x):
    """What onnxruntime makes of a pair of files, without and with optimizations: two results."""
    loaded = onnx_qdq.load(Path(model))
    entries = aimet_encodings.load(Path(encodings), aimet_encodings.channel_axes(loaded))
    text = onnx_qdq.to_qdq(aimet_encodings.apply(loaded, entries)).SerializeToString()
    results = []
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
        entering = session.get_inputs()[0]
        size = entering.shape[0] if isinstance(entering.shape[0], int) else len(x)
        parts = [session.run(None, {entering.name: part.numpy()})[0] for part in x.split(size)]
        results.append(np.concatenate(parts))
    return results


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


@pytest.mark.parametrize("name", ["0.6.1", "1.0.0", "2.0.0", "json", "legacy", "torch"])
def test_what_was_written_loads_again(make, calibrated, name, tmp_path):
    if name == "json":
        calibrated.save_encodings_to_json(tmp_path, "m")
        file = tmp_path / "m.json"
    elif name in ("legacy", "torch"):
        calibrated.export(tmp_path, "m", DUMMY)
        file = tmp_path / ("m.encodings" if name == "legacy" else "m_torch.encodings")
    else:
        calibrated.onnx.export(
            DUMMY, tmp_path / "m.onnx", encoding_version=name, input_names=["in"], output_names=["out"]
        )
        file = tmp_path / "m.encodings"
    sim = make()
    sim.load_encodings(file)
    assert table(sim) == table(calibrated)
    assert torch.equal(run(sim.model), run(calibrated.model))
    if name == "json":
        sim = make()
        sim.load_encodings(json.loads(file.read_text()))
        assert table(sim) == table(calibrated)


def with_float_biases(sim):
    """What AIMET simulates: it rounds biases at export only."""
    sim.simulation.load({name: e for name, e in table(sim).items() if not name.endswith(".bias")})
    return run(sim.model)


def folded():
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    model = trained().eval()
    fold_all_batch_norms(model, None, DUMMY)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_aimets_own_files_load(make, installed, dynamo, tmp_path, capfd):
    """Also those that AIMET cannot reload, named after ONNX tensors. AIMET writes them, from its own simulation."""
    with aimet.quiet():
        theirs = installed.QuantizationSimModel(folded(), DUMMY)
        constrained.constrain(theirs)
        theirs.compute_encodings(lambda model: model(images()))
        expected = run(theirs.model)
        for version in ("0.6.1", "1.0.0", "2.0.0")[1 if dynamo else 0 :]:
            theirs.onnx.export(DUMMY, str(tmp_path / "t.onnx"), encoding_version=version, dynamo=dynamo)
            with pytest.raises((RuntimeError, AttributeError, TypeError)):
                installed.QuantizationSimModel(folded(), DUMMY).load_encodings(str(tmp_path / "t.encodings"))
            sim = make(folded())
            sim.load_encodings(tmp_path / "t.encodings", strict=False)
            assert {s.name for s in sim.simulation.sites} == table(sim).keys()
            assert torch.equal(with_float_biases(sim), expected)
        if not dynamo:
            theirs.save_encodings_to_json(str(tmp_path), "torch")
            sim = make(folded())
            sim.load_encodings(tmp_path / "torch.json")
            assert torch.equal(with_float_biases(sim), expected)


@pytest.mark.filterwarnings("ignore")
def test_free_scales_are_an_error_or_snapped(make, installed, tmp_path):
    with aimet.quiet():
        theirs = installed.QuantizationSimModel(folded(), DUMMY)
        theirs.compute_encodings(lambda model: model(images()))
        theirs.save_encodings_to_json(str(tmp_path), "torch")
    sim = make(folded())
    with pytest.raises(NotPowerOfTwoError, match=r"^[\w.]+: scale 0\.\d+ is not a power of two"):
        sim.load_encodings(tmp_path / "torch.json")
    assert table(sim) == {}
    sim.load_encodings(tmp_path / "torch.json", snap=True)
    for name, encoding in table(sim).items():
        assert encoding.is_power_of_two
        assert not (encoding.zero_point % 2).any()
        if name.endswith(".weight"):
            free = theirs.model.get_submodule(name[:-7]).param_quantizers["weight"].get_scale().flatten().detach()
            assert (encoding.scale >= free.numpy()).all()
            assert (encoding.scale < 2.1 * free.numpy()).all()
    assert accuracy(sim.model) > 0.9


def test_strict_and_partial(make, calibrated, tmp_path):
    calibrated.save_encodings_to_json(tmp_path, "m")
    document = json.loads((tmp_path / "m.json").read_text())
    entry = document["activation_encodings"]["relu1"]
    foreign = document | {"activation_encodings": {"relu1": entry, "missing": entry}}
    sim = make()
    with pytest.raises(EncodingError, match=r"missing\.output: the simulation has no quantizer"):
        sim.load_encodings(foreign)
    sim.load_encodings(foreign, strict=False)
    assert table(sim).keys() == {"relu1.output", "conv1.weight", "conv2.weight", "fc.weight"}
    full = table(calibrated)
    calibrated.load_encodings(foreign, strict=False, partial=True)
    assert table(calibrated) == full
    calibrated.load_encodings(foreign, strict=False, partial=False)
    assert table(calibrated).keys() == table(sim).keys()


def test_a_file_that_is_none(make, tmp_path):
    (tmp_path / "m.json").write_text("[]")
    for file, words in ((tmp_path / "none", "cannot be read"), (tmp_path / "m.json", "expected an object")):
        with pytest.raises(FileFormatError, match=words):
            make().load_encodings(file)


def test_frozen_parameters_stay_bit_identical(make, calibrated, tmp_path):
    calibrated.save_encodings_to_json(tmp_path, "m")
    weights = {n: e for n, e in table(calibrated).items() if n.endswith(".weight")}
    sim = make()
    sim.set_and_freeze_param_encodings(tmp_path / "m.json")
    assert table(sim) == weights
    with torch.no_grad():
        sim.model.get_parameter("conv1.weight").mul_(5)
    parameters = {k: v.clone() for k, v in sim.model.named_parameters() if k.endswith(".weight")}
    sim.compute_encodings(lambda model: model(3 * images()))
    after = table(sim)
    assert {n: after[n] for n in weights} == weights
    assert after["x"].exponent > table(calibrated)["x"].exponent
    assert all(torch.equal(v, sim.model.get_parameter(k)) for k, v in parameters.items())
    sim.load_encodings(tmp_path / "m.json", allow_overwrite=True)
    assert {n: table(sim)[n] for n in weights} == weights


def test_some_frozen_sites_among_others(calibrated, tmp_path):
    before = table(calibrated)
    calibrated.save_encodings_to_json(tmp_path, "m")
    document = json.loads((tmp_path / "m.json").read_text())
    document["param_encodings"] = {"conv1.weight": document["param_encodings"]["conv1.weight"]}
    document["activation_encodings"] = {"relu1": document["activation_encodings"]["relu1"]}
    calibrated.load_encodings(document, allow_overwrite=False)
    with torch.no_grad():
        for name in ("conv1", "conv2"):
            calibrated.model.get_parameter(f"{name}.weight").mul_(4)
    calibrated.compute_encodings(lambda model: model(images()))
    after = table(calibrated)
    assert after["conv1.weight"] == before["conv1.weight"]
    assert after["relu1.output"] == before["relu1.output"]
    assert (after["conv2.weight"].exponent > before["conv2.weight"].exponent).any()
    calibrated.export(tmp_path, "m", DUMMY)  # whose biases fit
    assert torch.equal(
        run(calibrated.model),
        torch.from_numpy(in_onnxruntime(tmp_path / "m.onnx", tmp_path / "m.encodings", images())[0]),
    )


def test_requires_grad_is_aimets(make, backend, calibrated, tmp_path):
    calibrated.save_encodings_to_json(tmp_path, "m")
    sim = make()
    if backend == "custom":
        with pytest.raises(ConfigError, match="requires_grad"):
            sim.load_encodings(tmp_path / "m.json", requires_grad=True)
    else:
        sim.load_encodings(tmp_path / "m.json", requires_grad=False)
        assert not any(p.requires_grad for p in sim.quantizer_parameters())


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


# -- configuration files --------------------------------------------------------------------------------------------

CONFIG = {
    "defaults": {
        "ops": {"is_output_quantized": "True"},
        "params": {"is_quantized": "True", "is_symmetric": "True"},
        "strict_symmetric": "False",
        "per_channel_quantization": "False",
    },
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {"Conv": {"per_channel_quantization": "True"}},
    "supergroups": [{"op_list": ["Conv", "Relu"]}, {"op_list": ["Conv", "Clip"]}, {"op_list": ["Gemm", "Relu"]}],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {},
}


def changed(path, value):
    document = copy.deepcopy(CONFIG)
    *parents, key = path
    section = document
    for parent in parents:
        section = section.setdefault(parent, {})
    section[key] = value
    return document


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


# -- AIMET's own tools under the constraint ---------------------------------------------------------------------------


@pytest.fixture
def on_aimet(installed):
    sim = prepared(trained(), DUMMY, backend="aimet", default_param_bw=4)
    sim.compute_encodings(lambda model: model(images()))
    return sim


def is_constrained(sim):
    """Whether every scale that AIMET computes with is a power of two."""
    scales = [q.get_scale().detach().numpy() for q in sim.quantizers()]
    return all((np.frexp(s)[0] == 0.5).all() for s in scales)


@pytest.mark.filterwarnings("ignore")
def test_sequential_mse(on_aimet):
    from aimet_torch.seq_mse import apply_seq_mse

    with aimet.quiet():
        apply_seq_mse(on_aimet, DataLoader(images(), 64), num_candidates=20)
    assert on_aimet.simulation.frozen == {"conv1.weight", "conv2.weight", "fc.weight"}
    chosen = {name: table(on_aimet)[name] for name in on_aimet.simulation.frozen}
    on_aimet.compute_encodings(lambda model: model(images()))
    assert {name: table(on_aimet)[name] for name in chosen} == chosen
    assert is_constrained(on_aimet)
    assert accuracy(on_aimet.model) > 0.85


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", ["drop-in", "AIMET's own object"])
def test_mixed_precision(installed, given, tmp_path):
    """Given the drop-in, the search is under the constraint. Given AIMET's own object it drops it, and gives biases
    the few bits of weights, so that it finds nothing; but everything can be put back.
    """
    from aimet_torch.common.defs import CallbackFunc, QuantizationDataType
    from aimet_torch.mixed_precision import choose_mixed_precision

    integer = QuantizationDataType.int
    sim = prepared(trained(), DUMMY, backend="aimet")
    sim.compute_encodings(lambda model: model(images()))
    calibrate = CallbackFunc(lambda model, _: run(model), None)
    quantized = []

    def evaluate(model, _):
        quantized.append([q.get_scale() for q in model.modules() if vars(q).get("enabled") and q.is_initialized()])
        return -float((run(model) - reference).square().mean())

    reference = run(trained())
    callback = CallbackFunc(evaluate, None)
    with aimet.quiet():
        found = choose_mixed_precision(
            sim if given == "drop-in" else sim.simulation.quantsim, DUMMY,
            [((8, integer), (8, integer)), ((4, integer), (4, integer))], callback, callback, 0.03, str(tmp_path), True,
            calibrate,
        )  # fmt: skip
    assert is_constrained(sim) == (given == "drop-in")
    assert bool(found) == (given == "drop-in")
    if given == "drop-in":
        scales = [s.detach().numpy() for at in quantized for s in at if s is not None]
        assert len(scales) > 20
        assert all((np.frexp(s)[0] == 0.5).all() for s in scales)
    sim.constrain()
    assert is_constrained(sim)
    widths = {name: e.grid.bits for name, e in table(sim).items()}
    assert set(widths.values()) == ({4, 8, 32} if found else {8, 32})
    assert {bits for name, bits in widths.items() if name.endswith(".bias")} == {32}
    sim.compute_encodings(lambda model: model(images()))
    assert {name: e.grid.bits for name, e in table(sim).items()} == widths
    sim.export(tmp_path, "m", DUMMY)
    for result in in_onnxruntime(tmp_path / "m.onnx", tmp_path / "m.encodings", images()):
        assert np.array_equal(result, run(sim.model).numpy())


@pytest.mark.filterwarnings("ignore")
def test_quant_analyzer(installed, tmp_path):
    from aimet_torch.common.utils import CallbackFunc

    from pow2quant.quantsim import QuantAnalyzer

    seen = []

    def evaluate(model, _):
        seen.append([q.get_scale() for q in model.modules() if hasattr(q, "get_scale")])
        return accuracy(model)

    with aimet.quiet():
        analyzer = QuantAnalyzer(
            trained(), DUMMY, CallbackFunc(lambda model, _: run(model), None), CallbackFunc(evaluate, None)
        )
        analyzer.enable_per_layer_mse_loss(list(images().split(64)), 4)
        analyzer.analyze(default_param_bw=4, results_dir=str(tmp_path))
    scales = [s.detach().numpy() for at in seen for s in at if s is not None]
    assert len(scales) > 30
    assert all((np.frexp(s)[0] == 0.5).all() for s in scales)
    assert {"per_layer_mse_loss.json", "per_layer_quant_enabled.json"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.filterwarnings("ignore")
def test_batch_norm_reestimation(installed, tmp_path):
    """AIMET's flow: batch norm lives in AIMET's own simulation, constrained; then it is folded and calibrated anew."""
    from aimet_torch.bn_reestimation import reestimate_bn_stats

    with aimet.quiet():
        theirs = installed.QuantizationSimModel(trained(), DUMMY, default_param_bw=4)
        constrained.constrain(theirs)
        theirs.compute_encodings(lambda model: model(images()))
        train(theirs.model, 1, 1e-3)
        before = theirs.model.bn1.running_mean.clone()
        reestimate_bn_stats(theirs.model, DataLoader(images(), 64), num_batches=4)
        assert not torch.equal(before, theirs.model.bn1.running_mean)
        scales = [q.get_scale().detach().numpy() for q in theirs.quantizers()]
        assert all((np.frexp(s)[0] == 0.5).all() for s in scales)
        model = theirs.get_original_model(theirs.model)
    sim = prepared(model, DUMMY, backend="aimet", default_param_bw=4)
    sim.compute_encodings(lambda model: model(images()))
    assert is_constrained(sim)
    assert accuracy(sim.model) > 0.85


def test_grids_that_cannot_be_constrained(installed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed(("defaults", "strict_symmetric"), "True")))
    with pytest.raises(ConfigError, match=r"config_file: .*config\.json: Strict symmetric is not supported"):
        prepared(trained(), DUMMY, config_file=str(tmp_path / "config.json"), backend="aimet")


# -- what AIMET does silently wrong, through the drop-in and through `simulate` ---------------------------------------


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
    with pytest.raises((WeightsError, DataError), match=r"^fc\.\w+: (the network gives )?NaN or infinity"):
        calibrated.compute_encodings(lambda model: model(images(8)))
    assert table(calibrated) == before


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
    with pytest.raises(UnsupportedModelError, match=r'test_quantsim\.py:\d+ "return super\(\)\.forward\(x if x\.sum'):
        calibrate(Branching(), [images(8)])


def test_a_module_that_forward_never_calls_is_not_there(calibrate):
    model = trained()
    model.spare = nn.Linear(3, 3)
    assert not [name for name in calibrate(model, [images(8)]).encodings() if name.startswith("spare")]
