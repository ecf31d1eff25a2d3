"""The three steps end to end: files, agreement, the command line, being killed, and several processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pow2quant import cli, config, models, run_folder
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError, OutputError
from pow2quant.runs import Result, validate
from pow2quant.three_steps import qat
from pow2quant.training import checkpoint
from pow2quant.training.trainer import Trainer
from tests.backends import BACKENDS

KEYS = {"initial_accuracy", "ptq_accuracy", "qat_best_accuracy", "final_accuracy", "total_improvement", "training"}


@pytest.fixture(scope="module")
def weights() -> str:
    return str(models.DIGITS_WEIGHTS)


def configured(weights: str, **values: object) -> RunConfig:
    short = {
        "model.weights": weights,
        "ptq.calibration_batches": 4,
        "ptq.methods": [],
        "quantization.weight.bitwidth": 3,
        "quantization.output.bitwidth": 4,
        "training.epochs": 2,
        "training.learning_rate": 1e-3,
    }
    return config.with_values(RunConfig(), short | {k.replace("__", "."): v for k, v in values.items()})


def run_of(configuration: RunConfig, folder: str | Path, **options: bool) -> Result:
    result = qat(configuration, folder, **options)
    assert result is not None
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["weights", "full"])
def test_every_executor_agrees_after_training_and_the_accuracy_has_grown(weights, backend, mode, tmp_path):
    result = run_of(configured(weights, training__mode=mode, backend=backend), tmp_path / "run")
    assert result.agrees
    assert [a.differing for a in result.agreements] == [0] * len(result.agreements)
    report = json.loads((result.folder / "report.json").read_text())
    assert report.keys() >= KEYS
    assert report["ptq_accuracy"] + 1 < report["final_accuracy"], "from 84 to 98 per cent"
    epochs = json.loads((result.folder / "training_metrics.json").read_text())["epochs"]
    assert report["qat_best_accuracy"] == max(e["accuracy"] for e in epochs)
    if mode == "full":  # what is trained is what is exported, biases too
        assert report["final_accuracy"] == report["training"]["last_accuracy"]
    assert report["total_improvement"] == pytest.approx(report["final_accuracy"] - report["initial_accuracy"])
    assert report["pipeline_steps"] == [
        *("calibrate", f"qat ({mode})"),
        *(["final ptq"] if mode == "weights" else []),
        "export",
    ]
    for name, detail in report["final_quantization_details"].items():
        scales = np.ravel(detail["scale"])
        assert (np.frexp(scales)[0] == 0.5).all(), name
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert validate(result.folder, max_batches=1).agrees


def test_the_folder_holds_metrics_and_curves(weights, tmp_path):
    result = run_of(configured(weights, ptq__max_eval_batches=1), tmp_path / "run")
    metrics = json.loads((result.folder / "training_metrics.json").read_text())
    assert [e["epoch"] for e in metrics["epochs"]] == [0, 1, 2]
    assert metrics["best_epoch"] in (0, 1, 2)
    assert max(e["accuracy"] for e in metrics["epochs"]) == result.report["qat_best_accuracy"]
    assert (result.folder / "training_curves.png").read_bytes()[:4] == b"\x89PNG"
    page = (result.folder / "report.html").read_text()
    assert "simulation, best of QAT" in page
    assert "Weights quantized; 2 epochs in" in page


def test_tensorboard_shows_every_epoch(weights, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {"training__tensorboard": True, "training__epochs": 2, "ptq__max_eval_batches": 1}
    result = run_of(configured(weights, **values), tmp_path / "run")
    board = EventAccumulator(str(result.folder / "tensorboard")).Reload()
    epochs = json.loads((result.folder / "training_metrics.json").read_text())["epochs"]
    shown = {event.step: event.value for event in board.Scalars("accuracy")}
    assert shown == pytest.approx({e["epoch"]: e["accuracy"] for e in epochs})


def test_what_cannot_be_trained_is_said(weights, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"training\.mode: 'weights' trains nothing"):
        qat(configured(weights, quantization__weight=None), tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"device: 'cuda:1' cannot be used by torchrun"):
        qat(configured(weights, device="cuda:1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_keep_their_encodings_in_the_final_step(weights, tmp_path):
    """The final PTQ chooses activations and biases; without it, activations keep those of before training."""
    tables = {}
    for final in (True, False):
        result = run_of(configured(weights, training__final_ptq=final, ptq__max_eval_batches=1), tmp_path / str(final))
        assert result.agrees
        tables[final] = run_folder.load_state(result.folder / "model.safetensors")[1]
    for name, encoding in tables[True].items():
        if name.endswith(".weight"):
            assert encoding == tables[False][name]
    outputs = [name for name in tables[True] if name.endswith(".output")]
    assert any(tables[True][name] != tables[False][name] for name in outputs)


def test_two_runs_are_equal_to_the_bit(weights, tmp_path):
    states = []
    for folder in (tmp_path / "a", str(tmp_path / "b")):
        result = run_of(configured(weights, ptq__max_eval_batches=1), folder, progress=False)
        states.append((result.folder / "model.safetensors").read_bytes())
    assert states[0] == states[1]


def test_an_unfinished_run_is_resumed_or_replaced_but_never_lost(weights, tmp_path):
    folder = tmp_path / "run"
    checkpoints = tmp_path / "run.training"
    checkpoints.mkdir()
    (checkpoints / "checkpoint.safetensors").write_bytes(b"something")
    with pytest.raises(OutputError, match=r"run\.training: holds an unfinished run; continue with --resume"):
        qat(configured(weights), folder)
    assert (checkpoints / "checkpoint.safetensors").read_bytes() == b"something"
    (checkpoints / "mine.txt").touch()
    run_of(configured(weights, ptq__max_eval_batches=1, training__epochs=1), folder, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "run.training"}
    assert [p.name for p in checkpoints.iterdir()] == ["mine.txt"]


OTHER = """
import torch
def data():
    def part(n, seed):
        torch.manual_seed(seed)
        return torch.utils.data.TensorDataset(torch.rand(n, 1, 8, 8), torch.arange(n) % 10)
    return part(256, {train}), part(64, {test})
