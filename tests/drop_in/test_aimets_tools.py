"""AIMET's own tools, given the drop-in or a constrained simulation of AIMET's."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pow2quant import QuantizationSimModel
from pow2quant.backends import aimet
from pow2quant.backends.aimet import constrained
from tests.aimet_flows.digits import accuracy, images, train, trained
from tests.drop_in.networks import DUMMY, in_onnxruntime, prepared, run, table


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
def test_mixed_precision_with_aimets_placement(installed, tmp_path):
    """Every scale that the search computes with is a power of two, and what it leaves can be exported."""
    from aimet_torch.common.defs import CallbackFunc, QuantizationDataType
    from aimet_torch.mixed_precision import choose_mixed_precision

    integer, seen = QuantizationDataType.int, []
    sim = QuantizationSimModel(trained(), DUMMY, backend="aimet")
    sim.compute_encodings(lambda model: model(images()))

    def evaluate(model, _):
        seen.extend(q.get_scale() for q in model.modules() if vars(q).get("enabled") and q.is_initialized())
        return -float((run(model) - reference).square().mean())

    reference, widths = run(trained()), [((8, integer), (8, integer)), ((4, integer), (4, integer))]
    callback = CallbackFunc(evaluate, None)
    with aimet.quiet():
        found = choose_mixed_precision(
            sim, DUMMY, widths, callback, callback, 0.03, str(tmp_path), True, CallbackFunc(lambda model, _: run(model))
        )
    assert found
    scales = [s.detach().numpy() for s in seen if s is not None]
    assert len(scales) > 20
    assert all((np.frexp(s)[0] == 0.5).all() for s in scales)
    sim.export(tmp_path, "m", DUMMY)
    assert is_constrained(sim)
    assert {q.bitwidth for q in sim.quantizers()} == {4, 8}


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
