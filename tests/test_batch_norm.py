"""Batch norm in the preparation: folded into the layer in front, or a layer of its own."""

import pytest
import torch
from torch import Tensor, nn

from pow2quant.backends.fold import fold_batch_norm
from pow2quant.errors import WeightsError
from pow2quant.frontends import modules as m
from pow2quant.frontends.prepare import prepare
from tests.preparing import same


def randomized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, m.BATCH_NORMS):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.3, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1, 2)
                nn.init.uniform_(module.bias, -1, 1)
    return model.eval()


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)], (3, 8, 8)),
        ([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)], (3, 8, 8)),
        ([nn.ConvTranspose2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)], (3, 5, 5)),
        ([nn.Conv1d(3, 8, 3, groups=1), nn.BatchNorm1d(8)], (3, 9)),
        ([nn.Linear(6, 4), nn.BatchNorm1d(4)], (6,)),
        ([nn.BatchNorm2d(3), nn.ReLU()], (3, 8, 8)),
        ([nn.ReLU(), nn.BatchNorm1d(7)], (7,)),
    ],
)
def test_batch_norm_is_folded_or_becomes_a_channel_wise_affine(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    model, x = randomized(nn.Sequential(*layers)), torch.randn(4, *shape)
    network = fold_batch_norm(prepare(model, x))
    same(network, model, x)
    assert not any(isinstance(module, m.BATCH_NORMS) for module in network.modules())


def test_batch_norm_behind_a_layer_with_other_readers_is_not_folded_into_it() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + self.bn(y)

    model, x = randomized(Fork()), torch.randn(2, 2, 4, 4)
    network = fold_batch_norm(prepare(model, x))
    same(network, model, x)
    assert isinstance(network.get_submodule("bn"), nn.Conv2d)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)], (4, 5, 5)),
        ([nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)], (4, 5, 5)),
        ([nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False)], (6,)),
    ],
)
def test_batch_norm_that_pytorch_itself_folds_wrongly(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    model, x = randomized(nn.Sequential(*layers)), torch.randn(4, *shape)
    same(fold_batch_norm(prepare(model, x)), model, x)


@pytest.mark.parametrize(("variance", "eps"), [(-1.0, 1e-5), (0.0, 0.0)])
@pytest.mark.parametrize("behind", [True, False], ids=["folded", "alone"])
def test_a_batch_norm_that_gives_nan_is_named(variance: float, eps: float, behind: bool) -> None:
    norm = nn.BatchNorm2d(3, eps=eps)
    assert norm.running_var is not None
    norm.running_var[1] = variance
    model = nn.Sequential(*([nn.Conv2d(3, 3, 1)] if behind else []), norm, nn.ReLU()).eval()
    with pytest.raises(WeightsError, match=rf"^{int(behind)}\.running_var: {variance:g} in channel 1 \(1 of 3"):
        fold_batch_norm(prepare(model, torch.rand(2, 3, 4, 4)))


def test_a_negative_variance_that_eps_outweighs_is_legal() -> None:
    norm = nn.BatchNorm2d(3)
    assert norm.running_var is not None
    norm.running_var[1] = -1e-6
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), norm).eval(), torch.rand(2, 3, 4, 4)
    same(fold_batch_norm(prepare(model, x)), model, x)
