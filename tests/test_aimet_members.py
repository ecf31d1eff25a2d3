"""Every public member of AIMET's class is one of the drop-in's, or an error that says what to use; no silent float."""

import copy

import pytest
import torch
from torch import nn

from pow2quant import QuantizationSimModel
from pow2quant.adapters.aimet_members import MEMBERS, page
from pow2quant.backends import aimet
from pow2quant.errors import ConfigError, NotCalibratedError
from tests.aimet_flows.digits import images, trained

DUMMY = torch.zeros(1, 1, 8, 8)


@pytest.fixture
def theirs():
    with aimet.quiet():
        yield pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")


@pytest.fixture(params=["custom", "aimet"])
def backend(request):
    if request.param == "aimet":
        request.getfixturevalue("theirs")
    return request.param


def drop_in(backend="aimet", **options):
    return QuantizationSimModel(trained(), DUMMY, backend=backend, **{"placement": "pow2quant"} | options)


def calibrate(sim):
    sim.compute_encodings(lambda model: model(images()))
    return sim


def test_the_table_has_all_of_aimets_public_members(theirs):
    public = {name for name in dir(theirs.QuantizationSimModel) if not name.startswith("_")}
    assert set(MEMBERS) == public
    assert page().count("\n| `") == len(public)


def test_members_are_there_where_the_table_says_so(theirs):
    sims = {"custom": drop_in("custom"), "aimet": drop_in(placement=None), "prepared": drop_in()}
    for name, member in MEMBERS.items():
        for kind, sim in sims.items():
            what = getattr(member, kind)
            assert what.startswith(("same", "differs", "refused"))
            assert hasattr(sim, name) != what.startswith("refused"), (name, kind)


def test_what_custom_lacks_is_named():
    sim = drop_in("custom")
    with pytest.raises(AttributeError, match=r'^quantizer_state_dict: refused: .* use backend="aimet"$'):
        sim.quantizer_state_dict()
    with pytest.raises(AttributeError, match="no attribute 'never'"):
        sim.never()
    assert copy.deepcopy(sim).simulation.sites


def test_the_model_does_not_run_before_it_has_encodings(backend, tmp_path):
    sim = drop_in(backend)
    with pytest.raises(NotCalibratedError, match=r"call sim\.compute_encodings"):
        sim.model(images())
    with pytest.raises(RuntimeError):  # as AIMET raises it
        sim.model(images())
    with pytest.raises(ZeroDivisionError):
        sim.compute_encodings(lambda model: model(images()).sum() * (1 / 0))
    with pytest.raises(NotCalibratedError):
        sim.model(images())
    calibrate(sim).save_encodings_to_json(tmp_path, "e")
    other = drop_in(backend)
    other.load_encodings(tmp_path / "e.json")
    with torch.no_grad():
        assert torch.equal(other.model(images()), sim.model(images()))


def test_a_network_that_stays_float_runs(backend):
    sim = QuantizationSimModel(
        trained(), DUMMY, default_output_bw=32, default_param_bw=32, backend=backend, placement="pow2quant"
    )
    assert sim.model(images()).shape == (len(images()), 10)


def test_what_would_be_undone_is_refused(theirs):
    affine = theirs.quantization.affine
    blocks = affine.QuantizeDequantize((10, 16), 4, symmetric=True, block_size=(1, 16))
    cases = [
        ("fc", "param_quantizers", "weight", blocks, r"fc\.weight: a quantizer of another shape"),
        ("fc", "param_quantizers", "weight", affine.QuantizeDequantize((), 4, symmetric=True), "another shape"),
        (
            "fc",
            "input_quantizers",
            0,
            affine.QuantizeDequantize((), 8, symmetric=False),
            r"fc\.input_quantizers\[0\]: no",
        ),
    ]
    for module, kind, key, quantizer, words in cases:
        sim = drop_in()
        getattr(sim.model.get_submodule(module), kind)[key] = quantizer
        with pytest.raises(ConfigError, match=words):
            calibrate(sim)
    sim = drop_in()
    sim.model.fc.param_quantizers["weight"].symmetric = False
    with pytest.raises(ConfigError, match=r"fc\.weight: weights are quantized symmetrically"):
        calibrate(sim)


def test_symmetric_activations_hold(theirs):
    sim = drop_in()
    sim.model.fc.output_quantizers[0].symmetric = True
    calibrate(sim)
    name = sim.model.fc.output_quantizers[0].site.name
    found = sim.simulation.encodings()[name]
    assert found.symmetric
    assert found.is_power_of_two
    assert sim.model.fc.output_quantizers[0].symmetric
    assert isinstance(sim.model.fc, nn.Linear)


def test_aimets_context_managers_raise_on_custom(theirs):
    from aimet_torch.utils import remove_activation_quantizers, remove_all_quantizers

    sim = calibrate(drop_in("custom"))
    for context in (remove_all_quantizers, remove_activation_quantizers, theirs.nn.compute_encodings):
        with pytest.raises(AttributeError, match='need backend="aimet"'), context(sim.model):
            pass
    placed = calibrate(drop_in(placement=None))
    with torch.no_grad():
        quantized, expected = placed.model(images()), trained()(images())
        with remove_all_quantizers(placed.model):
            assert torch.equal(placed.model(images()), expected)
        assert torch.equal(placed.model(images()), quantized)
    assert not torch.equal(quantized, expected)
