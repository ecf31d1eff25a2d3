"""The main job end to end, on the embedded default: files, agreement, repetition, and what must not be left behind."""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

from pow2quant import config, models, run_folder, runs
from pow2quant.adapters import aimet_encodings, onnx_qdq
from pow2quant.backends.custom import CustomSimulation
from pow2quant.config import QuantPlan, RunConfig
from pow2quant.errors import ConfigError, FileFormatError, OutputError, Pow2QuantError, UnsupportedModelError
from pow2quant.frontends.prepare import prepare
from pow2quant.integer.certificate import certify
from pow2quant.integer.lower import lower
from pow2quant.pow2_constraints import Encoding
from pow2quant.validation import c99, engine, ort
from pow2quant.validation.agreement import compare
from tests.strategies import tables

KEYS = {
    *("quantization_type", "backend", "pipeline_steps", "config", "final_quantization_details", "initial_accuracy"),
    *("ptq_accuracy", "final_accuracy", "onnxruntime_accuracy", "final_sqnr_db", "total_improvement"),
    *("tied_logits", "model_size_bytes", "validation", "environment", "duration_seconds", "certificate", "verdict"),
}


@pytest.fixture(scope="module")
def weights() -> str:
    return str(models.DIGITS_WEIGHTS)


def configured(weights: str, **values: object) -> RunConfig:
    short = {"model.weights": weights, "ptq.calibration_batches": 4, "ptq.max_eval_batches": 3}
    return config.with_values(RunConfig(), short | {k.replace("__", "."): v for k, v in values.items()})


EXECUTORS = {
    f"onnxruntime, {how}{origin}"
    for how in ("no optimization", "all optimizations")
    for origin in ("", ", from model_float.onnx + model.encodings")
} | {engine.NAME, c99.NAME}
"""Those that every run has."""


@pytest.fixture(scope="module")
def run(weights: str, tmp_path_factory: pytest.TempPathFactory) -> runs.Result:
    return runs.ptq(configured(weights, ptq__max_eval_batches=None), tmp_path_factory.mktemp("runs") / "run")


def test_every_executor_agrees_and_the_accuracy_is_kept(run: runs.Result) -> None:
    assert run.agrees
    assert {a.executor for a in run.agreements} >= EXECUTORS
    assert not any(a.differing for a in run.agreements)
    assert {a.claim for a in run.agreements} == {"proved"}
    assert run.report["initial_accuracy"] >= 97
    assert abs(run.report["final_accuracy"] - run.report["initial_accuracy"]) <= 0.5
    assert run.report["onnxruntime_accuracy"] == run.report["final_accuracy"]


def test_the_folder_and_the_report_hold_what_the_contract_says(run: runs.Result) -> None:
    files = {p.name for p in run.folder.iterdir()}
    contract = {"model.onnx", "model_float.onnx", "model.encodings", "report.json", "report.html"}
    assert files == contract | {"certificate.json", "config.yaml", "model.safetensors", "statistics.json"}
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


def test_every_scale_in_every_file_is_a_power_of_two_and_zero_points_are_even(run: runs.Result) -> None:
    model = onnx_qdq.load(run.folder / "model.onnx")
    pair = aimet_encodings.load(run.folder / "model.encodings")
    for table in (onnx_qdq.from_qdq(model).encodings, pair):
        assert table
        for encoding in table.values():
            assert encoding.is_power_of_two
            assert not (encoding.zero_point % 2).any()
    scales = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_scale")]
    assert all((np.frexp(s)[0] == 0.5).all() for s in scales)


def test_biases_are_int32_on_the_lattice(run: runs.Result) -> None:
    table = onnx_qdq.from_qdq(onnx_qdq.load(run.folder / "model.onnx")).encodings
    assert table["conv4.bias"].grid.bits == 32
    # conv4 reads a max-pooled tensor: its scale is carried through the pool
    expected = table["maxpool.output"].scale * table["conv4.weight"].scale
    np.testing.assert_array_equal(table["conv4.bias"].scale, expected)


