"""Networks whose code holds a batch size are opened: exact on any batch, and what each sample gives on its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pow2quant
from pow2quant.errors import ModelError
from pow2quant.frontends.batches import regrown
from pow2quant.frontends.fixed import in_parts
from pow2quant.frontends.prepare import fixed_batch, prepare


class Fixed(nn.Module):
    """Takes `size` images, (size, 3, 6, 6); for one image, a learned token stands before what it computes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(64, 5)
        self.token = nn.Parameter(torch.randn(1, 1, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.conv(x)).view(self.size, -1)
        scores = self.head(features)
        tokens = scores.reshape(self.size, 1, 5)
        first = self.token.expand(self.size, -1, -1) if self.size == 1 else tokens * 2
        return torch.cat([first, tokens], 1).view(self.size, 10), features


@pytest.mark.parametrize(("size", "example"), [(1, 1), (1, 5), (4, 4)])
def test_the_prepared_network_takes_any_batch(size: int, example: int) -> None:
    torch.manual_seed(0)
    model = Fixed(size).eval()
    network = prepare(model, torch.rand(example, 3, 6, 6))
    assert fixed_batch(network) == size
    x = torch.rand(6, 3, 6, 6)
    for got, wanted in zip(network(x), in_parts(model, x, size), strict=True):
        assert len(got) == 6
        torch.testing.assert_close(got, wanted)


def test_a_run_says_so_and_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)

    class Scores(Fixed):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

    result = pow2quant.quantize(Scores(1), (torch.rand(20, 3, 6, 6), torch.randint(0, 10, (20,))), methods="none")
    assert "takes batches of 1 only" in "".join(capsys.readouterr())
    assert "verdict: 0 of 200" in str(result)
    assert "proved" in str(result)


def test_a_network_that_loses_its_samples_is_refused() -> None:
    class Lost(Fixed):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(self.conv(x).flatten())

    with pytest.raises(ModelError, match=r"fails on inputs of shape \(2, 3, 6, 6\)"):
        prepare(Lost(1).eval(), torch.rand(1, 3, 6, 6))


def test_a_network_of_any_batch_has_none_fixed() -> None:
    assert fixed_batch(prepare(nn.Conv2d(3, 4, 3), torch.rand(1, 3, 6, 6))) is None


def test_the_dimension_that_grows_is_behind_as_many_values() -> None:
    assert regrown((1, 4, 6), (4, 1, 6), (3, 4, 6)) == [12, 1, 6]
    assert regrown((2, 6), (2, 2, 3), (8, 6)) == [8, 2, 3]
    with pytest.raises(ValueError, match="mixes the batch"):
        regrown((2, 3, 4), (6, 4), (2, 5, 4))
