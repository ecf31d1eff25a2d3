"""Files of encodings that the drop-in loads: its own, AIMET's, free scales, parts of them, frozen ones."""

import json

import pytest
import torch

from pow2quant.backends import aimet
from pow2quant.backends.aimet import constrained
from pow2quant.errors import ConfigError, EncodingError, FileFormatError, NotPowerOfTwoError
from tests.aimet_flows.digits import accuracy, images, trained
from tests.drop_in.networks import DUMMY, folded, in_onnxruntime, prepared, run, table


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


def test_frozen_parameters_stay_where_a_file_replaces_all_others(make, calibrated, tmp_path):
    calibrated.save_encodings_to_json(tmp_path, "m")
    sim = make()
    sim.set_and_freeze_param_encodings(tmp_path / "m.json")
    before = {n: e for n, e in table(sim).items() if n.endswith(".weight")}
    sim.load_encodings(tmp_path / "m.json", partial=False)
    assert {n: table(sim)[n] for n in before} == before


def test_a_file_of_another_width_sets_the_width(tmp_path):
    eight, four = (prepared(trained(), DUMMY, default_param_bw=bits) for bits in (8, 4))
    for sim in (eight, four):
        sim.compute_encodings(lambda model: model(images()))
    eight.save_encodings_to_json(tmp_path, "m")
    four.load_encodings(tmp_path / "m.json")
    assert four.model.conv1.param_quantizers["weight"].bitwidth == 8
    assert table(four) == table(eight)


def test_a_file_of_another_width_on_aimet(installed, tmp_path):
    narrow, wide = (prepared(trained(), DUMMY, default_param_bw=bits, backend="aimet") for bits in (4, 8))
    narrow.compute_encodings(lambda model: model(images()))
    narrow.save_encodings_to_json(tmp_path, "m")
    wide.load_encodings(tmp_path / "m.json")
    assert table(wide) == table(narrow)
    assert torch.equal(run(wide.model), run(narrow.model))


def test_widths_in_turn_keep_the_range():
    sim = prepared(trained(), DUMMY)
    sim.compute_encodings(lambda model: model(images()))
    before = table(sim)
    for bits in (4, 8, 16, 8, 4, 8):
        for module in (sim.model.conv1, sim.model.conv2):
            module.param_quantizers["weight"].bitwidth = bits
        sim.model.fc.output_quantizers[0].bitwidth = bits
    assert table(sim) == before
