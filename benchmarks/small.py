"""Networks for digits that are small enough for hls4ml's C simulation, which takes minutes to compile.

python benchmarks/targets.py --title "perceptron, digits" --network benchmarks/small.py:perceptron --targets hls4ml
"""

from __future__ import annotations

import torch
from torch import nn

from pow2quant.config import DataConfig
from pow2quant.datasets.digits import digits


def perceptron() -> nn.Module:
    """Three linear layers."""
    torch.manual_seed(0)
    return trained(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))
    )


def strided() -> nn.Module:
    """Two convolutions with strides, the second depthwise separable, and a mean over the maps."""
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU()]
    second = [nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU(), nn.Conv2d(8, 24, 1), nn.ReLU()]
    return trained(nn.Sequential(*first, *second, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 10)))


def trained(model: nn.Module) -> nn.Module:
    """Behind some seconds on the digits."""
    images, labels = (
        torch.stack([torch.as_tensor(each) for each in column]) for column in zip(*digits(DataConfig())[0], strict=True)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.eval()
