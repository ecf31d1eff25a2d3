"""Convolutional networks and their parts, on images."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from odd import conv, network


@network((3, 32, 32), kind="img")
class Yolo(nn.Module):
    """YOLO head, three scales, anchors decoded."""

    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleList([conv(3, 8, s=2), conv(8, 12, s=2), conv(12, 16, s=2)])
        self.heads = nn.ModuleList([nn.Conv2d(c, 3 * 7, 1) for c in (8, 12, 16)])
        self.register_buffer("anchors", torch.rand(3, 3, 2) * 20)

    def forward(self, x):
        found = []
        for i, (stage, head) in enumerate(zip(self.stem, self.heads, strict=True)):
            x = stage(x)
            y = head(x)
            n, _, h, w = y.shape
            y = y.view(n, 3, 7, h, w).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
            gy, gx = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            grid = torch.stack((gx, gy), 2).view(1, 1, h, w, 2).float()
            xy = (y[..., 0:2] * 2 - 0.5 + grid) * (32 / h)
            wh = (y[..., 2:4] * 2) ** 2 * self.anchors[i].view(1, 3, 1, 1, 2)
            found.append(torch.cat((xy, wh, y[..., 4:]), -1).view(n, -1, 7))
        return torch.cat(found, 1)


@network((3, 16, 16), kind="img")
class Dfl(nn.Module):
    """Distribution focal head of YOLOv8."""

    def __init__(self):
        super().__init__()
        self.body, self.box, self.cls = conv(3, 16, s=2), nn.Conv2d(16, 32, 1), nn.Conv2d(16, 5, 1)
        self.dfl = nn.Conv2d(8, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(8.0).view(1, 8, 1, 1)

    def forward(self, x):
        x = self.body(x)
        b, _, h, w = x.shape
        box = self.box(x).view(b, 4, 8, h * w).transpose(2, 1).softmax(1)
        box = self.dfl(box).view(b, 4, h * w)
        lt, rb = box.chunk(2, 1)
        return torch.cat(((rb - lt) / 2, rb + lt, self.cls(x).flatten(2).sigmoid()), 1)


@network((3, 35, 45), kind="img")
class OddUnet(nn.Module):
    """U-Net with odd sizes, padded to fit."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 12), conv(12, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.up2 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.d, self.e = conv(20, 8), nn.Conv2d(16, 2, 1)

    @staticmethod
    def fit(x, like):
        dy, dx = like.size()[2] - x.size()[2], like.size()[3] - x.size()[3]
        return F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])

    def forward(self, x):
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        d = self.d(torch.cat([self.fit(self.up(c), b), b], 1))
        return self.e(torch.cat([self.fit(self.up2(d), a), a], 1))


@network((3, 16, 16), kind="img")
class MbConv(nn.Module):
    """EfficientNet block with squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.expand, self.depth = conv(3, 12, 1), conv(12, 12, 5, 2, 12)
        self.reduce, self.grow = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.project = nn.Sequential(nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x):
        x = self.depth(self.expand(x))
        s = self.grow(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return self.project(torch.sigmoid(s) * x).mean([-2, -1])


@network((3, 16, 16), kind="img")
class ConvNext(nn.Module):
    """ConvNeXt blocks with layer scale."""

    def __init__(self):
        super().__init__()
        self.stem, self.dw, self.norm = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.LayerNorm(8)
        self.up, self.down, self.gamma = nn.Linear(8, 32), nn.Linear(32, 8), nn.Parameter(torch.full((8,), 0.3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        x = x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


@network((3, 12, 12), kind="img")
class Espcn(nn.Module):
    """Pixel unshuffle, residual, pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.slope = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 27, 3, padding=1), nn.PReLU(12)

    def forward(self, x):
        y = self.slope(self.a(F.pixel_unshuffle(x, 2)))
        return F.pixel_shuffle(self.b(y), 3).clamp(0, 1) + F.interpolate(x, scale_factor=1.5, mode="bicubic")


