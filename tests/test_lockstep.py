"""The comparison of a prepared network with what was captured: what both compute alike runs once, the rest is found."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx, nn

from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.aten import ROWS
from pow2quant.frontends.builder import Builder
from pow2quant.frontends.checks import Once
from pow2quant.frontends.prepare import prepare

x = torch.arange(6.0).reshape(2, 3)


def wrong_function(builder: Builder, node: fx.Node, _: SimpleNamespace) -> fx.Node:
    return builder.call(node, nn.LeakyReLU(), builder.operand(node, node.args[0]))


def wrong_weight(builder: Builder, node: fx.Node, _: SimpleNamespace) -> fx.Node:
    layer = nn.Linear(3, 3)
    layer.load_state_dict({key: 1.01 * value for key, value in builder.model.get_submodule("0").state_dict().items()})
    return builder.call(node, layer, builder.operand(node, node.args[0]))


@pytest.mark.parametrize(("operation", "row"), [("relu", wrong_function), ("linear", wrong_weight)])
def test_a_row_that_writes_something_else_is_found(monkeypatch, operation, row) -> None:
    monkeypatch.setitem(ROWS, operation, row)
    with pytest.raises(UnsupportedModelError, match=f"{operation} is not prepared as it is written"):
        prepare(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), x)


def test_what_is_called_twice_on_the_same_tensors_runs_once() -> None:
    with torch.no_grad(), Once():
        assert torch.exp(x) is torch.exp(x)
        assert torch.cat([x, x[:1]]) is torch.cat([x, x[:1]])
        assert torch.exp(x[0]) is torch.exp(x[0])


@pytest.mark.parametrize(
    "other",
    [
        lambda: torch.exp(x + 0),
        lambda: torch.exp(x[:1]),
        lambda: torch.exp(x.T),
        lambda: torch.log(x),
        lambda: torch.exp(x.double()),
    ],
)
def test_anything_else_is_computed(other) -> None:
    with torch.no_grad(), Once():
        torch.exp(x)
        found = other()
    with torch.no_grad():
        assert torch.equal(found, other())


def test_what_was_written_into_is_read_anew() -> None:
    y = x.clone()
    with torch.no_grad(), Once():
        before = torch.exp(y)
        y.add_(1)
        after: Tensor = torch.exp(y)
    assert not torch.equal(before, after)
    assert torch.equal(after, torch.exp(y))
