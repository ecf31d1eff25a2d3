"""Layers with a weight that the preparation makes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def depthwise(weight: Tensor, bias: Tensor | None, rank: int) -> nn.Module:
    """weight * x + bias per channel as a convolution. weight, bias: (C,); rank: 3 for (N, C, L) to 5."""
    kind = CONVOLUTIONS[rank - 3]
    conv = kind(len(weight), len(weight), 1, groups=len(weight), bias=bias is not None)
    with torch.no_grad():
        conv.weight.copy_(weight.reshape(conv.weight.shape))
        if bias is not None and conv.bias is not None:
            conv.bias.copy_(bias)
    return conv.eval()
