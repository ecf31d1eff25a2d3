"""The command line as a user meets it: exit statuses, one clear line for bad input, and nothing half-written."""

import json
import os
import pickle
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from safetensors.torch import save_file

from pow2quant import models, plugins
from pow2quant.cli import main
from tests.commands import SHORT, command, files, refused


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
    assert len(document["validation"]) >= 5
    assert not any(a["differing"] for a in document["validation"])


def test_underscores_in_flags_are_hyphens_and_values_stay(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "with_underscore"
    arguments = ["ptq", "--weight_bits=4", "--activation_bits", "6", "--weights", str(weights), f"--output={target}"]
    assert main([*arguments, *SHORT]) == 0
    written = yaml.safe_load((target / "config.yaml").read_text())["quantization"]
    assert [written[role]["bitwidth"] for role in ("weight", "input", "output")] == [4, 8, 6]


def test_weights_of_four_bits_are_stored_in_bytes_where_that_is_asked_for(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    arguments = ["ptq", "--weight-bits", "4", "--storage", "int8", "--weights", str(weights), "--output", str(target)]
    assert main([*arguments, *SHORT]) == 0
    stored = {t.name: t.data_type for t in onnx.load(target / "model.onnx").graph.initializer}
    assert stored["fc.weight_quantized"] == onnx.TensorProto.INT8
    entries = json.loads((target / "model.encodings").read_text())["param_encodings"]
    assert {entry["bw"] for entry in entries if entry["name"].endswith(".weight")} == {4}
    report = json.loads((target / "report.json").read_text())
    assert not any(a["differing"] for a in report["validation"])
    assert main(["export", str(target), "--to", "qdq", "--storage", "int4", "--quiet"]) == 0
    narrow = {t.name: t.data_type for t in onnx.load(target / "export" / "qdq" / "model.onnx").graph.initializer}
    assert narrow["fc.weight_quantized"] == onnx.TensorProto.INT4


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


"""Commands that take --seed, --device and --config as every command does, and have no use for them."""


WAITING = """
import time
from pathlib import Path
import torch

class Images(torch.utils.data.Dataset):
    classes = list("0123456789")
    def __init__(self, waits):
        self.waits = waits
    def __len__(self):
        return 20
    def __getitem__(self, index):
        if self.waits:
            Path(__file__).with_name("waiting").touch()
            time.sleep(600)
        return torch.rand(1, 8, 8), index % 10

def data():
    return Images(True), Images(True)
"""


def hear_interrupts() -> None:
    """A shell's background jobs, and what they start, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(weights: Path, folder: Path, code: Path) -> subprocess.Popen[str]:
    """A run that has begun to write, and waits for its data until it is ended."""
    (code / "waiting.py").write_text(WAITING)
    own = ("--weights", str(weights), "--data", f"{code / 'waiting.py'}:data", "--output", "run")
    process = command("ptq", *own, cwd=folder, preexec_fn=hear_interrupts)
    while not (code / "waiting").exists() and process.poll() is None:
        time.sleep(0.05)
    return process


@pytest.fixture
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("code")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(weights: Path, tmp_path: Path, code: Path, sent: signal.Signals) -> None:
    process = started(weights, tmp_path, code)
    process.send_signal(sent)
    _, err = process.communicate(timeout=300)
    # A shell shows 130 for both: Python itself may pass the signal on when it exits.
    assert process.returncode in (130, -signal.SIGINT)
    assert err.splitlines()[-1] == "error: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_clears_up_after_a_killed_one(weights: Path, tmp_path: Path, code: Path) -> None:
    process = started(weights, tmp_path, code)
    process.kill()
    process.communicate(timeout=300)
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
    assert main(["ptq", "--weights", str(weights), "--output", str(tmp_path / "run"), *SHORT]) == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_closed_pipe_ends_the_command_quietly(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = command("list", cwd=tmp_path, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (141, "")  # as a shell says of programs that SIGPIPE ends


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_result_that_cannot_be_printed(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = command("list", cwd=tmp_path, stdout=full)
        _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (2, "error: the result cannot be written: No space left on device\n")


def test_verbose_adds_the_traceback_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--verbose"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith(f"error: {tmp_path}/report.json: cannot be read")


@dataclass(frozen=True)
class Note:
    """A method that leaves the simulation as it is."""

    def apply(self, sim: object, batches: object) -> None:
        print("a method's own words")


@dataclass(frozen=True)
class Broken:
    """A method with a defect."""

    def apply(self, sim: object, batches: object) -> None:
        raise ZeroDivisionError("nothing\nto divide by")


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Note, Broken):
        monkeypatch.setitem(plugins.TABLES["methods"], kind.__name__.lower(), f"{__name__}:{kind.__name__}")


@pytest.mark.usefixtures("methods")
def test_methods_are_applied_in_order(weights: Path, tmp_path: Path) -> None:
    arguments = ["ptq", "--weights", str(weights), "--output", str(tmp_path / "run"), *SHORT]
    assert main([*arguments, "--method", "note", "--method", "note"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["pipeline_steps"] == ["calibrate", "note", "note", "export"]


@pytest.mark.usefixtures("methods")
def test_an_error_of_a_users_method_is_bad_input_with_its_line(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ptq", "--weights", str(weights), "--output", str(tmp_path / "run"), "--method", "broken", *SHORT]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"error: \S+test_cli\.py, line \d+: ZeroDivisionError: nothing to divide by\n", shown.err)
    assert files(tmp_path) == set()


TALKATIVE = """
import logging
import warnings

from pow2quant.models import digits_cnn


def network():
    print("a network's own words")
    warnings.warn("a warning")
    logging.getLogger("library").warning("a log line")
    return digits_cnn()
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_what_others_print_stays_off_stdout(
    verbose: bool, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(TALKATIVE)
    arguments = ["ptq", "--model", f"{tmp_path}/mine.py:network", "--weights", str(weights), "--json", *SHORT]
    if verbose:
        with pytest.warns(UserWarning, match="a warning"):
            main([*arguments, "--output", str(tmp_path / "run"), "--verbose"])
    else:
        assert main([*arguments, "--output", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["model"].endswith("mine.py:network")
    assert "a network's own words" in captured.err
    print("and stdout is as it was")
    assert "as it was" in capsys.readouterr().out


def test_overwrite_replaces_the_run(weights: Path, tmp_path: Path) -> None:
    arguments = ["ptq", "--weights", str(weights), "--output", str(tmp_path / "run"), *SHORT]
    assert main(arguments) == 0
    (tmp_path / "run" / "of mine.txt").write_text("from the first run")
    assert main([*arguments, "--overwrite", "--weight-bits", "4"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (tmp_path / "run" / "of mine.txt").exists()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["config"]["weight"]["bitwidth"] == 4


def test_runs_without_output_never_collide(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert main(["ptq", "--weights", str(weights), *SHORT]) == 0
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 3
    assert all(re.fullmatch(r"ptq-\d{8}-\d{6}(-\d)?", name) for name in names)


def test_free_scales_are_listed(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "free.yaml"
    file.write_text("quantization: {weight: {power_of_2: false}, output: {power_of_2: false}}")
    main(["ptq", "--config", str(file), "--weights", str(weights), "--output", str(tmp_path / "run"), *SHORT])
    capsys.readouterr()
    status = main(["validate", str(tmp_path / "run" / "model.onnx"), "--quiet"])
    out = capsys.readouterr().out
    assert re.search(r"conv1\.weight: the scale 0\.\d+ is no power of two", out)
    assert "x: the scale" not in out
    assert status == (1 if "DIFFERS" in out else 0)


def test_report_into_another_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--output", str(tmp_path / "pages")]) == 0
    assert (tmp_path / "pages" / "report.html").read_bytes() == (run / "report.html").read_bytes()


def test_report_of_several_runs_compares_them(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), str(run), "--output", str(tmp_path / "both"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": [str(tmp_path / "both" / "report.html")]}
    assert "2 runs compared" in (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    refused(capsys, ["report", str(run), str(tmp_path), "--output", str(tmp_path / "new")], "report.json")
    assert not (tmp_path / "new").exists()
