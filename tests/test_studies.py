"""Studies: what is varied, how trials are shared by workers that may be killed, and what is written of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pow2quant import models, progress, runs
from pow2quant.cli import main
from pow2quant.config import Choice, RunConfig
from pow2quant.errors import ConfigError
from pow2quant.study import space
from pow2quant.study.space import applied, axis, combinations, given, settings

optuna = pytest.importorskip("optuna", reason="the extra 'search' is not installed")

from pow2quant.study.ledger import ATTEMPTS, Ledger, Plan  # noqa: E402
from pow2quant.study.trials import Trials  # noqa: E402
from pow2quant.study.workers import work  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


SHORT = ["--max-eval-batches", "1", "--max-calibration-batches", "1", "--method", "none", "--quiet"]


BITS = "quantization.weight.bitwidth"


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("k=2..5", (2, 3, 4, 5)),
        ("k=1.0:1.2:0.05", (1.0, 1.05, 1.1, 1.15, 1.2)),
        ("k=0.1:0.35:0.1", (0.1, 0.2, 0.3)),
        ("k=none,L1,true,1e-4,null", ("none", "L1", True, 1e-4, None)),
        ("k=models.py:resnet20", ("models.py:resnet20",)),
        ("k=3", (3,)),
    ],
)
def test_an_axis_as_it_is_written(text: str, points: tuple[Any, ...]) -> None:
    found = given(text).points
    assert found == points
    assert [type(p) for p in found] == [type(p) for p in points]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("k", "expected KEY=VALUES"),
        ("k=5..2", "no range"),
        ("k=1:2:0", "no range"),
        ("k=0:1:log", "above 0"),
        ("k=1,1", "twice"),
        ("k=0:1:1e-9", "more than 100,000"),
        ("k=0.0:1.0", "needs a step"),
    ],
)
def test_an_axis_that_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        _ = given(text).points
    assert "k" in str(caught.value)


def test_combinations_and_their_settings() -> None:
    width = axis("width", {"W4A8": {BITS: 4}, "W2A4": {BITS: 2, "quantization.output.bitwidth": 4}})
    grid = (width, given("ptq.methods.gpfq.conv_scalar+linear_scalar=1.0,1.5"), given("seed=0,1"))
    every = list(combinations(grid))
    assert len(every) == 8
    assert every[1] == {"width": "W4A8", "ptq.methods.gpfq.conv_scalar+linear_scalar": 1.0, "seed": 1}
    config = applied(RunConfig(), settings(grid, every[-1]))
    assert (config.quantization.weight.bits, config.quantization.output.bits, config.seed) == (2, 4, 1)
    assert config.ptq.methods == (Choice("gpfq", {"conv_scalar": 1.5, "linear_scalar": 1.5}),)


def test_a_parameter_goes_to_the_method_that_is_there() -> None:
    base = applied(RunConfig(), {"ptq.methods": ["output_mse", {"gpfq": {"regularizer": "L1"}}]})
    config = applied(base, {"ptq.methods.gpfq.lambda_": 0.5})
    assert config.ptq.methods == (Choice("output_mse"), Choice("gpfq", {"regularizer": "L1", "lambda_": 0.5}))


@pytest.mark.parametrize(("failures", "state"), [(1, "complete"), (2, "failed")])
def test_a_trial_that_fails_by_accident_is_tried_once_more(
    failures: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [failures]

    def score(*_: object) -> dict[str, Any]:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")
        evaluation = {"images": 1, "of": 1, "classes": 1, "sample": "", "preprocessing": [], "interval": None}
        figures = dict.fromkeys(("initial_accuracy", "final_accuracy", "final_sqnr_db"), 1.0)
        return {**figures, "evaluated_samples": 1, "evaluation": evaluation}

    monkeypatch.setattr(runs, "score", score)
    plan = Plan(((given("seed=1"),),))
    trials = Trials(RunConfig(), plan, tmp_path)
    (entry,) = work(Ledger(f"sqlite:///{tmp_path / 'study.db'}", "study", plan, "fingerprint"), trials)
    assert entry.state == state
    assert ("tried twice" in entry.error) == (state == "failed")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file({k: v.contiguous() for k, v in models.digits_cnn().state_dict().items()}, path)
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_goes_on_where_one_trial_fails_and_continues_where_it_stopped(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One width is not legal; a second call has nothing left to do; what is written is what was found."""
    folder = tmp_path / "sweep"
    command = ["sweep", "--weights", str(weights), "--grid", f"{BITS}=1..3", "--output", str(folder), *SHORT]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "1 is not legal" in printed
    assert "2 finished, 1 failed" in printed
    found = rows(folder)
    assert [r["state"] for r in found] == ["failed", "complete", "complete"]
    assert [r["weight_bits"] for r in found[1:]] == ["2", "3"]
    for key in ("original_top1", "original_top5", "quantized_top1", "quantized_top5", "seed", "duration_seconds"):
        assert float(found[1][key]) >= 0
    assert (folder / "figure_bitwidth.png").read_bytes().startswith(b"\x89PNG")
    before = (folder / "results.csv").read_bytes()
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [t["state"] for t in document["trials"]] == ["failed", "complete", "complete"]
    assert document["best"]["weight_bits"] in (2, 3)
    assert (folder / "results.csv").read_bytes() == before
    again = tmp_path / "again"
    assert main(["sweep", str(folder / "study.yaml"), "--output", str(again), "--quiet"]) == 0
    same = [{k: v for k, v in r.items() if k != "duration_seconds"} for r in rows(again)]
    assert same == [{k: v for k, v in r.items() if k != "duration_seconds"} for r in found]