"""


def test_a_training_does_not_go_on_with_other_data(weights, tmp_path, monkeypatch):
    file = tmp_path / "mine.py"

    def begin(train, test, stop):
        file.write_text(OTHER.format(train=train, test=test))
        measured, measure = [], Trainer._measure

        def until_the_second_epoch(self, *arguments):
            measured.append(arguments)
            if stop and len(measured) == 3:
                raise KeyboardInterrupt
            measure(self, *arguments)

        monkeypatch.setattr(Trainer, "_measure", until_the_second_epoch)
        try:
            values = {"data__dataset": f"{file}:data", "ptq__max_eval_batches": 1}
            return run_of(configured(weights, **values), tmp_path / "run", progress=False, resume=not stop)
        finally:
            monkeypatch.undo()

    with pytest.raises(KeyboardInterrupt):
        begin(0, 0, stop=True)
    for other in ((1, 0), (0, 1)):
        with pytest.raises(ConfigError, match="was made with other data"):
            begin(*other, stop=False)
    begin(0, 0, stop=False)


def test_what_fails_before_it_has_begun_leaves_no_checkpoint(weights, tmp_path):
    (tmp_path / "wrong.py").write_text("def loss(*_):\n    return 3\n")
    with pytest.raises(ConfigError, match=r"training\.criterion"):
        qat(configured(weights, training__criterion=f"{tmp_path}/wrong.py:loss"), tmp_path / "run")
    assert not (tmp_path / "run.training").exists()


@pytest.mark.parametrize("size", ["x", "", "0", "-1", "2"])
def test_variables_of_torchrun_that_make_no_sense_are_named(size, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is '.*unset WORLD_SIZE"):
        qat(configured(weights), tmp_path / "run")


def test_users_own_parts_and_a_wrong_one(weights, tmp_path):
    file = tmp_path / "parts.py"
    file.write_text(
        "import torch\nfrom torch.nn import functional as F\n"
        "def focal(logits, labels):\n    loss = F.cross_entropy(logits, labels, reduction='none')\n"
        "    return ((1 - (-loss).exp()) ** 2 * loss).mean()\n"
        "class Mine(torch.optim.SGD):\n    pass\n"
    )
    parts = {"training__criterion": f"{file}:focal", "training__optimizer": {"type": f"{file}:Mine", "momentum": 0.9}}
    result = run_of(configured(weights, **parts, ptq__max_eval_batches=1), tmp_path / "run")
    assert result.agrees
    with pytest.raises(ConfigError, match=r"parts\.py: has no 'Adam'; it has Mine, focal|focal, Mine"):
        qat(configured(weights, training__optimizer=f"{file}:Adam"), tmp_path / "other")


def test_the_command_line(weights, tmp_path, capsys):
    flags = f"--weights {weights} --weight_bits 3 --activation-bits=4 --mode full --epochs 1 --learning-rate 0.001"
    flags += " --max-eval-batches 2 --max-calibration-batches 2 --method none --batch_size 32 --quiet"
    status = cli.main(["qat", *flags.split(), "--output", str(tmp_path / "run"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == 0
    assert report["training"]["mode"] == "full"
    assert report["config"]["weight"]["bitwidth"] == 3
    assert cli.main(["qat", *flags.split(), "--output", str(tmp_path / "run")]) == 2
    assert cli.main(["qat", "--resume"]) == 2
    assert "--output" in capsys.readouterr().err
    assert cli.main(["qat", *flags.split(), "--learning-rate", "1e9", "--output", str(tmp_path / "high")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "training has diverged" in errors[0]
    assert (tmp_path / "high.training" / "checkpoint.safetensors").is_file()
    assert not (tmp_path / "high").exists()


# -- being killed ------------------------------------------------------------------------------------------------------


KILLS = int(os.environ.get("POW2QUANT_KILLS", "2"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_it_ends_with_the_bits_of_an_uninterrupted_run(weights, tmp_path):
    """Killed a while after a new checkpoint, or at any moment from the start of the process on; then resumed."""
    chance, file = random.Random(1), tmp_path / "config.yaml"
    settings = {"training__epochs": 3 * KILLS, "training__checkpoint_minutes": 0.0005, "ptq__max_eval_batches": 1}
    file.write_text(config.dump(configured(weights, **settings)))
    start = [sys.executable, "-m", "pow2quant", "qat", "--config", str(file), "--quiet", "--output"]
    subprocess.run([*start, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    run, kept = tmp_path / "run", tmp_path / "run.training"
    killed = 0
    while not run.exists():
        process = subprocess.Popen([*start, str(run), "--resume"], stdout=subprocess.DEVNULL)
        before = time.time()
        if killed < KILLS:
            anywhere = chance.random() < 0.3
            while not anywhere and process.poll() is None and not _is_newer(kept / "checkpoint.safetensors", before):
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 3 if anywhere else 0.25))
            process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (kept / "checkpoint.safetensors").exists():
            checkpoint.load(kept / "checkpoint.safetensors")
    assert killed >= KILLS - 1
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} - {kept.name} == {"whole", "run", "config.yaml"}


def _is_newer(path: Path, moment: float) -> bool:
    return path.exists() and path.stat().st_mtime > moment


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one_does(weights, tmp_path):
    """Plain SGD and folded batch norm, so that the losses are equal but for the order of sums.

    AdamW takes the signs of the smallest gradients too, and live batch norm has statistics of its own in every process.
    """
    settings = {"mode": "full", "epochs": 2, "learning_rate": 0.01, "scheduler": None, "batch_norm": "folded"}
    file, reports, losses = tmp_path / "config.yaml", [], []
    plain = configured(weights, ptq__max_eval_batches=1, training__optimizer="SGD")
    plain = config.with_values(plain, {f"training.{key}": value for key, value in settings.items()})
    file.write_text(config.dump(plain))
    for processes in (1, 2):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "pow2quant"]
        folder = tmp_path / str(processes)
        done = subprocess.run(
            [sys.executable, *start, "qat", "--config", str(file), "--quiet", "--json", "--output", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        reports.append(json.loads(done.stdout))
        losses.append([e["loss"] for e in json.loads((folder / "training_metrics.json").read_text())["epochs"][1:]])
    assert [r["training"]["processes"] for r in reports] == [1, 2]
    assert losses[1] == pytest.approx(losses[0], rel=0.01), "twice the learning rate makes 5 to 9 per cent"
    assert all(a["differing"] == 0 for r in reports for a in r["validation"])
