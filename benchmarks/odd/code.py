"""Code that writes in place, counts, hooks, computes its weights, or draws numbers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from odd import network


@network((3, 10, 10), kind="img")
class InPlace(nn.Module):
    """Operations in place."""

    def __init__(self):
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        y = self.c(x)
        y.relu_().mul_(2)
        z = self.d(y)
        z += y
        z[:, :2].sub_(1.0)
        z.clamp_(-3, 3)
        return z.div_(3)


@network((6, 8, 8), kind="img")
class Assigned(nn.Module):
    """Slices that are assigned (temporal shift)."""

    def __init__(self):
        super().__init__()
        self.c, self.o = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 2)

    def forward(self, x):
        y = self.c(x)
        out = torch.zeros_like(y)
        out[:, :2, :-1] = y[:, :2, 1:]
        out[:, 2:4, 1:] = y[:, 2:4, :-1]
        out[:, 4:] = y[:, 4:]
        return self.o(F.relu(out).mean((2, 3)))


@network((8,))
class Counting(nn.Module):
    """A buffer that forward counts up."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return self.b(F.relu(self.a(x)))


@network((8,))
class Averaging(nn.Module):
    """A buffer that forward averages into, in training."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        y = self.a(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return self.b(F.relu(y - self.mean))


@network((8,))
class Hooked(nn.Module):
    """Forward hooks that change and record outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.seen = nn.Linear(8, 8), nn.Linear(8, 3), []
        self.a.register_forward_hook(lambda module, args, out: out * 0.5)
        self.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)


@network((8,))
class Parametrized(nn.Module):
    """Parametrized weights: symmetric, orthogonal, weight norm, spectral norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        parametrize.register_parametrization(self.a, "weight", Symmetric())
        parametrizations.orthogonal(self.b)
        parametrizations.weight_norm(self.c)
        parametrizations.spectral_norm(self.d)

    def forward(self, x):
        for layer in (self.a, self.b, self.c, self.d):
            x = torch.tanh(layer(x))
        return x


@network((3, 10, 10), kind="img")
def lazy():
    """Lazy layers, run once."""
    net = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    net(torch.zeros(2, 3, 10, 10))
    return net


@network((3, 10, 10), kind="img")
def still_lazy():
    """Lazy layers, not run."""
    return nn.Sequential(nn.LazyConv2d(6, 3), nn.Flatten(), nn.LazyLinear(4))


@network((20,))
class Tied(nn.Module):
    """Autoencoder with tied weights."""

    def __init__(self):
        super().__init__()
        self.enc, self.bias = nn.Linear(20, 6), nn.Parameter(torch.zeros(20))

    def forward(self, x):
        return F.linear(torch.relu(self.enc(x)), self.enc.weight.t(), self.bias)


@network((4, 8, 8), (6,))
class Modulated(nn.Module):
    """Modulated convolution (StyleGAN): weights computed from an input."""

    def __init__(self):
        super().__init__()
        self.w, self.f = nn.Parameter(torch.randn(5, 4, 3, 3)), nn.Linear(6, 4)

    def forward(self, x, z):
        w = self.w[None] * self.f(z)[:, None, :, None, None]
        w = w * torch.rsqrt(w.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        n = x.shape[0]
        return F.conv2d(x.reshape(1, -1, 8, 8), w.reshape(-1, 4, 3, 3), padding=1, groups=n).view(n, 5, 8, 8)


@network((1, 10, 10), kind="img")
class PixelCnn(nn.Module):
    """Masked convolutions; weights standardized in forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 2, 3, padding=1)
        mask = torch.ones(5, 5)
        mask[2, 2:] = 0
        mask[3:] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.a.weight * self.mask, self.a.bias, padding=2))
        w = self.b.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.b.bias, padding=1)


@network((12,))
class Vae(nn.Module):
    """Variational autoencoder that samples in training."""

    def __init__(self):
        super().__init__()
        self.e, self.m, self.s, self.d = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(3, 12)

    def forward(self, x):
        h = torch.tanh(self.e(x))
        mean, log_var = self.m(h), self.s(h)
        z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean) if self.training else mean
        return {"recon": torch.sigmoid(self.d(z)), "kl": -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum(1)}


@network((12,))
class Sampling(nn.Module):
    """Noise in eval mode."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(12, 4)

    def forward(self, x):
        return self.a(x + 0.1 * torch.randn_like(x))
