"""Networks that write into their tensors: every reader gets what it would get in PyTorch, or an error says why not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.prepare import prepare
from tests.preparing import same


def overwriting(x: Tensor, conv: nn.Module, how: str) -> Tensor:
    """Reads a tensor again after something has written into it."""
    y = conv(x)
    if how == "relu_":
        y.relu_()
    elif how == "F.relu_":
        F.relu_(y)
    elif how == "inplace":
        F.relu(y, inplace=True)
    elif how == "clamp_":
        y.clamp_(0, 1)
    elif how == "iadd":
        z = y
        z += 1
    elif how == "F.elu":
        F.elu(y, 1.0, True)
    elif how == "mul_":
        y.mul_(x)
    return conv(F.relu6(y)) + y


@pytest.mark.parametrize("how", ["relu_", "F.relu_", "inplace", "clamp_", "iadd", "F.elu", "mul_"])
def test_who_reads_an_overwritten_tensor_reads_the_result(how: str) -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return overwriting(x, self.conv, how)

    model, x = Overwriting().eval(), torch.randn(2, 3, 6, 6)
    same(prepare(model, x), model, x)


def test_an_inplace_module_overwrites_too() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.conv(self.relu(y)) + y

    model, x = PreActivation().eval(), torch.randn(2, 3, 6, 6)
    same(prepare(model, x), model, x)


class Wrapped(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "function", [lambda x: torch.div(x, x + 3, rounding_mode="trunc"), lambda x: torch.fft.fft(x).real]
)
def test_nothing_is_silently_another_network(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"test_overwriting\.py"):
        prepare(Wrapped(function), torch.randn(1, 3, 4, 4))


def written_later(x: Tensor) -> Tensor:
    """A view of what is overwritten is read afterwards."""
    y = x.tanh()
    part = y[:, :2]
    y.mul_(2)
    return torch.cat([part, y], 1)


def slice_written(x: Tensor) -> Tensor:
    """A slice is overwritten, and the whole is read."""
    y = x.tanh()
    y[:, :2] = y[:, 2:4] + 1
    return y * 2


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.add(x, x.tanh(), alpha=2),
        lambda x: x.sub(x.tanh(), alpha=2),
        lambda x: F.softmax(x),
        lambda x: 3 - x,
        lambda x: -x / 4,
        lambda x: torch.addcmul(x, x.tanh(), x.sigmoid(), value=0.5),
        lambda x: torch.stack([x, x.tanh()], 1).flatten(1, 2),
        lambda x: sum(part.relu() for part in x.unbind(1)),
        lambda x: torch.cat(list(x.split([1, 3, 2], dim=1))[::-1], 1),
        lambda x: x.view(int(x.shape[0]), -1)[:, 3:-2:2],
        lambda x: F.scaled_dot_product_attention(x, x.tanh(), x, scale=0.3),
        lambda x: x @ torch.ones(4, 5) + 1,
        lambda x: x if x.shape[1] == 6 else -x,
        lambda x: x * torch.arange(4).type_as(x) + torch.ones(1, 6, 1, 1).expand_as(x),
        written_later,
        slice_written,
    ],
)
def test_ways_of_writing(function: Callable[[Tensor], Tensor]) -> None:
    model, x = Wrapped(lambda x: function(x.relu())).eval(), torch.randn(3, 6, 4, 4)
    same(prepare(model, x), model, x)
