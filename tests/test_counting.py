"""Integers that count (tokens, places) and what stands at places that are computed: 0 differing in onnxruntime."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pow2quant import prepare
from pow2quant.frontends import modules as m
from tests.prepared import outcome


class Of(nn.Module):
    """A function of tensors and a table of 60 rows."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.table = function, nn.Embedding(60, 4)

    def forward(self, *x):
        return self.function(*x, self.table)


def positions(x, table):
    """RoBERTa's: counted from 2 on, but for padding."""
    mask = x.ne(1).int()
    return table(torch.cumsum(mask, 1).type_as(mask) * mask + 1)


def keypoints(x, table):
    """CenterNet's: where the largest scores stand, and what another map says there."""
    score, place = x[:, 0].flatten(1).topk(3)
    other = x[:, 1:].flatten(2).transpose(1, 2).gather(1, place.unsqueeze(2).expand(-1, -1, 2))
    return torch.cat((other, (place % 4).float().unsqueeze(2), (place // 4).float().unsqueeze(2), score[..., None]), 2)


def experts(x, table):
    """The weights of the two best, in their places; the others are zero."""
    weight, place = x.mean(2).topk(2, -1)
    return torch.zeros(len(x), 3, 4).scatter_(-1, place, weight.softmax(-1)) * x.mean(2)


def codes(x, table):
    """The nearest row, as one-hot by `scatter_`."""
    place = x.flatten(2).argmin(2, keepdim=True)
    return torch.zeros(len(x), 3, 16).scatter_(2, place, 1) @ table.weight[:16]


TOKENS = {
    "an offset for each column": lambda x, table: table(x % 10 + torch.arange(6) * 10),
    "positions": positions,
    "buckets": lambda x, table: table((x - 25) // 7 + 30) + table(50 - x),
    "towards zero": lambda x, table: table(torch.div(x - 25, 7, rounding_mode="trunc") + 30),
    "of two": lambda x, table: table((x[:, 1:] + x[:, :-1] * 2) % 60),
}
MIXED = {
    "lengths": lambda x, n, table: x * (torch.arange(6) < n[:, :1]),
    "one-hot": lambda x, n, table: F.one_hot(n[:, 0], 9) * x[:, :1],
    "product": lambda x, n, table: x * n,
    "quotient": lambda x, n, table: x / (n + 1),
    "sums": lambda x, n, table: (x + n, n - x),
    "joined": lambda x, n, table: torch.cat([x, n], 1),
    "chosen": lambda x, n, table: torch.where(x > 0, n, x),
    "a wave": lambda x, n, table: torch.sin(n) + x,
    "clamped": lambda x, n, table: table(n.clamp(1, 5)).mean(2) * x,
}
TRUTHS = {
    "product": lambda x, kept, table: x * ~kept,
    "filled": lambda x, kept, table: x.masked_fill(kept, 0.5),
    "chosen": lambda x, kept, table: torch.where(kept, x, -x),
    "real": lambda x, kept, table: x + kept.float(),
    "repeated": lambda x, kept, table: x.masked_fill(torch.arange(6) > 3, 0.0) * kept[:, :1],
}
MAPS = {
    "keypoints": keypoints, "experts": experts, "codes": codes,
    "order": lambda x, table: (x.sort(2)[1].float() * x, x.argsort(1, descending=True).float() + x),
    "distance": lambda x, table: F.pairwise_distance(x, x.flip(1), keepdim=True),
    "computed grid": lambda x, table: F.grid_sample(x, torch.tanh(x[:, :2].permute(0, 2, 3, 1)), align_corners=True),
    "affine grid": lambda x, table: F.grid_sample(
        x, F.affine_grid(x[:, :2, 0, :3], [len(x), 3, 5, 6], align_corners=False), "bilinear", "border", False
    ),
}  # fmt: skip


def differing(function, batches, folder):
    """Elements that differ between the simulation and onnxruntime."""
    torch.manual_seed(0)
    found = outcome(prepare(Of(function).eval(), batches[0]), batches, folder)
    assert [found.get("integer engine", 0), found.get("generated C", 0)] == [0, 0]
    return [found["onnxruntime, no optimization"], found["onnxruntime, all optimizations"]]


@pytest.mark.parametrize("name", TOKENS)
def test_integers_are_computed_as_integers(name, tmp_path):
    batches = [(torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(i)),) for i in range(2)]
    assert differing(TOKENS[name], batches, tmp_path) == [0, 0]


def pairs(second):
    """Batches of reals and of something beside them."""
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return [(torch.randn(3, 6, generator=g), second(g)) for g in generators]


@pytest.mark.parametrize("name", MIXED)
def test_integers_beside_reals_become_reals(name, tmp_path):
    batches = pairs(lambda g: torch.randint(0, 8, (3, 6), generator=g))
    assert differing(MIXED[name], batches, tmp_path) == [0, 0]


@pytest.mark.parametrize("name", ["lengths", "one-hot"])
def test_one_channel_is_read_by_every_row_of_a_table_in_c(name, tmp_path):
    batches = pairs(lambda g: torch.randint(0, 8, (3, 6), generator=g))
    found = outcome(prepare(Of(MIXED[name]).eval(), batches[0]), batches, tmp_path)
    assert found["integer engine"] == found["generated C"] == 0


@pytest.mark.parametrize("name", TRUTHS)
def test_truth_values_are_inputs(name, tmp_path):
    batches = pairs(lambda g: torch.rand(3, 6, generator=g) > 0.5)
    assert differing(TRUTHS[name], batches, tmp_path) == [0, 0]


@pytest.mark.parametrize("name", MAPS)
def test_places_are_computed(name, tmp_path):
    batches = [(torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(i)),) for i in range(2)]
    assert differing(MAPS[name], batches, tmp_path) == [0, 0]


def test_of_equal_values_the_first_comes_first():
    x = torch.tensor([[1.0, 3, 3, 0, 3]])
    assert m.Places(3, 1)(x).tolist() == [[1, 2, 4]]
    assert m.Places(2, 1, largest=False)(x).tolist() == [[3, 0]]
