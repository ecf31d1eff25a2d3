"""Attention in the forms that people write."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from odd import network


@network((20, 16))
class Conformer(nn.Module):
    """Conformer block: half steps, gated depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.ff = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.SiLU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.norm, self.att = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True, dropout=0.1)
        self.p1, self.dw = nn.Conv1d(16, 32, 1), nn.Conv1d(16, 16, 7, padding=3, groups=16)
        self.bn, self.p2, self.out = nn.BatchNorm1d(16), nn.Conv1d(16, 16, 1), nn.LayerNorm(16)

    def forward(self, x):
        x = x + 0.5 * self.ff(x)
        y = self.norm(x)
        x = x + self.att(y, y, y)[0]
        y = F.glu(self.p1(x.transpose(1, 2)), dim=1)
        x = x + self.p2(F.silu(self.bn(self.dw(y)))).transpose(1, 2)
        return self.out(x + 0.5 * self.ff(x))


@network((10, 16))
class Rotary(nn.Module):
    """Rotary embeddings, causal attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        angle = torch.outer(torch.arange(10.0), 100.0 ** -(torch.arange(0, 8, 2) / 8)).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def turn(self, x):
        a, b = x[..., :4], x[..., 4:]
        return x * self.cos + torch.cat((-b, a), -1) * self.sin

    def forward(self, x):
        q, k, v = (t.view(x.shape[0], 10, 2, 8).transpose(1, 2) for t in self.qkv(x).split(16, -1))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


@network((10, 16))
class RotaryComplex(nn.Module):
    """Rotary embeddings by complex numbers."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 16)
        self.turn = torch.polar(torch.ones(10, 8), torch.outer(torch.arange(10.0), torch.rand(8)))

    def forward(self, x):
        q = torch.view_as_complex(self.q(x).reshape(x.shape[0], 10, 8, 2))
        return torch.view_as_real(q * self.turn).flatten(2)


@network((9, 8))
class Perceiver(nn.Module):
    """Latents that attend to the input."""

    def __init__(self):
        super().__init__()
        self.latent, self.q, self.kv, self.o = (
            nn.Parameter(torch.randn(4, 8)),
            nn.Linear(8, 8),
            nn.Linear(8, 16),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        q = self.q(self.latent).expand(x.size(0), -1, -1)
        k, v = self.kv(x).chunk(2, -1)
        y = torch.softmax(torch.einsum("nld,ntd->nlt", q, k) / 8**0.5, -1)
        return self.o(torch.einsum("nlt,ntd->nld", y, v).mean(1))


@network((6, 10))
class Mixer(nn.Module):
    """MLP-Mixer with spatial gating."""

    def __init__(self):
        super().__init__()
        self.n, self.t, self.u, self.v, self.s = (
            nn.LayerNorm(10),
            nn.Conv1d(6, 6, 1),
            nn.Linear(10, 20),
            nn.Linear(10, 10),
            nn.Linear(6, 6),
        )

    def forward(self, x):
        x = x + self.t(self.n(x))
        u, v = self.u(F.gelu(x)).chunk(2, dim=-1)
        return x + self.v(u * (self.s(F.layer_norm(v, (10,)).transpose(-1, -2)).transpose(-1, -2) + 1))


@network((3, 24, 24), kind="img")
class Vit(nn.Module):
    """ViT with interpolated position embeddings and a class token."""

    def __init__(self):
        super().__init__()
        self.p, self.cls, self.pos = (
            nn.Conv2d(3, 8, 4, 4),
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(1, 17, 8)),
        )
        self.e, self.h = (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu"),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.p(x)
        n, d, h, w = x.shape
        grid = self.pos[:, 1:].reshape(1, 4, 4, d).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(n, -1, -1), x.flatten(2).transpose(1, 2)), 1) + torch.cat(
            (self.pos[:, :1], grid), 1
        )
        return self.h(self.e(x)[:, 0])


@network((10,), kind="tok")
class Padded(nn.Module):
    """Attention that leaves padding tokens out."""

    def __init__(self):
        super().__init__()
        self.e, self.l, self.o = (
            nn.Embedding(100, 8),
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        return self.o(self.l(self.e(x), src_key_padding_mask=x == 0).mean(1))


@network((6, 8), (5, 8))
class Decoder(nn.Module):
    """Transformer with encoder, decoder and causal mask."""

    def __init__(self):
        super().__init__()
        self.t = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        self.register_buffer("m", nn.Transformer.generate_square_subsequent_mask(5))

    def forward(self, a, b):
        return self.t(a, b, tgt_mask=self.m, tgt_is_causal=True)


@network((8, 8, 8))
class SwinWindows(nn.Module):
    """Shifted windows by roll, relative bias, mask."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias = nn.Linear(8, 24), nn.Parameter(torch.randn(7 * 7, 2))
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        self.register_buffer(
            "index", ((at[:, :, None] - at[:, None]) + 3)[0] * 7 + ((at[:, :, None] - at[:, None]) + 3)[1]
        )

    def forward(self, x):
        n, h, w, c = x.shape
        x = torch.roll(x, (-2, -2), (1, 2))
        x = x.view(n, 2, 4, 2, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(x).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        a = (q * 4**-0.5) @ k.transpose(-2, -1) + self.bias[self.index.view(-1)].view(16, 16, 2).permute(2, 0, 1)[None]
        x = (a.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c)
        x = x.view(n, 2, 2, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return torch.roll(x, (2, 2), (1, 2))


@network((6, 8, 8), kind="img")
class LinearAttention(nn.Module):
    """Linear attention with elu + 1, and efficient channel attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.e = nn.Conv2d(6, 18, 1, bias=False), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).chunk(3, dim=1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bdn,ben->bde", k, v)
        z = 1 / (torch.einsum("bdn,bd->bn", q, k.sum(-1)) + 1e-6)
        y = torch.einsum("bde,bdn,bn->ben", kv, q, z).reshape(x.shape)
        s = self.e(y.mean((2, 3), keepdim=True).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return y * s.sigmoid().expand_as(y)


@network((8, 16))
class FNet(nn.Module):
    """FNet: the real part of a Fourier transform."""

    def __init__(self):
        super().__init__()
        self.n, self.o = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.o(self.n(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real).mean(1))


@network((7, 5))
class Graph(nn.Module):
    """Graph convolution, constant adjacency; graph attention."""

    def __init__(self):
        super().__init__()
        self.w, self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 1), nn.Linear(6, 1)
        adjacency = ((torch.rand(7, 7) > 0.6) | torch.eye(7).bool()).float()
        self.register_buffer("adj", adjacency / adjacency.sum(1, keepdim=True))

    def forward(self, x):
        h = self.w(torch.matmul(self.adj, x))
        e = F.leaky_relu(self.a(h) + self.b(h).transpose(1, 2), 0.2)
        e = e.masked_fill(self.adj == 0, -9e15)
        return F.elu(torch.softmax(e, -1) @ h)
