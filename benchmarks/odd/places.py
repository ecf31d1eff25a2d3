"""Places and positions that are computed: of tokens, of the largest scores, of what is sampled."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from odd import network


@network((8,), kind="tok")
class Positions(nn.Module):
    """Positions counted over what is no padding (RoBERTa)."""

    def __init__(self):
        super().__init__()
        self.word, self.place = nn.Embedding(100, 8, padding_idx=1), nn.Embedding(12, 8, padding_idx=1)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        mask = x.ne(1).int()
        places = (torch.cumsum(mask, dim=1).type_as(mask) * mask).long() + 1
        return self.out(self.norm(self.word(x) + self.place(places))[:, 0])


@network((6,), kind="tok")
class Offsets(nn.Module):
    """Factorization machine: one table, an offset for each field."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offsets", torch.arange(6) * 100)
        self.table, self.bias = nn.Embedding(600, 4), nn.Embedding(600, 1)

    def forward(self, x):
        x = x + self.offsets.unsqueeze(0)
        e = self.table(x)
        pairs = 0.5 * torch.sum(torch.sum(e, dim=1) ** 2 - torch.sum(e**2, dim=1), dim=1, keepdim=True)
        return torch.sigmoid((torch.sum(self.bias(x), dim=1) + pairs).squeeze(1))


@network((3, 32, 32), kind="img")
class CenterNet(nn.Module):
    """Peaks of a heat map, decoded: pool, topk, gather."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.heat, self.size = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x, k=5):
        y = self.body(x)
        heat = self.heat(y).sigmoid_()
        heat = heat * (F.max_pool2d(heat, 3, stride=1, padding=1) == heat).float()
        n, _, h, w = heat.shape
        score, at = torch.topk(heat.view(n, -1), k)
        at = at % (h * w)
        rows, columns = (at // w).float(), (at % w).float()
        size = self.size(y).flatten(2).transpose(1, 2).gather(1, at.unsqueeze(2).expand(n, k, 2))
        return torch.cat([torch.stack((columns, rows), 2) - size / 2, score.unsqueeze(2)], 2)


@network((3, 16, 16), kind="img")
class Codebook(nn.Module):
    """VQ-VAE: the nearest code, by scatter."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 4, 2, 1))
        self.decode = nn.Sequential(nn.ConvTranspose2d(4, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1))
        self.codes = nn.Embedding(16, 4)

    def forward(self, x):
        z = self.encode(x).permute(0, 2, 3, 1).contiguous()
        flat, codes = z.view(-1, 4), self.codes.weight
        distance = (flat**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * flat @ codes.t()
        nearest = torch.argmin(distance, dim=1).unsqueeze(1)
        chosen = torch.zeros(nearest.shape[0], 16).scatter_(1, nearest, 1)
        return self.decode((chosen @ codes).view(z.shape).permute(0, 3, 1, 2))


@network((6, 8))
class TopTwo(nn.Module):
    """Mixture of experts, the two best, weights scattered."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(4)])

    def forward(self, x):
        scores = self.gate(x)
        best, at = torch.topk(scores, 2, dim=-1)
        weights = torch.zeros_like(scores).scatter_(-1, at, F.softmax(best, dim=-1))
        return torch.einsum("bted,bte->btd", torch.stack([e(x) for e in self.experts], 2), weights)


@network((3, 16, 16), kind="img")
class Warp(nn.Module):
    """An image warped by a computed flow."""

    def __init__(self):
        super().__init__()
        self.flow, self.out = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        _, _, h, w = x.shape
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        at = torch.stack((columns, rows), 2).float() + self.flow(x).permute(0, 2, 3, 1)
        grid = 2 * at / torch.tensor([w - 1.0, h - 1.0]) - 1
        return self.out(F.grid_sample(x, grid, align_corners=True))
