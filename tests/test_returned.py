"""What the user's network returns, its quantized one returns: the structure, and each tensor as often."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import pow2quant
from pow2quant.frontends.prepare import prepare
from pow2quant.frontends.returned import returning
from tests.backends import BACKENDS

Pair = namedtuple("Pair", "scores features")


@dataclass
class Scores:
    scores: torch.Tensor
    loss: torch.Tensor | None = None


@dataclass(frozen=True)
class Whole:
    inner: Scores
    features: torch.Tensor


class Returns(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.form = form

    def forward(self, x):
        features = self.layers(x)
        return self.form(features.mean((2, 3)), features)


FORMS = {
    "dictionary": lambda a, b: {"features": b, "scores": a, "loss": None},
    "ordered": lambda a, b: OrderedDict(out=a, aux=b),
    "named": lambda a, b: Pair(a, b),
    "dataclass": lambda a, b: Scores(a),
    "dataclasses": lambda a, b: {"all": Whole(Scores(a, b), b)},
    "twice": lambda a, b: (a, b, a),
    "nested": lambda a, b: {"a": [a, {"b": b}], "c": (a,)},
    "list": lambda a, b: [b],
    "numbers": lambda a, b: (a, 3, "text"),
    "tensor": lambda a, b: a,
}
X = torch.rand(3, 3, 6, 6)


@pytest.mark.parametrize("form", FORMS)
def test_structure_and_values_are_the_users(form):
    model = Returns(FORMS[form]).eval()
    network = prepare(model, X)
    found, expected = returning(network)(X), model(X)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert a is b or a == b if not isinstance(b, torch.Tensor) else torch.allclose(a, b, atol=1e-6)
    assert isinstance(network(X), (tuple, torch.Tensor)), "the prepared network itself returns tensors only"


def test_it_is_the_same_network():
    network = prepare(Returns(FORMS["named"]), X)
    shared = returning(network)
    assert shared.layers is network.layers
    assert [*shared.state_dict()] == [*network.state_dict()]
    shared.train()
    assert network.layers.training


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_front_door_gives_it_back(backend):
    result = pow2quant.quantize(Returns(FORMS["dictionary"]), [X], backend=backend, progress=False)
    found = result.model(X)
    assert [*found] == ["features", "scores", "loss"]
    assert torch.equal(found["scores"], result.simulation.model(X)[1])


@pytest.mark.parametrize("names", [False, True])
def test_the_state_of_a_result_holds_its_encodings(names: bool) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> object:
            return {"logits": self.fc(x)} if names else self.fc(x)

    x = torch.randn(32, 6)
    narrow, wide = (pow2quant.quantize(Plain(), x, bits=bits, progress=False).model for bits in ("w4a8", "w8a8"))
    wide.load_state_dict(narrow.state_dict())
    found, expected = (model(x)["logits"] if names else model(x) for model in (wide, narrow))
    assert torch.equal(found, expected)
    assert len(narrow.state_dict()) > 2
