"""Which task data look like, and every command on several of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pow2quant
from pow2quant.cli import main
from pow2quant.errors import ConfigError, DataError
from pow2quant.plugins import names, resolve
from pow2quant.study import limits
from pow2quant.tasks.base import Metric
from pow2quant.tasks.choosing import task_of
from pow2quant.tasks.judging import SQNR, judged
from pow2quant.training.schedule import loss_of
from tests.kinds import QUICK
from tests.test_metrics import largest_error


@pytest.mark.parametrize(
    ("shape", "targets", "task"),
    [
        ((10,), torch.arange(4), "classification"),
        ((10,), torch.arange(4)[:, None], "classification"),
        ((1,), torch.tensor([0, 1, 1, 0]), "classification"),
        ((3,), torch.eye(3), "classification"),
        ((3,), torch.tensor([[1.0, 1, 0], [0, 0, 0]]), "multi-label"),
        ((2, 8, 8), torch.zeros(4, 8, 8, dtype=torch.long), "segmentation"),
        ((2, 8, 8), torch.zeros(4, 1, 8, 8, dtype=torch.long), "segmentation"),
        ((1, 8, 8), torch.ones(4, 1, 8, 8), "segmentation"),
        ((6, 5), torch.zeros(4, 6, dtype=torch.long), "segmentation"),
        ((3, 8, 8), torch.rand(4, 3, 8, 8), "image-to-image"),
        ((1,), torch.rand(4), "regression"),
        ((1,), torch.tensor([3, 5]), "regression"),
        ((4,), torch.rand(5, 4), "regression"),
        ((4, 9), [{"boxes": torch.rand(2, 4)}], "none"),
        ((10,), None, "none"),
    ],
)
def test_which_task_data_look_like(shape: tuple[int, ...], targets: Any, task: str) -> None:
    found = task_of(None, None, targets, [shape])
    assert found.name == task
    if targets is not None:
        found.check(targets, len(targets), "here")


def test_every_task_that_is_known_refuses_what_it_cannot_read() -> None:
    for name in set(names("tasks")) - {"none", "detection"}:
        with pytest.raises(DataError, match="here: expected"):
            resolve("tasks", name)([(3, 8, 8)]).check(torch.rand(2, 77), 2, "here")
        with pytest.raises(DataError, match=r"here: expected .*, got a list"):
            resolve("tasks", name)([(3, 8, 8)]).check(["a", "b"], 2, "here")
    with pytest.raises(DataError, match="class 9 in a mask; legal: 0 to 2, 255 is ignored"):
        resolve("tasks", "segmentation")([(3, 2, 2)]).check(torch.full((1, 2, 2), 9), 1, "here")
    masks = resolve("tasks", "segmentation")([(3, 2, 2)]).check(torch.tensor([[[0, 255], [-1, 2]]]), 1, "here")
    assert masks.tolist() == [[[0, -100], [-100, 2]]]
    assert float(nn.CrossEntropyLoss()(torch.zeros(1, 3, 2, 2), masks)) == pytest.approx(np.log(3), abs=1e-6)


def test_without_targets_a_network_is_judged_by_its_noise() -> None:
    batches = [(torch.ones(4, 3), None), (torch.ones(2, 3), None)]
    found = judged(SQNR, lambda x: x * 1.1, lambda x: x, batches, torch.device("cpu"))
    assert found == pytest.approx(20, abs=1e-2)


MINE = """
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset


def seeded(make):
    torch.manual_seed(0)
    return make()


def segmenter():
    return seeded(lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ))


def regressor(): return seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)))


def halves(make): return seeded(make), seeded(make)


def masks():
    def make():
        x = torch.rand(32, 1, 8, 8)
        return TensorDataset(x, (x[:, 0] > 0.5).long())
    return halves(make)


def numbers():
    def make():
        x = torch.rand(32, 5)
        return TensorDataset(x, x.sum(1))
    return halves(make)


