"""A limited evaluation: which samples it takes, whatever form the data have, and what is said of its figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from pow2quant import config as configuration
from pow2quant import runs
from pow2quant.cli import main
from pow2quant.datasets.sampling import Sample, sample, spread
from pow2quant.datasets.sources import data_of
from pow2quant.logits.paired import wilson
from pow2quant.reading import Checked
from pow2quant.report.summary import evaluated
from pow2quant.runs.evaluating import interval_of


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_each_label_gets_its_share(labels: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(labels)))
    chosen = spread(count, len(labels), np.array(labels))
    assert len(set(chosen)) == count
    assert (np.diff(chosen) > 0).all()
    for label in set(labels):
        share = count * labels.count(label) / len(labels)
        assert abs(sum(labels[i] == label for i in chosen) - share) < 1 + 1e-9


def test_without_labels_samples_are_evenly_spaced() -> None:
    assert spread(5, 50).tolist() == [5, 15, 25, 35, 45]
    assert spread(3, 3).tolist() == [0, 1, 2]
    assert spread(4, 8, np.array([0, 0, 0, 0, 0, 0, 1, 1])).tolist() == [1, 3, 5, 7]


LABELS = torch.arange(10).repeat_interleave(12)
X = torch.arange(120.0)[:, None] + torch.zeros(120, 4)


class Items(Dataset[Any]):
    """Items in a form of one's own, with labels that only reading tells."""

    def __init__(self, labels: Tensor | None = LABELS, form: str = "pair") -> None:
        self.labels, self.form, self.reads = labels, form, 0

    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.labels is None:
            return X[index]
        label = int(self.labels[index]) if self.form != "mask" else self.labels[index].repeat(2, 2)
        return {"image": X[index], "label": label} if self.form == "dict" else (X[index], label)


class Stream:
    """Batches with a length, and no data set behind them."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def forms() -> dict[str, Any]:
    """The same labelled samples, sorted by class, in the forms that data may have."""
    whole = TensorDataset(X, LABELS)
    batches = [(X[i : i + 8], LABELS[i : i + 8]) for i in range(0, 120, 8)]
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3)).tolist()
    return {
        "tensors": whole,
        "arrays": (X.numpy(), LABELS.numpy()),
        "columns": {"x": X, "y": LABELS},
        "items": Items(),
        "dictionaries": Items(form="dict"),
        "list": [(X[i], int(LABELS[i])) for i in range(120)],
        "part": Subset(ConcatDataset([whole, whole]), range(120)),
        "loader": DataLoader(whole, 8),
        "shuffled": DataLoader(whole, 8, shuffle=True),
        "own order": DataLoader(whole, 8, sampler=order),
        "batches": batches,
        "stream": Stream(batches),
        "dictionary batches": [{"x": x, "y": y} for x, y in batches],
    }


def checked(made: Any) -> Checked:
    test = data_of((made, made), "data", 8, 8).test
    assert isinstance(test, Checked)
    return test


def seen(taken: Sample) -> tuple[list[int], list[int]]:
    """Numbers and labels of the samples, in the order of their numbers."""
    pairs = [(int(x[0]), int(y)) for images, labels in taken.batches for x, y in zip(images, labels, strict=True)]
    return [n for n, _ in sorted(pairs)], [y for _, y in sorted(pairs)]


@pytest.mark.parametrize("form", forms())
def test_every_form_of_data_gives_every_class(form: str) -> None:
    taken = sample(checked(forms()[form]), 5)
    numbers, labels = seen(taken)
    assert (len(numbers), len(set(numbers)), taken.total) == (40, 40, 120)
    assert np.bincount(labels).tolist() == [4] * 10
    assert labels == [LABELS[n] for n in numbers]
    assert seen(taken) == (numbers, labels), "every pass gives the same"
    if form != "own order":  # there, what lies evenly in the batches are other samples
        assert numbers == seen(sample(checked(forms()["tensors"]), 5))[0]


def test_the_sample_does_not_depend_on_the_size_of_batches() -> None:
    whole = TensorDataset(X, LABELS)
    found = {
        tuple(seen(sample(data_of((whole, whole), "data", size, size).test, limit))[0])  # type: ignore[arg-type]
        for size, limit in ((8, 5), (10, 4), (20, 2), (40, 1))
    }
    assert len(found) == 1


def test_images_of_every_class_where_labels_repeat_in_a_cycle() -> None:
    """Every tenth sample alone would be of one class."""
    labels = torch.arange(120) % 10
    found = seen(sample(checked(TensorDataset(X, labels)), 3))[1]
    assert sorted(set(found)) == list(range(10))


def test_data_without_labels_are_taken_evenly() -> None:
    for made in (Items(None), Stream([X[i : i + 8] for i in range(0, 120, 8)])):
        taken = sample(checked(made), 3)
        assert [int(x[0]) for images, _ in taken.batches for x in images] == [2 + 5 * i for i in range(24)]
    masks = sample(checked(Items(form="mask")), 3)
    assert [int(x[0]) for images, _ in masks.batches for x in images] == [2 + 5 * i for i in range(24)]


def test_labels_at_hand_are_not_read_again() -> None:
    items = Items()
    items.targets = LABELS.tolist()  # type: ignore[attr-defined]
    test = checked(items)
    before = items.reads
    sample(test, 5)
    assert items.reads == before


def test_without_a_limit_all_is_taken_as_it_lies() -> None:
    test = checked(TensorDataset(X, LABELS))
    for limit in (None, 15, 99):
        assert sample(test, limit).batches is test


def test_wilson_by_hand() -> None:
    assert wilson(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=5e-5)
    assert wilson(1.0, 450) == pytest.approx((0.99154, 1), abs=5e-6)
    assert wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=5e-5)
    assert interval_of(np.array([1.0, 2.0, 3.0]), hits=False) == pytest.approx([2 - 1.959964 / 3**0.5, 3.13161], 1e-5)


def test_what_is_said_of_an_evaluation() -> None:
    known = {"images": 40, "of": 1200, "classes": 9, "of_classes": 10}
    assert evaluated(known) == "40 of 1,200 images, a stratified sample, 9 of 10 classes"
    assert evaluated(known | {"classes": None}) == "40 of 1,200 images, an evenly spaced sample"
    assert evaluated(known | {"images": 1200, "classes": 10}) == "all 1,200 images, 10 of 10 classes"


SORTED = """
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

