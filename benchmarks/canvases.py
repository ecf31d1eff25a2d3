"""A small U-Net that marks and names the digits on canvases: a segmentation network that needs no download.

python benchmarks/canvases.py WEIGHTS.safetensors    # trains it, in about a minute
pow2quant ptq --model benchmarks/canvases.py:network --weights WEIGHTS.safetensors --data benchmarks/canvases.py:data
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SIDE, TRAINED, EPOCHS = 24, 1400, 12
"""Of a canvas, in pixels; canvases that are trained on, and how often."""

CLASSES = 11
"""The background, and ten digits."""


def normed(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU())


class UNet(nn.Module):
    """Canvases (N, 1, 24, 24) -> logits of every pixel (N, 11, 24, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = normed(1, 12), normed(12, 24), normed(24, 48)
        self.down, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.fourth, self.fifth = normed(48 + 24, 24), normed(24 + 12, 16)
        self.last = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(self.down(a))
        c = self.up(self.third(self.down(b)))
        d = self.up(self.fourth(torch.cat([c, b], 1)))
        return self.last(self.fifth(torch.cat([d, a], 1)))


def data() -> tuple[TensorDataset, TensorDataset]:
    """(training, test): two digits on a noisy canvas each, and the class of every pixel."""
    images, digits = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    images = images.view(-1, 8, 8).float() / 16
    generator = torch.Generator().manual_seed(0)
    canvases = 0.2 * torch.rand(len(images), 1, SIDE, SIDE, generator=generator)
    masks = torch.zeros(len(images), SIDE, SIDE, dtype=torch.int64)
    corners = torch.randint(0, SIDE - 7, (2, len(images), 2), generator=generator)
    for i in range(len(images)):
        for j, corner in ((i, corners[0, i]), (i - 1, corners[1, i])):
            row, column = corner.tolist()
            place = (slice(row, row + 8), slice(column, column + 8))
            canvases[i, 0][place] = torch.maximum(canvases[i, 0][place], images[j])
            masks[i][place][images[j] > 0.25] = digits[j] + 1
    return TensorDataset(canvases[:TRAINED], masks[:TRAINED]), TensorDataset(canvases[TRAINED:], masks[TRAINED:])


def network() -> nn.Module:
    """Untrained."""
    return UNet()


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = network()
    canvases, masks = data()[0].tensors
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, EPOCHS * 44)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(TRAINED).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(canvases[chosen]), masks[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, metavar="WEIGHTS.safetensors")
    file = parser.parse_args().weights
    save_file(trained().state_dict(), file)