@network((3, 33, 21), kind="img")
class Fpn(nn.Module):
    """Feature pyramid, interpolated to another tensor's size."""

    def __init__(self):
        super().__init__()
        self.c = nn.ModuleList([conv(3, 6, s=2), conv(6, 8, s=2), conv(8, 10, s=2)])
        self.lateral = nn.ModuleDict({str(i): nn.Conv2d(c, 6, 1) for i, c in enumerate((6, 8, 10))})

    def forward(self, x):
        levels = []
        for stage in self.c:
            x = stage(x)
            levels.append(x)
        y, out = None, {}
        for i in reversed(range(3)):
            side = self.lateral[str(i)](levels[i])
            y = side if y is None else side + F.interpolate(y, size=side.shape[-2:], mode="nearest")
            out[f"p{i}"] = y
        return out


@network((3, 16, 16), kind="img")
class Cbam(nn.Module):
    """CBAM: attention by channel and by place."""

    def __init__(self):
        super().__init__()
        self.c, self.m, self.s = (
            conv(3, 8),
            nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8)),
            nn.Conv2d(2, 1, 7, padding=3),
        )

    def forward(self, x):
        x = self.c(x)
        n, c = x.shape[:2]
        a = self.m(F.avg_pool2d(x, x.shape[2:]).view(n, c)) + self.m(F.max_pool2d(x, x.shape[2:]).view(n, c))
        x = x * torch.sigmoid(a)[:, :, None, None]
        return x * torch.sigmoid(self.s(torch.cat((x.max(1, keepdim=True).values, x.mean(1, keepdim=True)), 1)))


@network((3, 16, 16), kind="img")
class Shuffle(nn.Module):
    """Channel shuffle and ghost features."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.g = conv(3, 8), conv(8, 8, g=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        x = self.b(x)
        return torch.cat([x, F.relu(self.g(x))], dim=1)[:, :12].mean((2, 3))


@network((3, 16, 16), kind="img")
class Blur(nn.Module):
    """Anti-aliased downsampling, reflected border."""

    def __init__(self):
        super().__init__()
        self.c = conv(3, 6)
        k = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("k", (k[:, None] * k / 16)[None, None].repeat(6, 1, 1, 1))

    def forward(self, x):
        x = self.c(x)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.k, stride=2, groups=x.shape[1])


@network((3, 12, 12), kind="img")
class Aux(nn.Module):
    """Inception branches, two outputs in training."""

    def __init__(self):
        super().__init__()
        self.b = nn.ModuleList(
            [
                nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(3, 4, 1)),
                conv(3, 4, 1),
                nn.Sequential(conv(3, 4, (1)), conv(4, 4, 5)),
            ]
        )
        self.o, self.aux = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        y = torch.cat([b(x) for b in self.b], 1)
        y = torch.flatten(F.adaptive_avg_pool2d(y, (1, 1)), 1)
        return (self.o(y), self.aux(y)) if self.training else self.o(y)


@network((2, 6, 8, 8))
class Depth3d(nn.Module):
    """Depthwise 3-D and factorized (2+1)-D."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(4, 4, (3, 1, 1), groups=4)
        self.n, self.o = nn.BatchNorm3d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.n(self.b(self.a(x))))
        return self.o(F.avg_pool3d(F.max_pool3d(x, (1, 2, 2)), (4, 4, 4)).flatten(1))


@network((3, 12, 12), kind="img")
class SoftArgmax(nn.Module):
    """Keypoints by soft argmax."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("at", torch.linspace(-1, 1, 12))

    def forward(self, x):
        n = x.shape[0]
        p = F.softmax(self.c(x).view(n, 4, -1) * 5.0, -1).view(n, 4, 12, 12)
        return torch.stack(((p.sum(2) * self.at).sum(-1), (p.sum(3) * self.at).sum(-1)), -1)
