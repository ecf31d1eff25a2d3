"""Layers with a weight, as both front ends make them; a parameter of the user's stays the same one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def equip(layer: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """Gives a layer its parameters; one that is None stays what it is. Raises ValueError for another shape."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        own = getattr(layer, name, None)
        if own is None or own.shape != value.shape:
            shape = None if own is None else tuple(own.shape)
            raise ValueError(f"its {name} has shape {tuple(value.shape)}, not {shape}")
        setattr(layer, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().float()))
    return layer


def linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """x @ weight.T + bias. weight: (C_out, C_in)."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    return equip(layer, weight, bias)


def convolution(
    weight: Tensor, bias: Tensor | None, groups: int, transposed: bool = False, **options: Any
) -> nn.Module:
    """weight: (C_out, C_in / groups, …), transposed (C_in, C_out / groups, …). options: those of PyTorch's module."""
    kind: Any = (TRANSPOSED if transposed else CONVOLUTIONS)[weight.ndim - 3]
    channels = (weight.shape[0], weight.shape[1] * groups)
    with torch.device("meta"):
        layer = kind(
            *(channels if transposed else channels[::-1]), tuple(weight.shape[2:]), groups=groups,
            bias=bias is not None, **options,
        )  # fmt: skip
    return equip(layer, weight, bias)


def depthwise(weight: Tensor, bias: Tensor | None, rank: int) -> nn.Module:
    """weight * x + bias per channel as a convolution. weight, bias: (C,); rank: 3 for (N, C, L) to 5."""
    kind = CONVOLUTIONS[rank - 3]
    conv = kind(len(weight), len(weight), 1, groups=len(weight), bias=bias is not None)
    with torch.no_grad():
        conv.weight.copy_(weight.reshape(conv.weight.shape))
        if bias is not None and conv.bias is not None:
            conv.bias.copy_(bias)
    return conv.eval()
