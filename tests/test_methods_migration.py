"""Migration: the equation by hand, between which modules, the same bits in float, and what it is good for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pow2quant import QuantPlan, prepare, simulate
from pow2quant.config import parameters
from pow2quant.errors import ConfigError, DataError
from pow2quant.methods.migration import MOST, Migrate, factors, groups


def encoder(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first).eval()


class Windows(nn.Module):
    """(N, 5, 8) -> (N, 2, 2, 4): padded, turned and cut between norm and linear layer, as in a Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(nn.functional.pad(self.norm(x), (0, 0, 0, 1)), 1, 1)
        return self.linear(x.view(-1, 2, 3, 8)[:, :, 1:])


class Uneven(nn.Module):
    """A norm, some of whose channels are a hundred times as large, with two linear layers behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 8), nn.Linear(32, 8, bias=False)
        with torch.no_grad():
            self.norm.weight[::8] *= 100
            self.a.weight[:, ::8] /= 100
            self.b.weight[:, ::8] /= 100

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.a(x).relu() + self.b(x)


def test_the_factors_by_hand() -> None:
    """Of sqrt(16 / 1), sqrt(1 / 1) and sqrt(1 / 16), the middle one is taken out; channels of zeros stay."""
    s = factors(torch.tensor([16.0, 1, 1, 0, 1]), torch.tensor([1.0, 1, 16, 1, 0]), 0.5)
    assert s.tolist() == [4, 1, 0.25, 1, 1]
    assert factors(torch.tensor([4.0, 1, 1]), torch.tensor([1.0, 8, 8]), 1.0).tolist() == [4, 1, 1]
    assert factors(torch.tensor([1e30, 1, 1e-30]), torch.ones(3), 1.0).log2().tolist() == [MOST, 0, -MOST]
    assert factors(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("model", "shape", "found"),
    [
        (Windows(), (2, 5, 8), 1),
        (encoder(norm_first=True), (2, 5, 16), 2),
        (encoder(norm_first=False), (2, 5, 16), 0),
    ],
    ids=["windows", "norm first", "norm last"],
)
def test_the_float_network_computes_the_same_bits(model: nn.Module, shape: tuple[int, ...], found: int) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    x = torch.randn(shape)
    network = prepare(model.eval(), x)
    norms = groups(network)
    before = network(x)
    weights = [network.get_parameter(f"{norm.target}.weight").clone() for norm, _ in norms]
    assert len(norms) == found
    assert torch.equal(Migrate().rewrite(network, [x])(x), before)
    after = [network.get_parameter(f"{norm.target}.weight") for norm, _ in norms]
    assert not any(torch.equal(a, b) for a, b in zip(after, weights, strict=True))


def test_what_is_shared_stays() -> None:
    tied = Uneven()
    tied.b.weight = tied.a.weight
    assert not groups(prepare(tied, torch.randn(2, 32)))
    norm = nn.LayerNorm(32)
    twice = nn.Sequential(norm, nn.Linear(32, 32), norm, nn.Linear(32, 4))
    assert not groups(prepare(twice, torch.randn(2, 32)))


@torch.no_grad()
def test_channels_that_differ_lose_less() -> None:
    torch.manual_seed(0)
    batches, model = [torch.randn(256, 32) for _ in range(2)], Uneven().eval()
    expected, errors = model(batches[1]), []
    for migrate in (False, True):
        network = prepare(model, batches[0])
        if migrate:
            Migrate().rewrite(network, batches[:1])
        sim = simulate(network, batches[0], QuantPlan.default(8, 8))
        sim.calibrate(batches[:1])
        errors.append(float((sim.model(batches[1]) - expected).square().mean()))
    assert errors[1] < errors[0] / 4


def test_mistakes_are_said() -> None:
    with pytest.raises(ConfigError, match=r"strength.*a number from 0 to 1"):
        parameters(Migrate, {"strength": 2}, "migrate")
    with pytest.raises(DataError, match="the calibration data are empty"):
        Migrate().rewrite(prepare(Uneven(), torch.randn(2, 32)), [])