class Boxes(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.full((1, 8, 8), i / 8), {"boxes": torch.rand(i % 3, 4)}


def boxes(): return Boxes(), Boxes()
def found(outputs, targets): return sum(len(t["boxes"]) for t in targets) / len(outputs)
def own_loss(outputs, targets): return (outputs[:, 0] - outputs[:, 1]).square().mean()
"""
FEW = {"report": {"statistics": False, "latency": False}, "training": {"epochs": 1, "learning_rate": 0.01}}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "few.yaml").write_text(json.dumps(FEW))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, model: str, data: str, *more: str) -> dict[str, Any]:
    arguments = [command, "--model", f"mine.py:{model}", "--data", f"mine.py:{data}", "--config", "few.yaml", "--quiet"]
    assert main([*arguments, "--output", f"{command}-{data}", "--overwrite", *more]) == 0
    report: dict[str, Any] = json.loads(Path(f"{command}-{data}", "report.json").read_text())
    return report


@pytest.mark.parametrize(("model", "data", "metric"), [("segmenter", "masks", "miou"), ("regressor", "numbers", "mae")])
def test_training_and_search_know_which_way_is_good(model: str, data: str, metric: str, mine: Path) -> None:
    trained = run("qat", model, data, "--weight-bits", "4", "--mode", "full")
    values = trained["metrics"][metric]
    assert {"float", "ptq", "qat_best", "quantized", "onnxruntime"} <= values.keys()
    assert values["quantized"] == values["onnxruntime"]
    epochs = json.loads(Path(f"qat-{data}", "training_metrics.json").read_text())["epochs"]
    best = min if metric == "mae" else max
    assert values["qat_best"] == best(e["accuracy"] for e in epochs)
    assert "initial_accuracy" not in trained or trained["initial_accuracy"] is None
    page = Path(f"qat-{data}", "report.html").read_text()
    assert "Quality" in page
    assert all(
        re.search(rf"<b>[\d.]+.*</b><span>{metric}, {when}</span>", page, re.I) for when in ("float", "simulation")
    )
    bound = "mae=100" if metric == "mae" else "miou=0%"
    found = run("search", model, data, "--constraint", bound, "--candidates", "2,8")["search"]
    assert found["metric"] == metric
    assert found["chosen"]["average_bits"] == 2, "any plan is good enough, and the cheapest is the best"


def test_a_bound_on_noise_holds_for_every_task(mine: Path) -> None:
    found = run("search", "segmenter", "masks", "--constraint", "sqnr=25dB", "--candidates", "2,4,8")
    assert found["search"]["unit"] == "dB"
    assert found["final_sqnr_db"] >= 25
    assert found["search"]["chosen"]["average_bits"] < 8


def test_detection_is_judged_by_the_user_s_metric(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run("ptq", "segmenter", "boxes", "--metric", "mine.py:found")
    assert (report["task"], report["metric"]) == ("detection", "found")
    assert report["metrics"]["found"]["float"] == report["metrics"]["found"]["onnxruntime"] == pytest.approx(7 / 8)
    assert run("ptq", "segmenter", "boxes")["task"] == "none"
    arguments = ["qat", "--model", "mine.py:segmenter", "--data", "mine.py:boxes", "--quiet", "--output", "q"]
    assert main(arguments) == 2
    assert "training.criterion: the task has no loss of its own" in capsys.readouterr().err
    assert run("qat", "segmenter", "boxes", "--loss", "mine.py:own_loss")["task"] == "none"


IMAGES, WORDS = np.zeros((4, 1, 8, 8), np.float32), ["cat", "dog", "cat", "ant"]


@pytest.mark.parametrize(
    "data",
    [
        [(torch.zeros(1, 8, 8), word) for word in WORDS],
        (IMAGES, np.array(WORDS)),
        [(IMAGES, np.array(WORDS))],
        [(torch.zeros(4, 1, 8, 8), WORDS)],
        [(torch.zeros(4, 1, 8, 8), tuple(WORDS))],
        [{"image": IMAGES, "label": WORDS}],
        {"image": IMAGES, "label": np.array(WORDS)},
        [(IMAGES, np.array(WORDS, object))],
    ],
)
def test_labels_that_are_text_are_refused(data: Any) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(DataError, match=r"text \('cat'\).*class indices"):
        pow2quant.quantize(network, data, progress=False)


def test_text_is_for_a_metric_that_reads_it_and_no_target_is_left_out_in_silence() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    few, text = {"report": {"statistics": False, "latency": False}}, [(torch.zeros(4, 1, 8, 8), WORDS)]
    result = pow2quant.quantize(network, text, metric=lambda outputs, words: words.count("cat"), config=few)
    assert next(iter(result.report["metrics"].values()))["quantized"] == 2
    result = pow2quant.quantize(network, text, task="none", config=few)
    assert not any("targets" in warning for warning in result.report["verdict"]["warnings"])
    masks = [(torch.zeros(4, 1, 8, 8), torch.zeros(4, 8, 8).long())]
    warning = pow2quant.quantize(network, masks, config=few).report["verdict"]["warnings"][0]
    assert "the targets, of shape (4, 8, 8), fit no task for outputs of (N, 3)" in warning


def test_losses_that_fit_and_losses_that_do_not() -> None:
    logits = torch.zeros(4, 3)
    assert float(loss_of(nn.CrossEntropyLoss(), (logits, logits), torch.zeros(4, dtype=torch.long))) > 1
    masks = torch.tensor([[0, 1, -100], [2, -100, 1]])
    scores = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0))
    plain = loss_of(nn.CrossEntropyLoss(), scores, masks)
    assert torch.equal(loss_of(nn.CrossEntropyLoss(ignore_index=255), scores, masks), plain)
    without = loss_of(nn.CrossEntropyLoss(ignore_index=0), scores, masks)
    assert torch.equal(without, nn.functional.cross_entropy(scores, masks.clamp(min=0), ignore_index=0))
    wide = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(1))
    first, last = (loss_of(nn.CrossEntropyLoss(), s, masks) for s in (wide, wide.movedim(1, -1)))
    assert torch.equal(first, last), "tokens have their classes in the last dimension"
    one, marks = scores[:, :1], torch.tensor([[0, 1, -100], [1, -100, 1]])
    counted = nn.functional.binary_cross_entropy_with_logits(one[:, 0][marks >= 0], marks[marks >= 0].float())
    assert torch.equal(loss_of(nn.BCEWithLogitsLoss(), one, marks), counted)
    assert float(loss_of(nn.MSELoss(), torch.ones(4, 1), torch.zeros(4))) == 1
    assert float(loss_of(nn.MSELoss(), torch.ones(4), torch.full((4,), -100.0))) == 101**2, "numbers are numbers"
    with pytest.raises(ConfigError, match=r"training\.criterion: BCEWithLogitsLoss does not fit the data"):
        loss_of(nn.BCEWithLogitsLoss(), logits, torch.zeros(4, dtype=torch.long))


class OneOutput(nn.Module):
    """The sign of a sum, told by one output in several forms."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(6, 1, bias=False), form
        nn.init.ones_(self.layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.form(self.layer(x))
        return result


FORMS = {
    "sigmoid": torch.sigmoid,
    "no dimension": lambda y: y.squeeze(1),
    "sigmoid, no dimension": lambda y: y.sigmoid().flatten(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_single_output_is_judged_as_what_it_is(form: str) -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    result = pow2quant.quantize(OneOutput(FORMS[form]).eval(), (x, y), progress=False, config=QUICK)
    assert result.report["initial_accuracy"] == 100
    assert result.report["final_accuracy"] > 90


class Naming(nn.Module):
    """The class of each pixel, or of the whole map."""

    def __init__(self, whole: bool, kind: torch.dtype, kept: bool) -> None:
        super().__init__()
        self.kept = kept
        self.first, self.second, self.whole, self.kind = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 7, 1), whole, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x).relu())
        return (y.mean((2, 3)) if self.whole else y).argmax(1, keepdim=self.kept).to(self.kind)


@pytest.mark.parametrize(("kind", "kept"), [(torch.int64, False), (torch.float32, False), (torch.int64, True)])
@pytest.mark.parametrize(("whole", "names"), [(True, ["top1"]), (False, ["miou", "pixel_accuracy"])])
def test_networks_that_name_classes_are_judged_by_these(
    whole: bool, names: list[str], kind: torch.dtype, kept: bool
) -> None:
    torch.manual_seed(0)
    x, network = torch.randn(32, 3, 8, 8), Naming(whole, kind, kept).eval()
    y = network(x).long()
    y = y[:, 0] if kept else y
    y[:8] = (y[:8] + 1) % 7
    task = "classification" if whole else "segmentation"
    named = pow2quant.quantize(network, (x, y), task=task, progress=False, config=QUICK)
    result = pow2quant.quantize(network, (x, y), progress=False, config=QUICK)
    assert named.report["metrics"] == result.report["metrics"]
    assert result.report["task"] == task
    assert list(result.report["metrics"]) == names
    assert result.report["metrics"][names[-1]]["float"] == 75
    assert 60 < result.report["metrics"][names[-1]]["quantized"] <= 80
    with pytest.raises(DataError, match="0 to 6"):
        pow2quant.quantize(network, (x, y + 7), progress=False, config=QUICK)


def test_nothing_is_learned_from_the_names_of_classes() -> None:
    y = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ConfigError, match="argmax"):
        loss_of(nn.CrossEntropyLoss(), y, y)


