"""The second verdict: what became of the accuracy, how sure that is, and what makes it doubtful."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pow2quant import config, models, runs
from pow2quant.artifact import Agreement
from pow2quant.config import Choice, RunConfig
from pow2quant.errors import DataError
from pow2quant.report.advice import advice
from pow2quant.report.verdict import Change, claim_of, judged, verdict
from pow2quant.runs.judging import change_of, untrained
from pow2quant.runs.scores import Scores
from pow2quant.tasks.base import Task, in_unit
from pow2quant.tasks.classification import Classification
from pow2quant.tasks.multilabel import MultiLabel
from pow2quant.tasks.regression import Regression
from pow2quant.validation.agreement import Executor

AGREES = Agreement("engine", "simulation", 100, 0, 0.0, 100.0, None, "proved")
CHANGE = Change("top1", "%", True, before=90.0, after=89.8, interval=(-0.9, 0.5), samples=1000, constant=10.0)
ERROR = Change("mae", "", False, before=2.0, after=2.1, interval=(0.05, 0.15), samples=1000)
DENSE = Change("miou", "%", True, before=70.0, after=66.9, interval=None, samples=50)


@pytest.mark.parametrize(
    ("change", "quality", "words"),
    [
        (CHANGE, "kept", "kept within noise (top-1 -0.20 points, 95 % interval -0.90 to +0.50, 1,000 samples)"),
        (replace(CHANGE, after=91.0, interval=(0.4, 1.6)), "kept", "gained (top-1 +1.00 points"),
        (replace(CHANGE, after=89.7, interval=(-0.4, -0.2)), "kept", "kept to within 0.5 points"),
        (replace(CHANGE, after=86.9, interval=(-4.0, -2.2)), "lost", "lost 3.1 points of top-1 (95 % interval -4.00"),
        (replace(CHANGE, after=86.0, interval=(-12.0, 4.0), samples=50), "unknown", "too few samples"),
        (replace(CHANGE, after=60.0, interval=(-45.0, -15.0), samples=50), "lost", "lost 30.0 points"),
        (replace(CHANGE, after=80.0, interval=(-12.0, -8.0), guesses=True), "unknown", "has none to lose"),
        (replace(CHANGE, after=float("nan")), "unknown", "top-1 is 90 before and nan after"),
        (ERROR, "lost", "lost 0.1 of mae (95 % interval +0.05 to +0.15"),
        (replace(ERROR, after=2.01, interval=(0.005, 0.015)), "kept", "kept to within 0.02 (mae +0.01"),
        (replace(ERROR, after=1.9, interval=(-0.15, -0.05)), "kept", "gained (mae -0.1, 95 %"),
        (DENSE, "lost", "lost 3.1 points of mIoU (50 samples, no interval"),
        (replace(DENSE, after=69.8), "kept", "kept to within 0.5 points (mIoU -0.20 points"),
        (replace(DENSE, after=71.0), "kept", "gained"),
        (None, "unknown", "not measured"),
    ],
)
def test_accuracy_is_judged_by_its_interval(change: Change | None, quality: str, words: str) -> None:
    found, sentence = judged(change, "more bits")
    assert found == quality
    assert words in sentence
    assert (": try more bits" in sentence) == (quality == "lost")


@pytest.mark.parametrize(
    ("claims", "differing", "claim"),
    [
        (("proved", "proved"), 0, "proved"),
        (("proved", "observed on 64 inputs"), 0, "observed"),
        (("proved", "differs"), 1, "differs"),
    ],
)
def test_one_claim_over_all_executors(claims: tuple[str, str], differing: int, claim: str) -> None:
    first, second = (replace(AGREES, claim=c) for c in claims)
    agreements = [first, replace(second, differing=differing)]
    assert claim_of(agreements) == claim
    found = verdict(agreements, CHANGE)
    assert (found["agrees"], found["claim"], found["quality"]) == (not differing, claim, "kept")
    assert found["agreement"] in found["text"]
    assert found["change"] in found["text"]


def scored(task: Task, before: Tensor, after: Tensor, targets: Tensor, batch: int = 7) -> Change:
    """What is made of float and quantized outputs that come in batches."""
    given, quantized = before.split(batch), iter(after.split(batch))
    scores = Scores(task)
    executor = scores.watch(Executor("simulation", lambda _: [next(quantized).numpy()], lambda _: {}), noise=True)
    for inputs in scores.stream(zip(given, targets.split(batch), strict=True), lambda batch: [np.asarray(batch[0])]):
        executor.run(inputs)
    change = change_of(scores, "simulation")
    assert change is not None
    return change


def test_the_change_is_paired_sample_by_sample() -> None:
    labels = torch.arange(40) % 4
    before = nn.functional.one_hot(labels).float()
    before[:4] = before[:4].roll(1, 1)  # 4 of 40 are wrong
    after = before.clone()
    after[0] = nn.functional.one_hot(labels[0], 4)  # one becomes right, two become wrong
    after[10:12] = after[10:12].roll(1, 1)
    change = scored(Classification(((4,),)), before, after, labels)
    assert (change.metric, change.before, change.after, change.samples) == ("top1", 90.0, 87.5, 40)
    mean, squares = -1 / 42, 4 / 42
    half = 1.959964 * np.sqrt((squares - mean**2) / 42)
    assert change.interval == pytest.approx((100 * (mean - half), 100 * (mean + half)), abs=1e-3)
    assert (change.constant, change.guesses) == (25.0, False)


def test_the_change_of_an_error_has_its_unit_and_direction() -> None:
    targets, before = torch.zeros(50, 1), torch.ones(50, 1)
    after = before + torch.tensor([[0.0], [0.2]]).repeat(25, 1)
    change = scored(Regression(((1,),)), before, after, targets)
    assert (change.metric, change.unit, change.higher_is_better, change.constant) == ("mae", "", False, None)
    half = 1.959964 * np.std([0.0, 0.2] * 25, ddof=1) / np.sqrt(50)
    assert change.interval == pytest.approx((0.1 - half, 0.1 + half), abs=1e-5)
    assert judged(change)[0] == "lost"


def test_a_network_that_is_no_better_than_one_answer_guesses() -> None:
    task = Classification(((2,),))
    labels = torch.zeros(200, dtype=torch.long)
    labels[:20] = 1
    logits = torch.tensor([1.0, 0.0]).repeat(200, 1)
    logits[:2] = torch.tensor([0.0, 1.0])  # 91 % right, and 90 % are of class 0
    change = scored(task, logits, logits, labels)
    assert change.guesses
    (doubt,) = verdict([AGREES], change)["warnings"]
    assert "chance level: 91.00 %, and one answer for every sample gets 90.00 %" in doubt
    same = torch.zeros(50, dtype=torch.long)
    (doubt,) = verdict([AGREES], scored(task, logits[:50], logits[:50], same))["warnings"]
    assert "all 50 evaluated samples have the same label" in doubt


def test_what_is_at_nothing_has_nothing_to_lose() -> None:
    labels = torch.ones(30, 3)
    change = scored(MultiLabel(((3,),)), -labels, -labels, labels)
    assert (change.before, change.after) == (0.0, 0.0)
    assert judged(change)[0] == "unknown"
    nothing = MultiLabel(((3,),)).metrics[0].counter()
    nothing.add([-np.ones((30, 3))], np.zeros((30, 3)))  # no label is given, and none is meant
    assert in_unit(nothing) is None


def configured(weight: int, output: int, methods: tuple[str, ...] | None, **values: object) -> RunConfig:
    made = config.with_values(
        RunConfig(), {"quantization.weight.bitwidth": weight, "quantization.output.bitwidth": output, **values}
    )
    chosen = config.default_methods(made) if methods is None else tuple(Choice(name) for name in methods)
    return replace(made, ptq=replace(made.ptq, methods=chosen))


QAT = ["qat (weights)"]


@pytest.mark.parametrize(
    ("run", "more", "words"),
    [
        (configured(8, 8, None), [], "--method auto, or pow2quant qat"),
        (configured(4, 4, None), [], "--method auto, or pow2quant qat --mode full"),
        (configured(2, 8, None), [], "pow2quant qat, or --method auto"),
        (configured(8, 8, ()), [], "the default methods (bias_correction), or --method auto"),
        (configured(4, 8, None, **{"quantization.weight.per_channel": False}), [], "one weight scale per channel"),
        (configured(4, 4, None), QAT, "--mode full, or pow2quant search"),
        (configured(4, 4, None, **{"training.mode": "full"}), QAT, "more --epochs, or pow2quant search"),
    ],
)
def test_the_advice_fits_the_run(run: RunConfig, more: list[str], words: str) -> None:
    assert words in advice(run, [*(name for name, _ in run.ptq.methods or ()), *more])


def test_pixels_come_first_where_they_would_win() -> None:
    assert advice(configured(8, 8, None), ["bias_correction"], pixels=True).startswith("--input pixels, or --method")


def test_what_was_done_is_not_advised() -> None:
    run = configured(4, 8, ("output_mse",))
    assert advice(run, ["output_mse"]).startswith(
        "the default methods (align, gptq, bias_correction), or --method auto"
    )
    assert advice(run, ["output_mse"], tried=True).startswith("pow2quant qat, or pow2quant search")
    assert advice(run, ["align", "gptq"]).startswith("--method auto, or pow2quant qat")


def test_a_network_is_untrained_while_its_batch_norms_are_new() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    assert untrained(network)
    network(torch.rand(8, 1, 6, 6))
    assert not untrained(network)
    assert not untrained(nn.Sequential(nn.Linear(2, 2)))
    assert not untrained(models.trained_digits_cnn())


NETWORK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

def broken():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(12, 3))
    network[0].weight.data.fill_(3e38)
    return network

def data():
    torch.manual_seed(0)
    images, labels = torch.rand(64, 1, 4, 4), torch.randint(0, 3, (64,))
    return TensorDataset(images, labels), TensorDataset(images, labels)
"""


def test_a_random_network_gets_a_truthful_second_verdict(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(NETWORK)
    values = {"model.name": f"{tmp_path}/own.py:network", "data.dataset": f"{tmp_path}/own.py:data"}
    values |= {"report.statistics": False, "report.latency": False}
    found = runs.ptq(config.with_values(RunConfig(), values), tmp_path / "run").report["verdict"]
    assert (found["agrees"], found["claim"], found["quality"]) == (True, "proved", "unknown")
    chance, larger = found["warnings"]
    assert "the float network is at chance level" in chance
    assert "the quantized file is larger than the float one" in larger


def test_a_network_that_overflows_is_named_where_it_does(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(NETWORK)
    values = {"model.name": f"{tmp_path}/own.py:broken", "data.dataset": f"{tmp_path}/own.py:data"}
    with pytest.raises(DataError, match=r"^0\.output: the network gives NaN or infinity here, calibration batch 0; "):
        runs.ptq(config.with_values(RunConfig(), values), tmp_path / "run")