def test_the_run_can_be_repeated_from_its_configuration(run: runs.Result, tmp_path: Path) -> None:
    again = runs.ptq(config.load(run.folder / "config.yaml"), tmp_path / "again")
    for name in ("model.onnx", "model.encodings", "model_float.onnx", "model.safetensors"):
        assert (again.folder / name).read_bytes() == (run.folder / name).read_bytes(), name


def test_validate_rebuilds_the_simulation_and_agrees(run: runs.Result) -> None:
    found = runs.validate(run.folder, max_batches=2)
    assert found.agrees
    assert found.free_scales == []
    assert {a.executor for a in found.agreements} >= EXECUTORS | {"aimet simulation"}
    assert {a.against for a in found.agreements} == {"custom simulation"}


def test_validate_names_the_tensor_behind_a_changed_weight(run: runs.Result, tmp_path: Path) -> None:
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
    found = runs.validate(broken, max_batches=2)
    assert not found.agrees
    plain = found.agreements[0]
    for agreement in found.agreements:  # the others read the pair, or nothing
        reads_it = "from model_float" not in agreement.executor and "simulation" not in agreement.executor
        assert bool(agreement.differing) == reads_it, agreement.executor
    assert plain.first_diverging is not None
    assert plain.first_diverging.tensor == "relu4.output"
    assert plain.claim == "differs"