def test_integer_numbers_of_any_size_are_targets_of_regression() -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    for y in ((x[:, 0] * 10).long(), (x[:, :1] * 1e7).long()):
        result = pow2quant.quantize(OneOutput(torch.abs).eval(), (x, y), progress=False, config=QUICK)
        assert result.report["metric"] == "mae"


def test_bounds_called_accuracy_are_in_the_units_of_the_metric() -> None:
    def floor(text: str, initial: float, metric: Metric) -> float | None:
        return limits.accuracy_floor([limits.parse(text)], initial, metric)

    def metric(name: str, unit: str = "", better: bool = True) -> Metric:
        return Metric(name, SQNR.counter, better, unit)

    assert floor("accuracy_drop=1%", 90, metric("top1", "%")) == 89
    assert floor("accuracy=0.88", 90, metric("top1", "%")) == 88
    assert floor("accuracy_drop=1%", 0.95, metric("own")) == pytest.approx(0.94)
    assert floor("accuracy=0.9", 0.95, metric("own")) == pytest.approx(0.9)
    assert floor("accuracy_drop=0.5", 30, metric("psnr", "dB")) == pytest.approx(29.5)
    assert floor("accuracy_drop=0.5", -2.0, metric("mae", better=False)) == pytest.approx(-2.5)
    for text, judged_by in (("accuracy=0.99", metric("mae", better=False)), ("accuracy_drop=1%", metric("psnr", "dB"))):
        with pytest.raises(ConfigError, match=f"judged by {judged_by.name}"):
            floor(text, 0.1, judged_by)
    assert limits.parse("f1=0.5", "f1").value == 0.5, "the user's own"


