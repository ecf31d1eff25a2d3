"""Find a digit on a canvas, where and which: a second task, on real images that need no download.

scikit-learn's digits are placed on larger, noisy canvases; one network names the digit and gives its centre.

    python find_digits.py
    pow2quant ptq --model find_digits.py:network --data find_digits.py:data --metric find_digits.py:found
"""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pow2quant

SIDE, TRAINED, NEAR = 20, 1400, 1.5
"""Of a canvas, in pixels; digits that are trained on; a centre is found when it is so many pixels away at most."""


class Finder(nn.Module):
    """Canvases (N, 1, 20, 20) -> logits of the digits (N, 10), and the centre as row and column in pixels (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(1, 16), nn.MaxPool2d(2), block(16, 32), block(32, 32))
        self.which = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        self.where = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 25, 2))

    def forward(self, canvas: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(canvas)
        return self.which(features), self.where(features)


def block(entering: int, leaving: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(entering, leaving, 3, padding=1), nn.BatchNorm2d(leaving), nn.ReLU())


@cache
def data() -> tuple[TensorDataset, TensorDataset]:
    """(training, test): canvas, digit, centre."""
    images, digits = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(0)
    canvases = 0.2 * torch.rand(len(images), SIDE, SIDE, generator=generator)
    corners = torch.randint(0, SIDE - 7, (len(images), 2), generator=generator)
    for canvas, image, (row, column) in zip(canvases, images.view(-1, 8, 8), corners.tolist(), strict=True):
        canvas[row : row + 8, column : column + 8] += image.float() / 16
    columns = canvases[:, None], digits.long(), corners + 3.5
    return TensorDataset(*(c[:TRAINED] for c in columns)), TensorDataset(*(c[TRAINED:] for c in columns))


def loss(results: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """Of which and of where, in pixels."""
    return nn.functional.cross_entropy(results[0], targets[0]) + 0.1 * nn.functional.mse_loss(results[1], targets[1])


def found(results: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> float:
    """Per cent of the canvases whose digit is named and whose centre is near."""
    named = results[0].argmax(1) == targets[0]
    near = (results[1] - targets[1]).norm(dim=1) <= NEAR
    return 100 * float((named & near).double().mean())


def network() -> nn.Module:
    """Trained here, in some seconds."""
    torch.manual_seed(0)
    model = Finder()
    canvases, digits, centres = data()[0].tensors
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 10 * 22)
    for _ in range(10):
        for chosen in torch.randperm(TRAINED).split(64):
            optimizer.zero_grad()
            loss(model(canvases[chosen]), (digits[chosen], centres[chosen])).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


if __name__ == "__main__":
    result = pow2quant.quantize(network(), data(), metric=found, output="runs/find_digits", overwrite=True)
    print(result)
