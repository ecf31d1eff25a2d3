"""Layers with a weight that the preparation makes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def depthwise(weight: Tensor, bias: Tensor | None, rank: int) -> nn.Module:
    """weight * x + bias per channel as a convolution. weight, bias: (C,); rank: 3 for (N, C, L), 4 for (N, C, H, W)."""
    kind = nn.Conv2d if rank == 4 else nn.Conv1d
    conv = kind(len(weight), len(weight), 1, groups=len(weight), bias=bias is not None)
    with torch.no_grad():
        conv.weight.copy_(weight.reshape(conv.weight.shape))
        if bias is not None and conv.bias is not None:
            conv.bias.copy_(bias)
    return conv.eval()
