"""The command line as a user meets it: exit statuses, one clear line for bad input, and nothing half-written."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from safetensors.torch import save_file

from pow2quant import models
from pow2quant.cli import main

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--max-eval-batches", "1", "--max-calibration-batches", "2", "--quiet"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network's weights: the command line does not care how good they are."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file({k: v.contiguous() for k, v in models.digits_cnn().state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["ptq", "--weights", str(weights), "--output", str(folder), *SHORT]) == 0
    return folder


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """The command ends with status 2 and one line on stderr that holds these words."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    for word in words:
        assert word in captured.err, captured.err


def test_ptq_prints_a_verdict_and_where_the_files_are(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ptq", "--weights", str(weights), "--output", str(tmp_path / "run"), *SHORT]) == 0
    out = capsys.readouterr().out
    assert "0 of 640 output elements differ" in out
    assert str(tmp_path / "run") in out


def test_json_is_the_only_thing_on_stdout(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ptq", "--weights", str(weights), "--output", str(tmp_path / "run"), "--json", *SHORT]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["folder"] == str(tmp_path / "run")
    assert [a["differing"] for a in document["validation"]] == [0, 0, 0, 0]


def test_underscores_in_flags_are_hyphens_and_values_stay(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "with_underscore"
    arguments = ["ptq", "--weight_bits=4", "--activation_bits", "6", "--weights", str(weights), f"--output={target}"]
    assert main([*arguments, *SHORT]) == 0
    written = yaml.safe_load((target / "config.yaml").read_text())["quantization"]
    assert [written[role]["bitwidth"] for role in ("weight", "input", "output")] == [4, 8, 6]


def test_flags_override_the_configuration_file(weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"quantization": {"weight": {"bitwidth": 5}}, "seed": 3}))
    target = tmp_path / "run"
    arguments = ["ptq", "--config", str(file), "--weight-bits", "6", "--weights", str(weights), "--output", str(target)]
    assert main([*arguments, *SHORT]) == 0
    written = yaml.safe_load((target / "config.yaml").read_text())
    assert (written["quantization"]["weight"]["bitwidth"], written["seed"]) == (6, 3)


def test_validate_a_run_and_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(run), "--quiet"]) == 0
    assert main(["validate", str(run / "model.onnx"), "--json", "--quiet", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{\n") :])["free_scales"] == {}
    assert json.loads((tmp_path / "validation.json").read_text())["certificate"]["proved"]
    assert main(["validate", str(run / "model_float.onnx"), "--encodings", str(run / "model.encodings")]) == 0


def test_validate_fails_when_something_differs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = onnx.load(tmp_path / "model.onnx")
    scale = next(t for t in model.graph.initializer if t.name == "relu4.output_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(2), scale.name))
    onnx.save(model, tmp_path / "model.onnx")
    assert main(["validate", str(tmp_path), "--quiet"]) == 1
    assert "the first tensor that differs is relu4.output" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["aimet-0.6.1", "aimet-1.0.0", "aimet-2.0.0", "qdq"])
def test_export(run: Path, tmp_path: Path, form: str) -> None:
    assert main(["export", str(run), "--to", form, "--output", str(tmp_path)]) == 0
    assert len(files(tmp_path)) == 1


def test_encodings_files_convert_between_versions_and_back(run: Path, tmp_path: Path) -> None:
    current = run / "model.encodings"
    for version in ("0.6.1", "2.0.0", "1.0.0"):
        assert main(["export", str(current), "--to", f"aimet-{version}", "--output", str(tmp_path / version)]) == 0
        current = tmp_path / version / "model.encodings"
    assert current.read_bytes() == (run / "model.encodings").read_bytes()


def test_report_is_rebuilt(run: Path) -> None:
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == before


def test_list_names_everything_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    from pow2quant.plugins import TABLES

    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {kind: set(entries) for kind, entries in TABLES.items()} == {k: set(v) for k, v in listed.items()}
    assert all(text.endswith(".") or text.startswith("not usable") for e in listed.values() for text in e.values())


BAD_YAML = {
    "unknown key": ({"quantization": {"weigth": {}}}, ["quantization.weigth", "weight"]),
    "wrong type": ({"ptq": {"calibration_batches": "many"}}, ["ptq.calibration_batches", "many"]),
    "narrow": ({"quantization": {"weight": {"bitwidth": 1}}}, ["quantization.weight.bitwidth", "2 to 16"]),
    "wide": ({"quantization": {"output": {"bitwidth": 33}}}, ["quantization.output.bitwidth", "2 to 16"]),
    "model": ({"model": {"name": "torchvision:resnet19"}}, ["resnet19", "resnet18"]),
    "data": ({"data": {"dataset": "digitz"}}, ["digitz", "digits"]),
    "backend": ({"backend": "magic"}, ["magic", "custom"]),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_configurations(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, words = BAD_YAML[case]
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(values))
    before = files(tmp_path)
    refused(capsys, ["ptq", "--config", str(file), "--output", str(tmp_path / "run"), *SHORT], *words)
    assert files(tmp_path) == before


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return (os.rename, (str(self.victim), str(self.victim) + ".gone"))


def missing_keys(folder: Path) -> tuple[Path, list[str]]:
    state = models.digits_cnn().state_dict()
    state["extra.weight"] = state.pop("fc.weight")
    torch.save(state, folder / "w.pt")
    return folder / "w.pt", ["fc.weight", "extra.weight"]


def code(folder: Path) -> tuple[Path, list[str]]:
    (folder / "victim").write_text("alive")
    with (folder / "w.pt").open("wb") as file:
        pickle.dump(Malicious(folder / "victim"), file)
    return folder / "w.pt", ["w.pt"]


def not_finite(folder: Path) -> tuple[Path, list[str]]:
    state = models.digits_cnn().state_dict()
    state["conv4.weight"][0, 0, 0, 0] = float("inf")
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "w.safetensors")
    return folder / "w.safetensors", ["conv4.weight"]


def truncated(folder: Path) -> tuple[Path, list[str]]:
    (folder / "w.safetensors").write_bytes(b"\x10\x00")
    return folder / "w.safetensors", ["w.safetensors"]


@pytest.mark.parametrize("make", [missing_keys, code, not_finite, truncated])
def test_bad_weights(
    make: Callable[[Path], tuple[Path, list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, words = make(tmp_path)
    before = files(tmp_path)
    refused(capsys, ["ptq", "--weights", str(path), "--output", str(tmp_path / "run"), *SHORT], *words)
    assert files(tmp_path) == before


DATA = """
import torch
from torch.utils.data import TensorDataset


def nan():
    images = torch.rand(64, 1, 8, 8)
    images[40] = float("nan")
    return TensorDataset(images, torch.zeros(64, dtype=torch.int64)), empty()[1]


def empty():
    none = TensorDataset(torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64))
    return none, TensorDataset(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
"""


@pytest.mark.parametrize(("function", "words"), [("nan", ["NaN"]), ("empty", ["empty"])])
def test_bad_data(
    function: str, words: list[str], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.py").write_text(DATA)
    before = files(tmp_path)
    arguments = ["ptq", "--weights", str(weights), "--data", f"{tmp_path}/data.py:{function}"]
    refused(capsys, [*arguments, "--output", str(tmp_path / "run"), *SHORT], *words)
    assert files(tmp_path) - before <= {tmp_path / "__pycache__"}


def test_bad_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corrupt = tmp_path / "corrupt.onnx"
    corrupt.write_bytes(b"not a model at all")
    refused(capsys, ["validate", str(corrupt)], "corrupt.onnx")
    (tmp_path / "corrupt.encodings").write_text('{"version": ')
    pair = ["validate", str(run / "model_float.onnx"), "--encodings"]
    refused(capsys, [*pair, str(tmp_path / "corrupt.encodings")], "corrupt.encodings", "JSON")
    other = json.loads((run / "model.encodings").read_text())
    other["activation_encodings"][0]["name"] = "another.output"
    (tmp_path / "other.encodings").write_text(json.dumps(other))
    refused(capsys, [*pair, str(tmp_path / "other.encodings")], "another.output")
    refused(capsys, ["validate", str(tmp_path / "nowhere")], "nowhere")
    refused(capsys, ["export", str(tmp_path), "--to", "qdq"], "model.onnx")
    refused(capsys, ["export", str(run), "--to", "gif"], "gif", "qdq")
    refused(capsys, ["report", str(tmp_path)], "report.json")


def test_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["ptq", "--wait-bits", "8"], "--wait-bits")
    refused(capsys, ["ptq", "--weight-bits", "eight"], "eight")
    refused(capsys, ["frobnicate"], "frobnicate")
    refused(capsys, ["ptq", "--weight-bits", "33"], "2 to 16")


def test_outputs_that_cannot_be_written(
    run: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ptq", "--weights", str(weights), *SHORT, "--output"]
    refused(capsys, [*arguments, str(run)], str(run), "--overwrite")
    (tmp_path / "file").write_text("a file is no folder")
    refused(capsys, [*arguments, str(tmp_path / "file" / "run")], "file")
    refused(capsys, [*arguments, "/proc/pow2quant-run"], "/proc/pow2quant-run")
    assert files(tmp_path) == {tmp_path / "file"}


def test_a_full_disk(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        refused(capsys, ["ptq", "--weights", str(weights), "--output", str(disk / "run"), *SHORT], "No space left")
        assert files(disk) == set()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "pow2quant", *arguments]
    return subprocess.Popen(line, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_help_is_quick_and_every_command_has_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    out, _ = command("--help", cwd=tmp_path).communicate()
    assert time.monotonic() - started < 5  # torch alone takes longer; the exact promise is in test_house
    for name in ("ptq", "validate", "export", "report", "list"):
        assert name in out
        assert main([name, "--help"]) == 0
        assert "Example: pow2quant" in capsys.readouterr().out


def test_ctrl_c_leaves_nothing(weights: Path, tmp_path: Path) -> None:
    process = command("ptq", "--weights", str(weights), "--output", "run", cwd=tmp_path)
    while not list(tmp_path.glob(".run.*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # A shell shows 130 for both: Python itself may pass the signal on when it exits.
    assert process.returncode in (130, -signal.SIGINT)
    assert err.splitlines()[-1] == "error: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    line = f"{sys.executable} -m pow2quant list | head -1"
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
