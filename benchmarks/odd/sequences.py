"""Networks on sequences, sets, tokens and several inputs."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn

from odd import conv, network


@network((1, 64))
class WaveNet(nn.Module):
    """WaveNet: dilated causal convolutions, gates, skips."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(1, 8, 1)
        self.gates = nn.ModuleList([nn.Conv1d(8, 16, 2, dilation=2**i) for i in range(4)])
        self.skips = nn.ModuleList([nn.Conv1d(8, 6, 1) for _ in range(4)])
        self.last = nn.Conv1d(6, 4, 1)

    def forward(self, x):
        x, total = self.first(x), 0
        for gate, skip in zip(self.gates, self.skips, strict=True):
            a, b = gate(F.pad(x, (gate.dilation[0], 0))).chunk(2, 1)
            z = torch.tanh(a) * torch.sigmoid(b)
            total = total + skip(z)
            x = x + z
        return self.last(F.relu(total))


@network((10, 4))
class Packed(nn.Module):
    """LSTM on packed sequences."""

    def __init__(self):
        super().__init__()
        self.lstm, self.o = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        lengths = torch.full((x.shape[0],), 10)
        y, _ = self.lstm(rnn.pack_padded_sequence(x, lengths, batch_first=True))
        y, _ = rnn.pad_packed_sequence(y, batch_first=True)
        return self.o(y[:, -1])


@network((6, 4))
class CellLoop(nn.Module):
    """Encoder and decoder of recurrent cells."""

    def __init__(self):
        super().__init__()
        self.enc, self.dec, self.o = nn.GRUCell(4, 6), nn.LSTMCell(2, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = x.new_zeros(x.size(0), 6)
        for t in range(x.size(1)):
            h = self.enc(x[:, t], h)
        c, y, out = torch.zeros_like(h), x[:, -1, :2], []
        for _ in range(3):
            h, c = self.dec(y, (h, c))
            y = self.o(h)
            out.append(y)
        return torch.stack(out, dim=1)


@network((4, 30))
class Separable1d(nn.Module):
    """Depthwise separable 1-D with strides and dilation."""

    def __init__(self):
        super().__init__()
        self.d, self.p = nn.Conv1d(4, 8, 5, 2, 4, 2, groups=4), nn.Conv1d(8, 6, 1)
        self.t = nn.ConvTranspose1d(6, 4, 4, 2, 1, groups=2)

    def forward(self, x):
        return self.t(F.leaky_relu(self.p(F.relu6(self.d(x))), 0.1))


@network((16, 4))
class Ssm(nn.Module):
    """A linear recurrence with gates (state space), by a loop."""

    def __init__(self):
        super().__init__()
        self.i, self.d, self.o = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.a = nn.Parameter(torch.rand(6))

    def forward(self, x):
        u, d = self.i(x), F.softplus(self.d(x))
        h, out = torch.zeros(x.shape[0], 6), []
        for t in range(x.shape[1]):
            h = torch.exp(-d[:, t] * self.a.exp()) * h + d[:, t] * u[:, t]
            out.append(h)
        return self.o(torch.stack(out, 1) * F.silu(u)).mean(1)


@network((12,), kind="tok")
class TextCnn(nn.Module):
    """Text CNN on tokens."""

    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(100, 8, padding_idx=0)
        self.c = nn.ModuleList([nn.Conv1d(8, 4, k) for k in (2, 3, 4)])
        self.o = nn.Linear(12, 2)

    def forward(self, x):
        x = self.e(x).permute(0, 2, 1)
        y = torch.cat([F.max_pool1d(F.relu(c(x)), c(x).shape[-1]).squeeze(2) for c in self.c], 1)
        return self.o(F.dropout(y, 0.5, self.training))


@network((10,), kind="tok")
class OneHot(nn.Module):
    """One-hot of tokens."""

    def __init__(self):
        super().__init__()
        self.o = nn.Linear(100, 3)

    def forward(self, x):
        return self.o(F.one_hot(x, 100).float().mean(1))


@network((4,), kind="tok")
class Dlrm(nn.Module):
    """Recommender: embeddings and their products."""

    def __init__(self):
        super().__init__()
        self.e = nn.ModuleList([nn.Embedding(100, 6) for _ in range(4)])
        self.o = nn.Linear(6, 1)
        i, j = torch.tril_indices(4, 4, -1)
        self.register_buffer("i", i), self.register_buffer("j", j)

    def forward(self, x):
        v = torch.stack([e(x[:, k]) for k, e in enumerate(self.e)], 1)
        z = torch.bmm(v, v.transpose(1, 2))
        return torch.sigmoid(self.o(z[:, self.i, self.j]))


@network((3, 40))
class PointNet(nn.Module):
    """PointNet with an input transform."""

    def __init__(self):
        super().__init__()
        self.t, self.tl = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 9)
        self.f, self.o = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU()), nn.Linear(16, 5)

    def forward(self, x):
        t = self.tl(torch.max(self.t(x), 2, keepdim=True)[0].view(-1, 8))
        t = t.view(-1, 3, 3) + torch.eye(3).repeat(x.size(0), 1, 1)
        x = torch.bmm(x.transpose(2, 1), t).transpose(2, 1)
        return F.log_softmax(self.o(self.f(x).amax(-1)), dim=1)


@network((3, 12, 12), (3, 12, 12), kind="img")
class Siamese(nn.Module):
    """Siamese network, absolute difference."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 8, s=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 8))
        self.head = nn.Linear(8, 1)

    def forward(self, a, b):
        return torch.sigmoid(self.head(torch.abs(self.body(a) - self.body(b)))).squeeze(-1)


@network((3, 12, 12), (3, 12, 12), (3, 12, 12), kind="img")
class Triplet(nn.Module):
    """Triplet of embeddings, cosine similarity."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 8, s=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))

    def forward(self, a, p, n):
        a, p, n = (F.normalize(self.body(x)) for x in (a, p, n))
        return F.cosine_similarity(a, p), (a * n).sum(1)


@network((8,))
class Prototypes(nn.Module):
    """Distances to prototypes by cdist; learned temperature."""

    def __init__(self):
        super().__init__()
        self.a, self.p, self.t = nn.Linear(8, 6), nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return (-torch.cdist(self.a(x), self.p) * self.t.exp()).softmax(-1)


@network((5, 8), (6, 8))
class Chamfer(nn.Module):
    """Distances between two sets by cdist."""

    def forward(self, a, b):
        d = torch.cdist(a, b)
        return d.min(1)[0].mean(1) + torch.min(d, 2)[0].mean(1)


@network((4, 8, 8), (6,))
class Film(nn.Module):
    """Conditioned norms: FiLM and AdaIN."""

    def __init__(self):
        super().__init__()
        self.c, self.f, self.i = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(6, 8), nn.InstanceNorm2d(4)

    def forward(self, x, z):
        g, b = self.f(z).view(-1, 2, 4, 1, 1).unbind(1)
        return F.relu((1 + g) * self.i(self.c(x)) + b)


@network((4, 8, 8), (1,))
class Diffusion(nn.Module):
    """Diffusion block with a time embedding."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.t = (
            nn.Conv2d(4, 8, 3, padding=1),
            nn.Conv2d(8, 4, 3, padding=1),
            nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)),
        )
        self.n = nn.GroupNorm(2, 8)

    def forward(self, x, t):
        f = torch.exp(torch.arange(4) * -(math.log(1e4) / 3))
        e = t * f[None]
        e = self.t(torch.cat((e.sin(), e.cos()), -1))
        return x + self.b(F.silu(self.n(self.a(x) + e[..., None, None])))
