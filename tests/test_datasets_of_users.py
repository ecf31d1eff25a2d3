"""Data sets that a user's function gives."""

from __future__ import annotations

import pytest
import torch

from pow2quant import datasets
from pow2quant.config import DataConfig
from tests.reading import all_of, complaint

USER = """
import torch
from torch.utils.data import Dataset, Subset, TensorDataset
from pow2quant.datasets import Data

X, Y = torch.arange(24.0).reshape(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])

def pair():
    return TensorDataset(X, Y), TensorDataset(X[:4], Y[:4])

def few(): return TensorDataset(X[:2], Y[:2]), TensorDataset(X, Y)

def triple(config):
    return Subset(TensorDataset(X, Y), [0, 1]), TensorDataset(X + config.batch_size, Y), TensorDataset(X[:4], Y[:4])

def data(*, unused=None):
    batches = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    return Data(batches, batches, batches[:1], 3, ("a", "b", "c"), (1, 2, 2))

class Items(Dataset):
    def __init__(self, items, classes=None):
        self.items = items
        if classes: self.classes = classes
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

def both(*items, classes=("a", "b")):
    return Items(items, classes), Items(items, classes)

def nan(): return both((X[0], 0), (X[0] / 0, 1))
def label(): return both((X[0], 0), (X[1], 2))
def raw(): return both((X[0].byte(), 0))
def pictures(): return both(("a picture", 0))
def failing(): return both((X[0], 0), None)
def empty(): return Items([], ["a"]), Items([], ["a"])
def endless(): return iter([]), iter([])
def text(): return "data/"
def once(): return Data(iter([]), iter([]), iter([]), 3, ("a", "b", "c"), (1, 2, 2))
def none(): return Data([], [], [], 3, ("a", "b", "c"), (1, 2, 2))
def broken(): return 1 / 0
"""


@pytest.fixture
def user(tmp_path):
    (tmp_path / "data.py").write_text(USER)
    return tmp_path / "data.py"


def test_a_function_in_a_file(user):
    x, y = torch.arange(24.0).reshape(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    pair = datasets.load(DataConfig(f"{user}:pair", batch_size=4))
    assert (pair.num_classes, pair.class_names, pair.input_shape) == (3, ("0", "1", "2"), (1, 2, 2))
    assert torch.equal(all_of(pair.test)[0], x[:4])
    assert torch.equal(all_of(pair.calibration)[0].sort(0).values, x)
    assert datasets.load(DataConfig(f"{user}:few")).num_classes == 3, "the last class is in the test set alone"
    triple = datasets.load(DataConfig(f"{user}:triple", batch_size=4))
    assert all_of(triple.calibration)[1].sort().values.tolist() == [0, 1]
    assert all_of(triple.train)[0].min() >= 4
    finished = datasets.load(DataConfig(f"{user}:data"))
    assert (len(finished.train), len(finished.test), finished.class_names) == (2, 1, ("a", "b", "c"))
    for _ in range(2):
        assert torch.equal(all_of(finished.calibration)[1], y)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("nan", "data.py:nan: calibration, batch 0: holds NaN or infinity"),
        ("label", "label 2 is no class; legal: 0 to 1"),
        ("raw", "calibration, batch 0: expected float32, got torch.uint8; scale it as in training"),
        ("pictures", "calibration, batch 0: holds a str where the network takes a tensor (images: add ToTensor)"),
        ("failing", "data.py:failing: calibration: TypeError: "),
        ("empty", "the calibration set is empty"),
        ("endless", "data.py:endless: calibration is empty"),
        ("text", "calibration: is a str; expected a DataLoader or another iterable of batches, a Dataset, arrays"),
        ("once", "calibration can be iterated once only; expected a DataLoader or a list of batches"),
        ("none", "data.py:none: calibration is empty"),
        ("broken", "ZeroDivisionError: division by zero"),
        ("missing", "has no 'missing'; it has pair, few, triple, data, Items"),
    ],
)
def test_a_function_that_returns_something_else_is_named(function, expected, user):
    assert expected in complaint(DataConfig(f"{user}:{function}"))
