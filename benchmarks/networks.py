"""Small networks of four kinds for CIFAR-10, and their training: what the default methods are confirmed on.

    python benchmarks/networks.py --data-path DIR --output DIR [--names separable residual …] [--epochs 40]
        [--device cuda]

DIR holds cifar10.npz. Writes NAME.safetensors and prints the accuracy on the test images. As networks of a run:
`--model benchmarks/networks.py:separable --weights OUTPUT/separable.safetensors`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def normed(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout))


def active(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    return nn.Sequential(*normed(cin, cout, kernel, stride, groups), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*active(cin, cout, 3, stride), *normed(cout, cout))
        self.shortcut = nn.Identity() if cin == cout and stride == 1 else normed(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) -> (N, cout, H / stride, W / stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


class Branches(nn.Module):
    """Four branches of different kernels, concatenated."""

    def __init__(self, cin: int, width: int) -> None:
        super().__init__()
        self.one = active(cin, width, 1)
        self.three = nn.Sequential(active(cin, width, 1), active(width, width))
        self.five = nn.Sequential(active(cin, width // 2, 1), active(width // 2, width), active(width, width))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), active(cin, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) -> (N, 4 * width, H, W)."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


class Squeezed(nn.Module):
    """An inverted residual with ReLU6, whose channels are weighed by squeeze and excitation."""

    def __init__(self, cin: int, cout: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        mid = cin * expansion
        self.expand = nn.Sequential(*normed(cin, mid, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(*normed(mid, mid, 3, stride, mid), nn.ReLU6())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(mid, mid // 8, 1), nn.ReLU())
        self.excite = nn.Sequential(nn.Conv2d(mid // 8, mid, 1), nn.Hardsigmoid())
        self.project = normed(mid, cout, 1)
        self.adds = cin == cout and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) -> (N, cout, H / stride, W / stride)."""
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.excite(self.squeeze(y)))
        return x + y if self.adds else y


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


def separable() -> nn.Module:
    """Depthwise-separable convolutions, as in MobileNetV1."""
    layers, width = [active(3, 32)], 32
    for cout, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (256, 1)):
        layers += [active(width, width, 3, stride, width), active(width, cout, 1)]
        width = cout
    return nn.Sequential(*layers, *_head(width))


def residual() -> nn.Module:
    """Residual blocks, wider and shorter than ResNet-20."""
    layers, width = [active(3, 24)], 24
    for cout, stride in ((24, 1), (48, 2), (48, 1), (96, 2), (96, 1)):
        layers.append(Residual(width, cout, stride))
        width = cout
    return nn.Sequential(*layers, *_head(width))


def concat() -> nn.Module:
    """Branches that are concatenated, as in Inception."""
    return nn.Sequential(
        active(3, 32),
        Branches(32, 16),
        nn.MaxPool2d(2),
        Branches(64, 32),
        nn.MaxPool2d(2),
        Branches(128, 48),
        *_head(192),
    )


def squeezed() -> nn.Module:
    """Inverted residuals with squeeze and excitation, as in MobileNetV3 and EfficientNet."""
    layers, width = [active(3, 24)], 24
    for cout, stride in ((24, 1), (40, 2), (40, 1), (64, 2), (64, 1)):
        layers.append(Squeezed(width, cout, stride))
        width = cout
    return nn.Sequential(*layers, active(width, 192, 1), *_head(192))


NETWORKS = {f.__name__: f for f in (separable, residual, concat, squeezed)}


def varied(pixels: Tensor) -> Tensor:
    """(N, 3, 32, 32), each moved by up to four pixels and flipped half of the time."""
    n = len(pixels)
    corner = torch.randint(9, (n, 2), device=pixels.device)
    along = torch.arange(32, device=pixels.device)
    rows, columns = corner[:, :1] + along, corner[:, 1:] + along
    columns = torch.where(torch.rand(n, 1, device=pixels.device) < 0.5, columns, columns.flip(1))
    padded = F.pad(pixels, (4,) * 4).permute(0, 2, 3, 1)
    first = torch.arange(n, device=pixels.device)[:, None, None]
    return padded[first, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch_size: int = 256) -> nn.Module:
    """Trains on normalized images with SGD and a learning rate that rises and falls once."""
    steps = len(images) // batch_size
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=epochs * steps)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), device=images.device)[: steps * batch_size].split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(varied(images[batch])), labels[batch], label_smoothing=0.05).backward()
            optimizer.step()
            scheduler.step()
    return network.eval()


def read(path: Path, device: torch.device) -> list[Tensor]:
    """Training images and labels, test images and labels; images normalized."""
    with np.load(path / "cifar10.npz") as archive:
        arrays = [torch.from_numpy(archive[name]).to(device) for name in ("train_x", "train_y", "test_x", "test_y")]
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return [(a.permute(0, 3, 1, 2).float() / 255 - mean) / std if a.ndim == 4 else a.long() for a in arrays]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--names", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    from safetensors.torch import save_file

    images, labels, test_images, test_labels = read(options.data_path, torch.device(options.device))
    for name in options.names:
        torch.manual_seed(0)
        network = train(NETWORKS[name]().to(options.device), images, labels, options.epochs)
        with torch.no_grad():
            hits = torch.cat([network(x).argmax(1) for x in test_images.split(500)]) == test_labels
        state = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
        save_file(state, options.output / f"{name}.safetensors")
        size = sum(p.numel() for p in network.parameters())
        print(f"{name}: {size:,} parameters, {100 * hits.float().mean():.2f} % of {len(hits):,}", flush=True)


if __name__ == "__main__":
    main()
