"""The main job end to end, on the embedded default: files, agreement, repetition, and what must not be left behind."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from pow2quant import config, datasets, models, pipeline, run_folder
from pow2quant.adapters import aimet_encodings, onnx_qdq
from pow2quant.backends.custom import CustomSimulation
from pow2quant.config import DataConfig, RunConfig
from pow2quant.errors import OutputError, Pow2QuantError
from pow2quant.pow2_constraints import Encoding

KEYS = {
    *("quantization_type", "backend", "pipeline_steps", "config", "final_quantization_details", "initial_accuracy"),
    *("ptq_accuracy", "final_accuracy", "onnxruntime_accuracy", "final_sqnr_db", "total_improvement"),
    *("model_size_bytes", "validation", "environment", "duration_seconds", "certificate", "verdict"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded network's weights, trained once."""
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    model = models.train_digits(models.digits_cnn(), datasets.load(DataConfig()), seed=0)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return str(path)


def configured(weights: str, **values: object) -> RunConfig:
    short = {"model.weights": weights, "ptq.calibration_batches": 4, "ptq.max_eval_batches": 3}
    return config.with_values(RunConfig(), short | {k.replace("__", "."): v for k, v in values.items()})


@pytest.fixture(scope="module")
def run(weights: str, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Result:
    return pipeline.ptq(configured(weights, ptq__max_eval_batches=None), tmp_path_factory.mktemp("runs") / "run")


def test_every_executor_agrees_and_the_accuracy_is_kept(run: pipeline.Result) -> None:
    assert run.agrees
    assert [a.differing for a in run.agreements] == [0, 0, 0, 0]
    assert {a.claim for a in run.agreements} == {"proved"}
    assert run.report["initial_accuracy"] >= 97
    assert abs(run.report["final_accuracy"] - run.report["initial_accuracy"]) <= 0.5
    assert run.report["onnxruntime_accuracy"] == run.report["final_accuracy"]


def test_the_folder_and_the_report_hold_what_the_contract_says(run: pipeline.Result) -> None:
    files = {p.name for p in run.folder.iterdir()}
    contract = {"model.onnx", "model_float.onnx", "model.encodings", "report.json", "report.html"}
    assert files == contract | {"config.yaml", "model.safetensors"}
    report = json.loads((run.folder / "report.json").read_text())
    assert report.keys() >= KEYS
    weight = report["final_quantization_details"]["conv1.weight"]
    assert weight["power_of_2"][0] == f"2^({weight['exponent'][0]})"
    assert weight["hardware_op"][0] == f"x >> {-weight['exponent'][0]}"
    assert (
        report["final_quantization_details"]["fc.input"]["scale"]
        == 2.0 ** (report["final_quantization_details"]["fc.input"]["exponent"])
    )
    assert list(run.folder.parent.iterdir()) == [run.folder]


def test_every_scale_in_every_file_is_a_power_of_two_and_zero_points_are_even(run: pipeline.Result) -> None:
    model = onnx_qdq.load(run.folder / "model.onnx")
    pair = aimet_encodings.load(run.folder / "model.encodings")
    for table in (onnx_qdq.from_qdq(model).encodings, pair):
        assert table
        for encoding in table.values():
            assert encoding.is_power_of_two
            assert not (encoding.zero_point % 2).any()
    scales = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_scale")]
    assert all((np.frexp(s)[0] == 0.5).all() for s in scales)


def test_biases_are_int32_on_the_lattice(run: pipeline.Result) -> None:
    table = onnx_qdq.from_qdq(onnx_qdq.load(run.folder / "model.onnx")).encodings
    assert table["conv4.bias"].grid.bits == 32
    # conv4 reads a max-pooled tensor: its scale is carried through the pool
    expected = table["maxpool.output"].scale * table["conv4.weight"].scale
    np.testing.assert_array_equal(table["conv4.bias"].scale, expected)


def test_the_run_can_be_repeated_from_its_configuration(run: pipeline.Result, tmp_path: Path) -> None:
    again = pipeline.ptq(config.load(run.folder / "config.yaml"), tmp_path / "again")
    for name in ("model.onnx", "model.encodings", "model_float.onnx", "model.safetensors"):
        assert (again.folder / name).read_bytes() == (run.folder / name).read_bytes(), name


def test_validate_rebuilds_the_simulation_and_agrees(run: pipeline.Result) -> None:
    found = pipeline.validate(run.folder, max_batches=2)
    assert found.agrees
    assert found.free_scales == []
    assert [a.against for a in found.agreements] == ["custom simulation"] * 4


def test_validate_names_the_tensor_behind_a_changed_weight(run: pipeline.Result, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in run.folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    model = onnx.load(broken / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "conv4.weight_quantized")
    codes = numpy_helper.to_array(tensor).copy()
    codes[:, 0, 1, 1] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    onnx.save(model, broken / "model.onnx")
    found = pipeline.validate(broken, max_batches=2)
    assert not found.agrees
    plain, optimized, *pair = found.agreements
    assert plain.differing
    assert optimized.differing
    assert all(a.agrees for a in pair)
    assert plain.first_diverging is not None
    assert plain.first_diverging.tensor == "relu4.output"
    assert plain.claim == "differs"


@pytest.mark.parametrize(("weight", "activation"), [(2, 2), (3, 5), (4, 4), (5, 3), (6, 7), (7, 6), (4, 8), (16, 8)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_other_widths_agree_to_the_last_bit(
    weights: str, tmp_path: Path, weight: int, activation: int, symmetric: bool
) -> None:
    result = pipeline.ptq(
        configured(
            weights,
            quantization__weight__bitwidth=weight,
            quantization__output__bitwidth=activation,
            quantization__output__symmetric=symmetric,
            quantization__input__bitwidth=activation,
        ),
        tmp_path / "run",
    )
    assert [a.differing for a in result.agreements] == [0, 0, 0, 0], result.report["verdict"]


def test_sixteen_bit_activations_say_which_layers_are_not_proved(weights: str, tmp_path: Path) -> None:
    wide = configured(weights, quantization__output__bitwidth=16, quantization__input__bitwidth=16)
    result = pipeline.ptq(wide, tmp_path / "run")
    certificate = result.report["certificate"]
    assert not certificate["proved"]
    assert "conv4" in {layer["node"] for layer in certificate["layers"] if not layer["proved"]}
    for agreement in result.agreements:
        assert agreement.claim == ("differs" if agreement.differing else f"observed on {192} inputs")


def test_per_tensor_and_free_scales_and_float_sites_run(weights: str, tmp_path: Path) -> None:
    per_tensor = pipeline.ptq(configured(weights, quantization__weight__per_channel=False), tmp_path / "a")
    assert per_tensor.agrees
    free = {f"quantization__{role}__power_of_2": False for role in ("weight", "input", "output", "bias")}
    assert pipeline.ptq(configured(weights, **free), tmp_path / "b").report["quantization_type"] == "free_scale"
    float_site = pipeline.ptq(configured(weights, quantization__overrides={"conv4": None}), tmp_path / "c")
    assert "conv4.weight" not in float_site.report["final_quantization_details"]


def test_an_existing_run_is_replaced_only_when_asked(weights: str, tmp_path: Path) -> None:
    target = tmp_path / "run"
    pipeline.ptq(configured(weights), target)
    before = (target / "report.json").read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        pipeline.ptq(configured(weights), target)
    assert (target / "report.json").read_bytes() == before
    pipeline.ptq(configured(weights, seed=7), target, overwrite=True)
    assert "seed: 7" in (target / "config.yaml").read_text()
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_no_run_is_never_overwritten(weights: str, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="no run of pow2quant"):
        pipeline.ptq(configured(weights), tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(*args: object) -> None:
        raise error

    monkeypatch.setattr(CustomSimulation, "export", interrupted)
    with pytest.raises(error):
        pipeline.ptq(configured(weights), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_state_round_trip(tmp_path: Path) -> None:
    from tests.strategies import encodings

    @pytest.mark.filterwarnings("ignore")
    def check(table: dict[str, Encoding]) -> None:
        parameters = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
        run_folder.save_state(tmp_path / "s.safetensors", parameters, table)
        restored, again = run_folder.load_state(tmp_path / "s.safetensors")
        assert again == table
        np.testing.assert_array_equal(restored["a.weight"], parameters["a.weight"])

    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    tables = st.dictionaries(st.text("abc.", min_size=1, max_size=6), encodings(), max_size=4)
    settings(max_examples=40, suppress_health_check=list(HealthCheck))(given(tables)(check))()


def test_a_foreign_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(Pow2QuantError, match=r"model\.safetensors"):
        run_folder.load_state(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(Pow2QuantError, match=r"model\.safetensors"):
        run_folder.load_state(path)
