"""Further small networks, by which no method and no rule of `auto` was chosen; the data need no download.

    pow2quant ptq --model benchmarks/unseen.py:residual --data benchmarks/unseen.py:images_data

A residual network, squeeze-excite with hard swish, a convolution over time, a perceptron for a table, attention over
patches. Factories and data functions are as in `kinds.py`.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parent))
from kinds import Pair, digit_images, normed, parted, trained

SIZE, STEPS, FAULTS = 16, 64, 6
"""Of an image, in pixels; of a series; machines' faults that are told apart."""


def images_data() -> Pair:
    """Digits of 16 x 16 pixels in noise; contrast and brightness differ."""
    pixels, classes = digit_images()
    generator = torch.Generator().manual_seed(5)
    contrast, brightness = (torch.rand(len(pixels), 1, 1, 1, generator=generator) for _ in range(2))
    noise = 0.15 * torch.randn(len(pixels), 1, SIZE, SIZE, generator=generator)
    large = F.interpolate(pixels[:, None], size=(SIZE, SIZE), mode="bilinear")
    return parted(large * (0.3 + 0.9 * contrast) + 0.3 * brightness + noise, classes)


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        last = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.layers = nn.Sequential(normed(cin, cout, 3, stride), last, nn.BatchNorm2d(cout))
        self.short = normed(cin, cout, 1, stride)[:2] if cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) -> (N, cout, H / stride, W / stride)."""
        return F.relu(self.layers(x) + self.short(x))


@cache
def residual() -> nn.Module:
    """Three residual blocks."""
    blocks = [normed(1, 12), Residual(12, 12), Residual(12, 24, 2), Residual(24, 24)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    return trained(model, images_data()[0], F.cross_entropy)


class Squeezed(nn.Module):
    """MobileNetV3's block: expanded, depthwise, each channel times a gate of its own, projected."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        mid = 3 * cin
        wide, deep = nn.Conv2d(cin, mid, 1, bias=False), nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False)
        layers = [wide, nn.BatchNorm2d(mid), nn.Hardswish(), deep, nn.BatchNorm2d(mid), nn.Hardswish()]
        self.layers = nn.Sequential(*layers)
        squeeze, excite = nn.Conv2d(mid, mid // 4, 1), nn.Conv2d(mid // 4, mid, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.ReLU(), excite, nn.Hardsigmoid())
        self.narrow = nn.Sequential(nn.Conv2d(mid, cout, 1, bias=False), nn.BatchNorm2d(cout))
        self.adds = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) -> (N, cout, H / stride, W / stride)."""
        y = self.layers(x)
        y = self.narrow(y * self.gate(y))
        return x + y if self.adds else y


@cache
def squeezed() -> nn.Module:
    """Three blocks with squeeze-excite and hard swish."""
    stem = nn.Sequential(nn.Conv2d(1, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.Hardswish())
    blocks = [stem, Squeezed(12, 12), Squeezed(12, 20, 2), Squeezed(20, 20)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10))
    return trained(model, images_data()[0], F.cross_entropy)


def series_data() -> Pair:
    """Two sensors on a machine: a fault sets the pitch of a hum and the distance of knocks; loudness differs much."""
    generator = torch.Generator().manual_seed(6)
    count = 2400
    labels = torch.randint(FAULTS, (count,), generator=generator)
    drawn, time = torch.rand(count, 6, 1, generator=generator).unbind(1), torch.arange(STEPS)
    hum = (0.5 + 2 * drawn[0]) * torch.sin(
        6.283 * ((0.04 + 0.03 * labels[:, None] + 0.03 * drawn[1]) * time + drawn[2])
    )
    beat = torch.sin(6.283 * (time / (5 + labels[:, None] + drawn[3]) + drawn[4]))
    knocks = (1 + 3 * drawn[5]) * (beat > 0.95)
    sensors = torch.stack([hum + knocks, 0.5 * hum.roll(3, 1) + 0.2 * knocks], 1)
    return parted(sensors + 0.6 * torch.randn(count, 2, STEPS, generator=generator), labels)


class Dilated(nn.Module):
    """A convolution over time, added to what it reads."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.layers = nn.Sequential(conv, nn.BatchNorm1d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, T), also the result."""
        y: Tensor = x + self.layers(x)
        return y


@cache
def series() -> nn.Module:
    """Dilated convolutions over time."""
    stem = [nn.Conv1d(2, 20, 5, 2, 2, bias=False), nn.BatchNorm1d(20), nn.ReLU()]
    blocks = [*stem, Dilated(20, 1), Dilated(20, 2), Dilated(20, 4)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(20, FAULTS))
    return trained(model, series_data()[0], F.cross_entropy)


def table_data() -> Pair:
    """Two smooth functions of twelve numbers, a third of which have long tails."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2400, 12, generator=generator)
    x[:, 8:] = x[:, 8:].exp()
    first = 10 * torch.sin(x[:, 0] * x[:, 1]) + 5 * x[:, 2] ** 2 + 3 * x[:, 3] + x[:, 8]
    second = x[:, 9] - 2 * x[:, 10].log() * x[:, 4] + x[:, 5].abs()
    y = torch.stack([first, second], 1)
    return parted(x, (y - y.mean(0)) / y.std(0))


@cache
def table() -> nn.Module:
    """A perceptron with ReLU and tanh, for two numbers."""
    layers = [nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 32), nn.Tanh()]
    return trained(nn.Sequential(*layers, nn.Linear(32, 2)), table_data()[0], F.mse_loss, 20)


class Attends(nn.Module):
    """One block of a vision transformer, over 16 patches."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(16 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 16, 16) -> (N, 10)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        x = x + self.mlp(self.norms[1](x))
        y: Tensor = self.head(self.norms[2](x).flatten(1))
        return y


@cache
def attention() -> nn.Module:
    """A vision transformer of one block."""
    return trained(Attends(), images_data()[0], F.cross_entropy)


if __name__ == "__main__":
    for name, data in {
        "residual": images_data,
        "squeezed": images_data,
        "series": series_data,
        "table": table_data,
        "attention": images_data,
    }.items():
        inputs, targets = data()[1].tensors
        with torch.no_grad():
            outputs = globals()[name]()(inputs)
        judged = (outputs.argmax(1) == targets).float() if targets.ndim == 1 else (outputs - targets).square()
        print(f"{name}: {float(judged.mean()):.4f} of {len(inputs):,}", flush=True)