@pytest.mark.parametrize(("weight", "activation"), [(2, 2), (3, 5), (4, 4), (5, 3), (6, 7), (7, 6), (4, 8), (16, 8)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_other_widths_agree_to_the_last_bit(
    weights: str, tmp_path: Path, weight: int, activation: int, symmetric: bool
) -> None:
    result = runs.ptq(
        configured(
            weights,
            quantization__weight__bitwidth=weight,
            quantization__output__bitwidth=activation,
            quantization__output__symmetric=symmetric,
            quantization__input__bitwidth=activation,
        ),
        tmp_path / "run",
    )
    assert {a.executor for a in result.agreements} >= EXECUTORS
    assert not any(a.differing for a in result.agreements), result.report["verdict"]["text"]


def test_sixteen_bit_activations_say_which_layers_are_not_proved(weights: str, tmp_path: Path) -> None:
    wide = configured(weights, quantization__output__bitwidth=16, quantization__input__bitwidth=16)
    result = runs.ptq(wide, tmp_path / "run")
    certificate = result.report["certificate"]
    assert not certificate["proved"]
    assert "conv4" in {layer["node"] for layer in certificate["layers"] if not layer["proved"]}
    assert certificate["proved_integers"]
    for agreement in result.agreements:
        exact = agreement.executor in ("integer engine", "generated C")
        said = "proved" if exact else "observed on 192 inputs"
        assert agreement.claim == ("differs" if agreement.differing and not exact else said)


def test_per_tensor_and_free_scales_and_float_sites_run(weights: str, tmp_path: Path) -> None:
    per_tensor = runs.ptq(configured(weights, quantization__weight__per_channel=False), tmp_path / "a")
    assert per_tensor.agrees
    free = {f"quantization__{role}__power_of_2": False for role in ("weight", "input", "output", "bias")}
    assert runs.ptq(configured(weights, **free), tmp_path / "b").report["quantization_type"] == "free_scale"
    float_site = runs.ptq(configured(weights, quantization__overrides={"conv4": None}), tmp_path / "c")
    assert "conv4.weight" not in float_site.report["final_quantization_details"]


def test_an_existing_run_is_replaced_only_when_asked(weights: str, tmp_path: Path) -> None:
    target = tmp_path / "run"
    runs.ptq(configured(weights), target)
    before = (target / "report.json").read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        runs.ptq(configured(weights), target)
    assert (target / "report.json").read_bytes() == before
    runs.ptq(configured(weights, seed=7), target, overwrite=True)
    assert "seed: 7" in (target / "config.yaml").read_text()
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_no_run_is_never_overwritten(weights: str, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no report"):
        runs.ptq(configured(weights), tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(*args: object) -> None:
        raise error

    monkeypatch.setattr(CustomSimulation, "export", interrupted)
    with pytest.raises(error):
        runs.ptq(configured(weights), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40)
@given(table=tables())
def test_state_round_trip(tmp_path_factory: pytest.TempPathFactory, table: dict[str, Encoding]) -> None:
    path = tmp_path_factory.mktemp("state") / "s.safetensors"
    parameters = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.scalar": np.float32(3)}
    run_folder.save_state(path, parameters, table, "00ff")
    restored, again = run_folder.load_state(path)
    assert again == table
    for name, value in parameters.items():
        np.testing.assert_array_equal(restored[name], value)


FUNCTIONS = [nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.ELU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.PReLU]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("exponent", [-7, -5, -3, -1])
def test_functions_agree_on_every_code_of_eight_bits(function: type[nn.Module], exponent: int) -> None:
    codes = torch.ldexp(torch.arange(-128.0, 128.0), torch.tensor(exponent)).reshape(1, 1, 16, 16)
    sim = runs.simulate(nn.Sequential(function()).eval(), codes)
    sim.calibrate([codes])
    assert len(np.unique(sim.encodings()["input"].quantize(codes.numpy()))) >= 250
    artifact = sim.export(codes)
    model = onnx_qdq.to_qdq(artifact)
    reference = runs.simulation_executor(sim, "custom", torch.device("cpu"))
    others = [ort.plain(model), ort.optimized(model), engine.executor(lower(artifact))]
    found = compare(reference, others, [[codes.numpy()]], artifact)
    assert [a.differing for a in found] == [0, 0, 0]


def test_a_state_that_is_not_finite_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    run_folder.save_state(path, {"fc.weight": np.float32([1, np.nan])}, {}, "00ff")
    with pytest.raises(FileFormatError, match=r"model\.safetensors: parameter:fc\.weight holds NaN or infinity"):
        run_folder.load_state(path)


def test_a_foreign_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(Pow2QuantError, match=r"model\.safetensors"):
        run_folder.load_state(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(Pow2QuantError, match=r"model\.safetensors"):
        run_folder.load_state(path)


def agreeing(model: nn.Module, shape: tuple[int, ...], plan: QuantPlan | None = None, **changes: Tensor) -> list[int]:
    """Quantizes a network, with parameters changed after it was wrapped; the differing elements in onnxruntime."""
    torch.manual_seed(0)
    batches = torch.randn(3, 16, *shape).unbind()
    sim = runs.simulate(model, batches[0], plan)
    with torch.no_grad():
        for name, value in changes.items():
            dict(sim.model.named_parameters())[name.replace("__", ".")].copy_(value)
    sim.calibrate(batches)
    artifact = sim.export(batches[0])
    model_file = onnx_qdq.to_qdq(artifact)
    assert onnx_qdq.from_qdq(model_file).encodings == artifact.encodings
    reference = runs.simulation_executor(sim, "custom", torch.device("cpu"))
    others = [ort.plain(model_file), ort.optimized(model_file)]
    found = compare(reference, others, [[b.numpy()] for b in batches], artifact, proof=certify(artifact))
    return [a.differing for a in found]


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


def test_parameters_of_other_operations_are_exported_as_they_are_now() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 5)).eval()
    changes = {"1__weight": torch.tensor([0.9]), "3__weight": torch.full((64,), 3.0)}
    assert agreeing(model, (3, 6, 6), **changes) == [0, 0]


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("stride", [2, 3])
def test_pools_whose_last_window_hangs_over(kernel: int, stride: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AvgPool2d(kernel, stride, ceil_mode=True)).eval()
    try:
        assert agreeing(model, (3, 8, 8)) == [0, 0]
    except UnsupportedModelError as error:
        assert "ONNX" in str(error)  # noqa: PT017 (either is right; a wrong result is not)


@pytest.mark.parametrize("roles", [None, {"output": None}])
def test_a_sigmoid_that_stays_float_is_no_silu(roles: dict[str, None] | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Gate(), nn.Conv2d(4, 4, 1)).eval()
    plan = replace(QuantPlan.default(), overrides=(("1.*", roles),))
    plain, _ = agreeing(model, (3, 8, 8), plan)
    assert plain == 0


def test_more_structures_agree() -> None:
    up = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ELU(), nn.ConvTranspose2d(8, 4, 2, 2), nn.LeakyReLU(), nn.Softmax(1)
    ).eval()
    assert agreeing(up, (3, 6, 6)) == [0, 0]
    signal = nn.Sequential(nn.Conv1d(2, 8, 5), nn.GELU(), nn.AvgPool1d(2), nn.Conv1d(8, 4, 3), nn.Hardtanh()).eval()
    assert agreeing(signal, (2, 32)) == [0, 0]


def test_nothing_quantized_is_no_defect(weights: str, tmp_path: Path) -> None:
    result = runs.ptq(configured(weights, quantization__overrides={"*": None}), tmp_path / "run")
    assert not result.report["certificate"]["proved"]


def test_an_override_that_matches_nothing_is_an_error(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"overrides\.conv9.*conv4"):
        runs.ptq(configured(weights, quantization__overrides={"conv9": None}), tmp_path / "run")


SCALED = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.conv = nn.Conv2d(1, 10, 8)

    def forward(self, x):
        return torch.flatten(self.conv(x) * self.gain, 1)
"""


def test_a_trained_scalar_is_part_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(SCALED)
    state = {"gain": torch.tensor([4.0]), "conv.weight": torch.randn(10, 1, 8, 8), "conv.bias": torch.randn(10)}
    save_file(state, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    values = {"model.name": "net.py:Net", "model.weights": "w.safetensors", "ptq.max_eval_batches": 1}
    result = runs.ptq(config.with_values(RunConfig(), values), Path("run"))
    assert result.agrees
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert runs.validate(tmp_path / "run").agrees  # the paths in config.yaml are absolute


def test_files_of_networks_and_arrays_are_found_from_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()), torch.randn(16, 1, 6, 6)
    torch.onnx.export(
        model, (x[:1],), tmp_path / "net.onnx", dynamo=False, dynamic_axes={"x": {0: "n"}}, input_names=["x"]
    )
    np.save(tmp_path / "x.npy", x.numpy())
    monkeypatch.chdir(tmp_path)
    values = {"model.name": "net.onnx", "data.dataset": "x.npy"}
    runs.ptq(config.with_values(RunConfig(), values), Path("run"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert runs.validate(tmp_path / "run").agrees
    with pytest.raises(ConfigError, match=r"data\.resize: .*x\.npy holds arrays"):
        runs.ptq(config.with_values(RunConfig(), {**values, "data.resize": 8, "data.dataset": "../x.npy"}), Path("run"))


def test_a_folder_that_appears_during_a_run_is_kept(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, export = tmp_path / "run", CustomSimulation.export

    def meanwhile(sim: CustomSimulation, example: Tensor) -> object:
        target.mkdir()
        (target / "precious.txt").write_text("mine")
        return export(sim, example)

    monkeypatch.setattr(CustomSimulation, "export", meanwhile)
    with pytest.raises(OutputError):
        runs.ptq(configured(weights), target)
    assert (target / "precious.txt").read_text() == "mine"


def test_a_qdq_file_is_exported_as_its_run_is(run: runs.Result, tmp_path: Path) -> None:
    runs.export(run.folder, "c", tmp_path / "run")
    runs.export(run.folder / "model.onnx", "c", tmp_path / "file")
    files = {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert files
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "file").rglob("*") if p.is_file()}


def test_exports_do_not_overwrite(run: runs.Result, tmp_path: Path) -> None:
    runs.export(run.folder, "qdq", tmp_path)
    with pytest.raises(OutputError, match="--overwrite"):
        runs.export(run.folder, "qdq", tmp_path)
    runs.export(run.folder, "qdq", tmp_path, overwrite=True)


def test_validate_takes_other_encodings_and_refuses_what_has_no_meaning(run: runs.Result, tmp_path: Path) -> None:
    with pytest.raises(Pow2QuantError, match="nowhere"):
        runs.validate(run.folder, encodings=tmp_path / "nowhere.encodings", max_batches=1)
    with pytest.raises(Pow2QuantError, match="no QuantizeLinear"):
        runs.validate(run.folder / "model_float.onnx")
    with pytest.raises(ConfigError):
        runs.validate(run.folder / "model.onnx", config=RunConfig())


def test_the_engine_alone_is_compared_with_onnxruntime(run: runs.Result) -> None:
    found = runs.validate(run.folder / "model.onnx", max_batches=1, chosen="engine")
    assert found.agrees
    assert [a.executor for a in found.agreements] == ["onnxruntime, all optimizations", "integer engine"]
    assert {a.against for a in found.agreements} == {"onnxruntime, no optimization"}


def test_random_inputs_are_made_when_they_are_needed(run: runs.Result) -> None:
    def interrupted(items: Iterable[Any], title: str, total: int) -> Iterator[Any]:
        assert total == 10**12
        yield next(iter(items))
        raise KeyboardInterrupt

    progress: Any = SimpleNamespace(track=interrupted, note=print)
    with pytest.raises(KeyboardInterrupt):
        runs.validate(run.folder / "model.onnx", max_batches=10**12, progress=progress)


def test_simulating_a_prepared_network_leaves_it_as_it_was() -> None:
    x = torch.randn(2, 3, 8, 8)
    network = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), x)
    runs.simulate(network, x)
    assert [n.target for n in network.graph.nodes if n.op == "call_module"] == ["0", "1"]


@pytest.mark.parametrize("write", ["mul_", "data.mul_", "data ="])
def test_a_weight_that_is_written_is_quantized_anew(write: str) -> None:
    """EMA, pruning and torch.nn.utils write through `.data`, which PyTorch does not count."""
    x = torch.rand(4, 3, 8, 8)
    sim = runs.simulate(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    sim.calibrate([x])
    weight = sim.model.get_parameter("0.weight")
    with torch.no_grad():
        before = sim.model(x)
        if write == "mul_":
            weight.mul_(-1)
        elif write == "data.mul_":
            weight.data.mul_(-1)
        else:
            weight.data = -weight.data
        after = sim.model(x)
        weight.data.mul_(-1)
        assert torch.equal(sim.model(x), before)
    assert not torch.equal(after, before)
    artifact = sim.export(x)
    assert torch.equal(torch.from_numpy(ort.plain(onnx_qdq.to_qdq(artifact)).run([x.numpy()])[0].copy()), before)


PRECISION = """
import torch
from torch import nn

from pow2quant import simulate

torch.backends.{setting}
simulate(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.rand(1, 3, 8, 8))
assert torch.get_float32_matmul_precision() == "highest"
assert not torch.backends.cuda.matmul.allow_tf32
assert not torch.backends.cudnn.allow_tf32
if hasattr(torch.backends, "fp32_precision"):
    for part in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul):
        assert part.fp32_precision == "ieee", part
    torch.backends.cuda.matmul.fp32_precision = "tf32"
else:
    torch.backends.cuda.matmul.allow_tf32 = True
"""


@pytest.mark.parametrize("setting", ["cuda.matmul.allow_tf32 = True", "fp32_precision = 'tf32'"])
def test_both_ways_to_set_the_precision_of_products_work_afterwards(setting: str) -> None:
    code = PRECISION.format(setting=setting)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_weights_behave_under_inference_mode_and_under_taps_that_write() -> None:
    x = torch.randn(4, 3, 8, 8)
    sim = runs.simulate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), x)
    sim.calibrate([x])
    with torch.inference_mode():
        expected = sim.model(x)
    with sim.intercept(lambda site, value, quantized: quantized.mul_(2) if site.role == "weight" else quantized):
        sim.model(x)
    sim.model.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    result = sim.model(leaf)
    result.sum().backward()
    assert torch.equal(result, expected)
    assert leaf.grad is not None


def test_images_whose_largest_logit_is_not_alone_are_counted(weights, run, tmp_path):
    """Two bits leave four values for ten logits."""
    few = configured(weights, quantization__overrides={"fc": {"output": {"bitwidth": 2}}})
    share = runs.ptq(few, tmp_path / "run").report["tied_logits"]
    model = onnxruntime.InferenceSession(tmp_path / "run" / "model.onnx", providers=["CPUExecutionProvider"])
    job, _ = runs.reopened(tmp_path / "run")
    logits = np.concatenate([model.run(None, {"x": images.numpy()})[0] for images, _ in job.test(3)])
    tied = (logits == logits.max(1, keepdims=True)).sum(1) > 1
    assert share == pytest.approx(100 * tied.mean(), abs=1e-3)
    assert run.report["tied_logits"] < 5 < share