def digits():
    bunch = load_digits()
    order = bunch.target.argsort(kind="stable")
    x = torch.from_numpy(bunch.images[order]).float()[:, None] / 16
    data = TensorDataset(x, torch.from_numpy(bunch.target[order]).long())
    return data, data
"""


def sorted_digits(folder: Path, **values: Any) -> configuration.RunConfig:
    """The embedded network on digits that are sorted by class."""
    (folder / "mine.py").write_text(SORTED)
    keys = {"data.dataset": f"{folder}/mine.py:digits", "ptq.calibration_batches": 2, "ptq.methods": []}
    chosen = {key.replace("__", "."): value for key, value in values.items()}
    chosen |= {"model.weights": str(Path(runs.__file__).parents[1] / "weights" / "digits_cnn.safetensors")}
    return configuration.with_values(configuration.RunConfig(), keys | chosen)


def test_a_limited_run_says_on_what_its_figures_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(configuration.dump(sorted_digits(tmp_path)))
    flags = ["--config", str(tmp_path / "run.yaml"), "--max-eval-batches", "2", "--output", str(tmp_path / "run")]
    assert main(["ptq", *flags, "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "evaluated: 128 of 1,797 images, a stratified sample, 10 of 10 classes" in said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = report["evaluation"]
    assert [found[key] for key in ("images", "of", "classes", "of_classes")] == [128, 1797, 10, 10]
    low, high = found["interval"]
    assert low <= report["total_improvement"] <= high
    for key, name in (("float", "initial"), ("quantized", "final"), ("onnxruntime", "onnxruntime")):
        low, high = found["intervals"][key]
        assert low < report[f"{name}_accuracy"] <= high <= 100
        assert f"{low:.2f} to {high:.2f} %" in said
    assert "128 of 1,797 samples" in report["verdict"]["change"]


def test_the_same_images_have_one_name_whatever_is_done_to_them(tmp_path: Path) -> None:
    config = sorted_digits(tmp_path, ptq__max_eval_batches=2)
    one = runs.score(config)["evaluation"]
    assert runs.score(replace(config, seed=3))["evaluation"]["sample"] == one["sample"]
    other = replace(config, ptq=replace(config.ptq, max_eval_batches=3))
    assert runs.score(other)["evaluation"]["sample"] != one["sample"]
    digits = configuration.with_values(configuration.RunConfig(), {"ptq.methods": [], "ptq.max_eval_batches": 1})
    darker = replace(digits, data=replace(digits.data, mean=(0.1,)))
    names = {runs.score(each)["evaluation"]["sample"] for each in (digits, darker)}
    assert len(names) == 1
