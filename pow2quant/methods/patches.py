"""What the weights of a convolution meet: patches of its input, all of them or some."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant.frontends.rows.weighted import zeros_around

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """What meets the weights of one neuron: (N, C, …) -> (groups, samples, K), K as in `weight.flatten(1)`."""
    if isinstance(module, nn.Linear):
        return x.flatten(0, -2)[None]
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    x, kernel, dilation, stride = _padded(module, x), module.kernel_size, module.dilation, module.stride
    if isinstance(module, nn.Conv1d):
        x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    columns = F.unfold(x, kernel, dilation, 0, stride)
    found: Tensor = columns.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return found


def some_patches(module: Convolution, x: Tensor, most: int) -> Tensor:
    """Of every image at most so many patches, at evenly spread positions: (N, C, …) -> (groups, K, samples).

    The step between positions is odd, so that they are not all in a few columns of the image.
    """
    x = _padded(module, x)
    steps = list(zip(module.kernel_size, module.stride, module.dilation, strict=True))
    sizes = [(size - d * (k - 1) - 1) // s + 1 for size, (k, s, d) in zip(x.shape[2:], steps, strict=True)]
    count = math.prod(sizes)
    places = torch.unravel_index(torch.arange(0, count, -(-count // most) | 1), sizes)
    taps = torch.unravel_index(torch.arange(math.prod(module.kernel_size)), module.kernel_size)
    index = [s * i + d * t[:, None] for i, t, (_, s, d) in zip(places, taps, steps, strict=True)]
    at: tuple[slice | Tensor, ...] = (slice(None), slice(None), *index)
    found = x[at]  # (N, C, taps, places)
    return found.permute(1, 2, 0, 3).reshape(module.groups, -1, len(x) * found.shape[3])


def _padded(module: Convolution, x: Tensor) -> Tensor:
    """With the convolution's own padding, of zeros: convolutions with another are not quantized."""
    return F.pad(x, zeros_around(module))
