"""Small networks of four kinds with data that need no download: keywords, a visual wake-up, an autoencoder, a detector.

    pow2quant ptq --model benchmarks/kinds.py:keywords --data benchmarks/kinds.py:keywords_data

A factory trains its network in some seconds, always the same way on one kind of processor. Data functions return
(training, test).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

FRAMES, BANDS, WORDS = 24, 16, 10
"""Of a spectrogram; words that are told apart."""

SIDE, GRID = 24, 3
"""Of a canvas, in pixels; cells along a side, each with a digit or none."""

Pair = tuple[TensorDataset, TensorDataset]


def normed(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU())


def separable(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
    """A depthwise convolution and a pointwise one."""
    return nn.Sequential(normed(cin, cin, 3, stride, cin), normed(cin, cout, 1))


# Keyword spotting: log-spectrograms of made-up words


def keywords_data() -> Pair:
    """A word is two tones that glide; speakers differ in pitch, tempo, loudness and when they begin; noise is added."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    count = 3000
    labels = torch.randint(WORDS, (count,), generator=generator)
    ends = 2 + 12 * torch.rand(WORDS, 2, 2, generator=torch.Generator().manual_seed(1))  # word, tone, first and last
    start, length = 6 * drawn(count, 1), 12 + 5 * drawn(count, 1)
    share = (torch.arange(FRAMES) - start) / length
    heard = ((share >= 0) & (share <= 1)).float()
    bands, energy = torch.arange(BANDS).float(), 0.05 + 1.2 * drawn(count, FRAMES, BANDS)
    for tone in range(2):
        first, last = (ends[labels, tone, i][:, None] + 2 * drawn(count, 1) - 1 for i in range(2))
        pitch = first + (last - first) * share.clamp(0, 1)
        near = torch.exp(-((bands - pitch[:, :, None]) ** 2))
        energy = energy + heard[:, :, None] * near * (0.5 + drawn(count, 1, 1))
    return parted(energy.log()[:, None], labels)


@cache
def keywords() -> nn.Module:
    """Depthwise-separable convolutions over a spectrogram, as DS-CNN."""
    blocks = [normed(1, 24, 3, 2), separable(24, 32), separable(32, 32), separable(32, 48, 2)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, WORDS))
    return trained(model, keywords_data()[0], F.cross_entropy)


# Visual wake-up: is there a digit, or only something like it?


def wake_data() -> Pair:
    """Every other canvas has a digit; all have patches of the same strokes in disorder."""
    digits, _ = digit_images()
    generator = torch.Generator().manual_seed(2)
    count = len(digits)
    canvases = 0.7 * torch.rand(count, 1, SIDE, SIDE, generator=generator)
    labels = torch.arange(count) % 2
    for i in range(count):
        broken = digits[(i * 7 + 1) % count].flatten()[torch.randperm(64, generator=generator)].view(8, 8)
        for patch in (broken, *([digits[i]] if labels[i] else [])):
            row, column = torch.randint(0, SIDE - 7, (2,), generator=generator).tolist()
            place = canvases[i, 0, row : row + 8, column : column + 8]
            place.copy_(torch.maximum(place, patch))
    return parted(canvases, labels)


class Inverted(nn.Module):
    """MobileNetV2's block: expanded, depthwise, projected, with a sum where shapes allow it."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        mid = 3 * cin
        self.wide = nn.Sequential(nn.Conv2d(cin, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU6())
        deep = nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False)
        self.deep = nn.Sequential(deep, nn.BatchNorm2d(mid), nn.ReLU6())
        self.narrow = nn.Sequential(nn.Conv2d(mid, cout, 1, bias=False), nn.BatchNorm2d(cout))
        self.adds = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) -> (N, cout, H / stride, W / stride)."""
        y = self.narrow(self.deep(self.wide(x)))
        return x + y if self.adds else y


@cache
def wake() -> nn.Module:
    """Inverted residuals with ReLU6."""
    blocks = [normed(1, 12, 3, 2), Inverted(12, 16, 1), Inverted(16, 16, 1), Inverted(16, 24, 2), Inverted(24, 24, 1)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2))
    return trained(model, wake_data()[0], F.cross_entropy)


# Autoencoder: digits through eight numbers


def autoencoder_data() -> Pair:
    """Digits, (64,), which are their own targets."""
    flat = digit_images()[0].flatten(1)
    return parted(flat, flat)


@cache
def autoencoder() -> nn.Module:
    """Linear layers with batch norm, narrow in the middle, as in the detection of anomalies."""
    widths, layers = [64, 64, 32, 8, 32, 64], []
    for cin, cout in pairwise(widths):
        layers += [nn.Linear(cin, cout), nn.BatchNorm1d(cout), nn.ReLU()]
    return trained(nn.Sequential(*layers, nn.Linear(64, 64)), autoencoder_data()[0], F.mse_loss)