MINE = """
import torch
from torch import nn

def network():
    torch.manual_seed({seed})
    return nn.Sequential(nn.Flatten(), nn.Linear(27, 3))

def data():
    torch.manual_seed({images})
    def half(n):
        return torch.utils.data.TensorDataset(torch.randn(n, 3, 3, 3), torch.arange(n) % 3)
    return half(32), half(30)
"""


@pytest.mark.parametrize("command", ["sweep", "compare"])
def test_a_study_of_another_network_or_other_images_is_another_study(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    varied = ["--grid", f"{BITS}=4", "--method", "none"] if command == "sweep" else ["--method", "none", "--seeds", "0"]
    same = [command, "--model", "mine.py:network", "--data", "mine.py:data", *varied]

    def told(seed: int, images: int) -> str:
        Path("mine.py").write_text(MINE.format(seed=seed, images=images), encoding="utf-8")
        assert main(same) == 0
        return capsys.readouterr().err

    assert [("finished already" in told(*which)) for which in ((0, 0), (0, 0), (1, 0), (1, 1), (0, 0))] == [
        *(False, True, False, False, True)
    ]
    assert len(list(Path("runs").iterdir())) == 3


def test_a_long_trial_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1.0)  # every stage takes long
    short = ["--max-eval-batches", "1", "--max-calibration-batches", "3", "--method", "bias_correction"]
    assert main(["sweep", "--grid", f"{BITS}=4,8", *short, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    for trial in (1, 2):
        assert f"trial {trial} of 2, calibrating: 1 of 3" in said
    assert "dB ->" not in said


def test_a_sweep_in_processes_makes_whole_runs(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    grid = ["--grid", "quantization.weight.per_channel=true,false", "--runs", "ptq", "--jobs", "2"]
    assert main(["sweep", "--weights", str(weights), *grid, "--output", str(folder), *SHORT]) == 0
    found = rows(folder)
    assert [r["agrees"] for r in found] == ["True", "True"]
    assert "runs/0000-True" in found[0]["run"]
    assert "0001-False" in (folder / "report.html").read_text(encoding="utf-8")
    for row in found:
        assert json.loads((Path(row["run"]) / "report.json").read_text())["final_accuracy"] == float(
            row["quantized_top1"]
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to try"),
        (["--grid", "quantization.weigth.bitwidth=2..4"], "did you mean weight"),
        (["--grid", "ptq.methods.gpfq.scalar=1,2"], "ptq.methods.gpfq.scalar: unknown key"),
        (["--grid", "seed=0,1", "--grid", "seed=2"], "varied twice"),
        (["--grid", "seed=0,1", "--sampler", "grid"], "tpe, random"),
        (["--grid", "seed=0,1", "--runs", "all"], "ptq, qat"),
    ],
)
def test_a_sweep_that_cannot_begin_is_refused(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *arguments, "--output", str(tmp_path / "sweep"), "--quiet"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_the_study_in_the_repository_is_legal() -> None:
    from pow2quant.study import sweep

    study = sweep.read(ROOT / "configs" / "studies" / "gpfq.yaml", RunConfig())
    sweep.checked(study)
    assert len(study.plan) == 8 + 21
    first = applied(study.base, settings(study.plan.grids[0], {"bits": 1}))
    assert first.ptq.applied == (Choice("gpfq", {"narrow": True}),)
    assert space.settings(study.plan.grids[0], {"bits": 8}) == {BITS: 8}


def test_a_comparison_by_hand() -> None:
    from pow2quant.study.cells import Comparison, cells, markdown, sentence

    def row(method: str, seed: int, top1: float | None) -> dict[str, Any]:
        start = {"network": "net", "widths": "W4A8", "method": method, "seed": seed, "state": "complete"}
        if top1 is None:
            return start | {"state": "failed", "error": "broken"}
        on = {"images": 64, "of_images": 450, "classes": 10}
        change = {"change": top1 - 92.0, "change_low": top1 - 95.0, "change_high": top1 - 91.0}
        figures = {
            "original": 92.0,
            "quantized": top1,
            "quantized_top1": top1,
            "sqnr_db": 10.0,
            "duration_seconds": 2.0,
        }
        on |= {"metric": "top1", "unit": "%", "higher_is_better": True}
        return start | figures | change | on

    made = cells([row("a", 0, 88.0), row("a", 1, 90.0), row("a", 2, None), row("b", 0, 90.0), row("b", 1, 90.0)])
    assert [(c.method, c.top1, c.spread, c.seeds, c.failed, c.best) for c in made] == [
        ("a", 89.0, round(2**0.5, 4), 2, 1, False),
        ("b", 90.0, 0.0, 2, 0, True),
    ]
    found = Comparison(Path("out"), made, ["broken"])
    assert sentence(found.best[0]) == "net: best is b at W4A8: 90.00 ± 0.00 % (float 92.00 %, 2 seeds)"
    assert "| net | W4A8 | **b** | 92.00 % | **90.00 ± 0.00 %** | -5.00 to -1.00 | 10.0 | 2.0 |" in markdown(found)
    same = "evaluated: all on the same images: 64 of 450 images, a stratified sample, 10 of 10 classes"
    assert same in markdown(found)


def test_trials_on_other_images_are_ranked_by_their_change() -> None:
    from pow2quant.study.sweep import Found

    on = {"state": "complete", "images": 64, "of_images": 450, "classes": 10, "sqnr_db": 9.0, "higher_is_better": True}
    easy = on | {"trial": 0, "quantized": 97.0, "change": -2.0, "sample": "a"}
    hard = on | {"trial": 1, "quantized": 90.0, "change": -0.5, "sample": "b"}
    found = Found(Path("out"), [easy, hard], ())
    assert [r["trial"] for r in found.finished] == [1, 0]
    assert found.evaluated.startswith("not all on the same images (64 of 450 images, ")
    alike = Found(Path("out"), [easy, hard | {"sample": "a"}], ())
    assert [r["trial"] for r in alike.finished] == [0, 1]
    assert alike.evaluated.startswith("all on the same images: 64 of 450 images, a stratified sample")


def test_methods_are_compared_on_networks_over_seeds(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, network = tmp_path / "compared", tmp_path / "net.py"
    network.write_text("from pow2quant.models import digits_cnn\n\n\ndef other():\n    return digits_cnn()\n")
    networks = [
        "--model",
        "digits-cnn",
        "--weights",
        str(weights),
        "--model",
        f"{network}:other",
        "--weights",
        str(weights),
    ]
    command = [
        "compare",
        *networks,
        "--method",
        "none",
        "--method",
        "output_mse",
        "--widths",
        "8:8,3:4",
        "--seeds",
        "0",
    ]
    command += [*SHORT[:4], "--quiet", "--output", str(folder)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "other: best is" in printed
    document = json.loads((folder / "comparison.json").read_text())
    assert [(c["network"], c["widths"], c["method"]) for c in document["cells"][:4]] == [
        ("digits-cnn", "W8A8", "none"),
        ("digits-cnn", "W8A8", "output_mse"),
        ("digits-cnn", "W3A4", "none"),
        ("digits-cnn", "W3A4", "output_mse"),
    ]
    half = len(document["cells"]) // 2
    first, second = ([c["top1"] for c in part] for part in (document["cells"][:half], document["cells"][half:]))
    assert first == second, "the same network under two names"
    assert (folder / "comparison.csv").read_text().count("\n") == 9
    assert (folder / "figure_digits_cnn.png").exists()
    assert "![other](figure_other.png)" in (folder / "comparison.md").read_text()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == document["cells"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "gpfq+nonsense"], "nonsense is unknown"),
        (["--widths", "eight"], "WEIGHTS:ACTIVATIONS"),
        (["--model", "a.py:f", "--weights", "x", "--weights", "y"], "one for each --model"),
        (["--model", "a.py:f", "--model", "a.py:f"], "same network twice"),
    ],
)
def test_a_comparison_that_cannot_begin_is_refused(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *arguments, "--output", str(tmp_path / "compared"), "--quiet"]) == 2
    assert words in capsys.readouterr().err


def test_the_study_in_the_documentation_is_legal(tmp_path: Path) -> None:
    from pow2quant.study import sweep

    page = (ROOT / "docs" / "howto" / "studies.md").read_text(encoding="utf-8")
    (tmp_path / "study.yaml").write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    study = sweep.read(tmp_path / "study.yaml", RunConfig())
    sweep.checked(study)
    assert len(study.plan) == 2 * 3 + 2


def test_an_interrupted_trial_is_given_back_and_not_recorded_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a library is being imported comes out as an error of that library."""
    plan = Plan(((given("seed=0,1"),),))
    ledger = Ledger(f"sqlite:///{tmp_path / 'study.db'}", "s", plan, "f")
    broken = applied(RunConfig(), {"model.name": str(tmp_path / "missing.py") + ":net"})
    monkeypatch.setattr("pow2quant.signals.interrupted", lambda: True)
    for _ in range(ATTEMPTS + 1):  # however often
        with pytest.raises(KeyboardInterrupt):
            list(work(ledger, Trials(broken, plan, tmp_path)))
    monkeypatch.undo()
    (entry,) = ledger.entries()
    assert (entry.state, entry.attempts) == ("running", 0)
    assert [e.state for e in work(ledger, Trials(broken, plan, tmp_path))] == ["failed", "failed"]
