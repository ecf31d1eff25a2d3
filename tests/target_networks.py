"""Small untrained networks that hold what runtimes round, move, pad and fuse in ways of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Everything(nn.Module):
    """Every kind of operation that rounds: layers, a sum, averages, a product, and a Concat of two scales."""

    shape = (3, 14, 14)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise, self.pool, self.last = nn.Conv2d(8, 8, 1, groups=8), nn.AvgPool2d(2), nn.Linear(8, 10)
        nn.init.uniform_(self.second.weight, -1, 1)  # so that the Concat's scale is coarser than that of `first`

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.first(x))
        y = torch.relu(a + self.second(a))
        y = y * torch.sigmoid(self.depthwise(y))
        y = self.pool(torch.cat([y, a], 1)[:, 4:12])
        return self.last(y.mean((2, 3)))


class Pools(nn.Module):
    """Strides with padding, a padded maximum, grouped convolutions, ReLU6, a difference, and Flatten of maps."""

    shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool = nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.MaxPool2d(3, 2, 1)
        self.wide, self.grouped = nn.Conv2d(8, 16, 3, groups=8, padding=1), nn.Conv2d(16, 16, 3, groups=4, padding=1)
        self.last = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(F.relu6(self.first(x)))
        y = self.grouped(torch.tanh(self.wide(y)))
        return self.last((y - torch.relu(y)).flatten(1))


class Shuffle(nn.Module):
    """Channels split, joined and shuffled, a gate per channel, a mean over channels, padding and nearest resizing."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(9, 5, 1)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        u, v = torch.relu(self.first(x)).chunk(2, 1)
        y = torch.cat([self.branch(u), v], 1)
        n, c, h, w = y.shape
        y = y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        gate = torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3))))))
        y = F.pad(torch.cat([y * gate[:, :, None, None], y.mean(1, keepdim=True)], 1), (1, 0, 0, 1))
        return self.last(F.interpolate(y, scale_factor=2, mode="nearest"))


class Signal(nn.Module):
    """One dimension: strided and padded convolutions, a sum, a maximum, a mean."""

    shape = (3, 32)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1, stride=2), nn.Conv1d(8, 8, 3, padding=1)
        self.pool, self.last = nn.MaxPool1d(2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(self.pool(y + self.second(y)).mean(2))


class Tokens(nn.Module):
    """Patches behind a token that is repeated for every sample, and positions: constants in a Concat and a sum."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.last = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        return self.last(torch.cat([self.token.expand(len(x), -1, -1), y], 1) + self.positions)


class Sums(nn.Module):
    """Layers, a depthwise and a transposed one among them, a sum of two scales, a maximum, a mean, a linear layer."""

    shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up, self.pool, self.last = nn.ConvTranspose2d(6, 6, 3, 2), nn.MaxPool2d(2), nn.Linear(6, 5)
        nn.init.uniform_(self.depthwise.weight, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(self.pool(self.up(torch.relu(y + self.depthwise(y)))).mean((2, 3)))


class Maps(nn.Module):
    """Strided, padded and depthwise convolutions, a sum, means over 2^n values, a narrow kernel, Flatten of maps."""

    shape = (3, 9, 9)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.mean, self.second, self.last = nn.AvgPool2d(2), nn.Conv2d(6, 4, (1, 2), bias=False), nn.Linear(4 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        y = self.mean(torch.relu(y + self.depthwise(y)))
        return self.last(self.second(y).flatten(1))


NETWORKS = {cls.__name__: cls for cls in (Everything, Pools, Shuffle, Signal)}