def psnr(outputs: Tensor, targets: Tensor) -> float:
    """In dB; the peak is 1."""
    return float(-10 * F.mse_loss(outputs, targets).log10())


# A detector's head: in every cell whether a digit is there, where, and which


def detector_data() -> Pair:
    """Canvases of 3 x 3 cells; targets (4, 3, 3): presence, the centre's row and column in its cell, the class."""
    digits, classes = digit_images()
    generator = torch.Generator().manual_seed(3)
    count, cell = len(digits), SIDE // GRID
    canvases = 0.3 * torch.rand(count, 1, SIDE, SIDE, generator=generator)
    targets = torch.zeros(count, 4, GRID, GRID)
    for i in range(count):
        for j in range(3):
            row, column = torch.randint(0, SIDE - 7, (2,), generator=generator).tolist()
            y, x = (row + 4) // cell, (column + 4) // cell
            if targets[i, 0].sum() and bool(targets[i, 0, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].any()):
                continue  # no two digits overlap
            which = (i + j * 599) % count
            place = canvases[i, 0, row : row + 8, column : column + 8]
            place.copy_(torch.maximum(place, digits[which]))
            inside = (row + 4) / cell - y, (column + 4) / cell - x
            targets[i, :, y, x] = torch.tensor([1.0, *inside, float(classes[which])])
    return parted(canvases, targets)


def detection_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Presence of every cell, place and class where a digit is."""
    there = targets[:, 0] > 0
    presence = F.binary_cross_entropy_with_logits(outputs[:, 0], targets[:, 0])
    place = F.mse_loss(outputs[:, 1:3].movedim(1, -1)[there], targets[:, 1:3].movedim(1, -1)[there])
    return presence + 5 * place + F.cross_entropy(outputs[:, 3:].movedim(1, -1)[there], targets[:, 3][there].long())


def found(outputs: Tensor, targets: Tensor) -> float:
    """Per cent, F1 over all cells: a digit is found with its class, and its centre within one and a half pixels.

    Centres lie on whole pixels, as coarse outputs do: a limit of one would be a matter of how those are rounded.
    """
    there, said = targets[:, 0] > 0, outputs[:, 0] > 0
    near = (outputs[:, 1:3] - targets[:, 1:3]).abs().amax(1) * (SIDE // GRID) <= 1.5
    right = there & said & near & (outputs[:, 3:].argmax(1) == targets[:, 3])
    return 200 * float(right.sum()) / float(there.sum() + said.sum())


@cache
def detector() -> nn.Module:
    """A backbone and a head of convolutions, as YOLO's."""
    backbone = [normed(1, 16), normed(16, 32, 3, 2), normed(32, 32), normed(32, 48, 3, 2), normed(48, 64, 3, 2)]
    model = nn.Sequential(*backbone, normed(64, 64), nn.Conv2d(64, 13, 1))
    return trained(model, detector_data()[0], detection_loss)


def digit_images() -> tuple[Tensor, Tensor]:
    """(N, 8, 8) from 0 to 1, in an order without rule, and classes."""
    pixels, classes = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(4))
    return pixels.view(-1, 8, 8).float()[order] / 16, classes[order]


def parted(inputs: Tensor, targets: Tensor) -> Pair:
    """Two thirds to train with, the rest to test with."""
    first = 2 * len(inputs) // 3
    return TensorDataset(inputs[:first], targets[:first]), TensorDataset(inputs[first:], targets[first:])


def trained(
    model: nn.Module, data: TensorDataset, loss: Callable[[Tensor, Tensor], Tensor], epochs: int = 12
) -> nn.Module:
    """Behind some seconds of Adam; initial weights and order are always the same."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        inputs, targets = data.tensors
        steps = -(-len(inputs) // 64) * epochs
        optimizer = torch.optim.Adam(model.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
        model.train()
        for _ in range(epochs):
            for chosen in torch.randperm(len(inputs)).split(64):
                optimizer.zero_grad()
                loss(model(inputs[chosen]), targets[chosen]).backward()
                optimizer.step()
                scheduler.step()
    return model.eval()


if __name__ == "__main__":
    for name, metric in {
        "keywords": lambda y, t: 100 * float((y.argmax(1) == t).float().mean()),
        "wake": lambda y, t: 100 * float((y.argmax(1) == t).float().mean()),
        "autoencoder": psnr,
        "detector": found,
    }.items():
        inputs, targets = globals()[f"{name}_data"]()[1].tensors
        network = globals()[name]()
        with torch.no_grad():
            size = sum(p.numel() for p in network.parameters())
            print(f"{name}: {size:,} parameters, {metric(network(inputs), targets):.2f} of {len(inputs):,}", flush=True)