@pytest.mark.parametrize("text", ["mae=3%", "psnr=much", "miou=101%", "miou=101"])
def test_bounds_on_metrics_have_units(text: str) -> None:
    with pytest.raises(ConfigError, match="constraint: "):
        limits.parse(text)


def test_the_metric_can_be_chosen_from_python() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
    data = torch.rand(16, 5), torch.rand(16)
    config = {"report": {"statistics": False, "latency": False}}
    named = pow2quant.quantize(net, data, metric="r2", config=config, progress=False)
    assert (named.report["metric"], list(named.report["metrics"])) == ("r2", ["r2", "mae", "rmse"])
    own = pow2quant.quantize(net, data, metric=largest_error, config=config, progress=False)
    with torch.no_grad():
        expected = float((own.model(data[0])[:, 0] - data[1]).abs().max())
    assert own.report["metrics"]["largest_error"]["quantized"] == pytest.approx(expected, rel=1e-5)
    assert own.report["metrics"]["largest_error"]["higher_is_better"] is False


def test_a_run_is_judged_by_torchmetrics(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    report = run("ptq", "segmenter", "masks", "--metric", "torchmetrics:JaccardIndex")
    values = report["metrics"]["JaccardIndex"]
    assert report["metric"] == "JaccardIndex"
    assert 100 * values["quantized"] == pytest.approx(report["metrics"]["miou"]["quantized"], abs=1e-3)
    assert values["quantized"] == values["onnxruntime"]
    flags = ["--model", "mine.py:segmenter", "--data", "mine.py:masks", "--quiet", "--output", "q"]
    assert main(["ptq", *flags, "--metric", "torchmetrics:Nothing"]) == 2
    assert "torchmetrics has no 'Nothing'; known here: miou, pixel_accuracy" in capsys.readouterr().err
