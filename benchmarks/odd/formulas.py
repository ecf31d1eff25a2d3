"""Functions and products that are rare."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from odd import network


@network((3, 8, 8), kind="img")
class Fourier(nn.Module):
    """Fourier convolution, complex."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.rand(3, 8, 5, 2))

    def forward(self, x):
        y = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.w)
        return torch.fft.irfft2(y, s=(8, 8), norm="ortho")


@network((3,))
class Nerf(nn.Module):
    """Positional encoding of coordinates."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(27, 16), nn.Linear(16 + 3, 4)

    def forward(self, x):
        e = [x] + [f(2.0**i * math.pi * x) for i in range(4) for f in (torch.sin, torch.cos)]
        y = self.b(torch.cat([F.relu(self.a(torch.cat(e, -1))), x], -1))
        return torch.sigmoid(y[..., :3]), F.softplus(y[..., 3:] - 1)


@network((3, 12, 12), kind="img")
class BilinearPool(nn.Module):
    """Bilinear pooling, signed root, norm; NetVLAD."""

    def __init__(self):
        super().__init__()
        self.c, self.k, self.centres = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Parameter(torch.rand(4, 6))

    def forward(self, x):
        x = F.relu(self.c(x)).flatten(2)
        g = torch.bmm(x, x.transpose(1, 2)) / x.shape[2]
        g = F.normalize(torch.sign(g) * torch.sqrt(torch.abs(g) + 1e-5), dim=-1)
        a = F.softmax(self.k(x[..., None]).squeeze(-1), 1)
        v = torch.bmm(a, x.transpose(1, 2)) - a.sum(-1, keepdim=True) * self.centres
        return torch.cat((g.flatten(1), F.normalize(F.normalize(v, p=2, dim=2).flatten(1), dim=1)), 1)


@network((10,))
class Functions(nn.Module):
    """Snake, maxout, highway, radial basis."""

    def __init__(self):
        super().__init__()
        self.a, self.m, self.h, self.t = nn.Linear(10, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)
        self.alpha, self.c = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.linspace(-2, 2, 5))

    def forward(self, x):
        x = self.a(x)
        x = x + torch.sin(self.alpha * x).pow(2) / self.alpha
        x = self.m(x).view(-1, 8, 3).max(-1)[0]
        t = torch.sigmoid(self.t(x))
        x = F.relu(self.h(x)) * t + x * (1 - t)
        return torch.exp(-((x.unsqueeze(-1) - self.c) ** 2) * 2).flatten(1)


@network((6,))
class Gated(nn.Module):
    """Mixture of experts, all weighted; conditions on values."""

    def __init__(self):
        super().__init__()
        self.g, self.e = nn.Linear(6, 3), nn.ModuleList([nn.Linear(6, 4) for _ in range(3)])

    def forward(self, x):
        w = F.softmax(self.g(x), dim=-1)
        y = sum(w[:, i : i + 1] * F.relu(e(x)) for i, e in enumerate(self.e))
        return torch.where(y > 0.1, y, torch.zeros_like(y)) * (y.abs().mean(1, keepdim=True) < 1.0)


@network((6,))
class TopExperts(nn.Module):
    """Mixture of experts, the best alone."""

    def __init__(self):
        super().__init__()
        self.g, self.e = nn.Linear(6, 3), nn.ModuleList([nn.Linear(6, 4) for _ in range(3)])

    def forward(self, x):
        w, i = self.g(x).topk(1)
        y = torch.stack([e(x) for e in self.e], 1)
        return y.gather(1, i.unsqueeze(-1).expand(-1, -1, 4)).squeeze(1) * w.sigmoid()


@network((3, 12, 12), kind="img")
class Stn(nn.Module):
    """Spatial transformer."""

    def __init__(self):
        super().__init__()
        self.l, self.c = nn.Linear(3 * 144, 6), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        grid = F.affine_grid(self.l(x.flatten(1)).view(-1, 2, 3), x.size(), align_corners=False)
        return self.c(F.grid_sample(x, grid, align_corners=False))


@network((8, 10, 10), kind="img")
class Capsules(nn.Module):
    """Capsules: squash, routing by agreement."""

    def __init__(self):
        super().__init__()
        self.c, self.w = nn.Conv2d(8, 8, 5, 3), nn.Parameter(torch.randn(1, 8, 3, 4, 4) * 0.3)

    @staticmethod
    def squash(x):
        s = (x**2).sum(-1, keepdim=True)
        return s / (1 + s) * x / torch.sqrt(s + 1e-8)

    def forward(self, x):
        u = self.squash(self.c(x).flatten(1).view(-1, 8, 4))
        u = (self.w @ u[:, :, None, :, None]).squeeze(-1)
        b = torch.zeros(x.shape[0], 8, 3, 1)
        for _ in range(2):
            v = self.squash((torch.softmax(b, 2) * u).sum(1, keepdim=True))
            b = b + (u * v).sum(-1, keepdim=True)
        return v.squeeze(1).norm(dim=-1)


@network((3, 12, 12), kind="img")
class Involution(nn.Module):
    """Involution: kernels from the input, by unfold."""

    def __init__(self):
        super().__init__()
        self.r, self.s = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 9, 1)

    def forward(self, x):
        n, c, h, w = x.shape
        k = self.s(F.relu(self.r(x))).view(n, 1, 9, h, w)
        u = F.unfold(x, 3, padding=1).view(n, c, 9, h, w)
        return (k * u).sum(2)
