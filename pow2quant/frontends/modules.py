"""The modules that `prepare` puts in the place of functions, so that a prepared network consists of modules only.

Those at the end replace PyTorch's own where float32 leaves the last bit to the implementation: they compute in float64
and round once, which is what an executor that is right to half an ulp gives too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
"""What a prepared network holds beside the rows of `operators.OPERATORS`, until `backends.fold` has folded it."""


class Add(nn.Module):
    """x + y, broadcasting."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Sub(nn.Module):
    """x - y, broadcasting."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y


class Mul(nn.Module):
    """x * y, broadcasting."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


class MatMul(nn.Module):
    """x @ y of two activations."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)


class Scale(nn.Module):
    """factor * x + offset with two numbers: a one-input function."""

    def __init__(self, factor: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(float(factor)))
        self.register_buffer("offset", torch.tensor(float(offset)))

    factor: Tensor
    offset: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset

    def extra_repr(self) -> str:
        return f"factor={float(self.factor)}, offset={float(self.offset)}"


class Concat(nn.Module):
    """Concatenation along `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Mean(nn.Module):
    """The mean over `dims`."""

    def __init__(self, dims: Sequence[int], keepdim: bool) -> None:
        super().__init__()
        self.dims, self.keepdim = tuple(dims), keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, self.keepdim)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, keepdim={self.keepdim}"


class Reshape(nn.Module):
    """Reshape to `shape`, in which -1 stands for the dimension that holds the batch."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(int(d) for d in shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.shape)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


class Permute(nn.Module):
    """A permutation of the dimensions."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims).contiguous()

    def extra_repr(self) -> str:
        return f"dims={self.dims}"


class Slice(nn.Module):
    """x[…, start:stop:step, …] along several dimensions. stop None: to the end."""

    def __init__(self, slices: Sequence[tuple[int, int, int | None, int]]) -> None:
        """slices: (dimension, start, stop, step) for each dimension that is cut; step is positive."""
        super().__init__()
        self.slices = tuple(slices)

    def forward(self, x: Tensor) -> Tensor:
        index = [slice(None)] * x.ndim
        for dim, start, stop, step in self.slices:
            index[dim] = slice(start, stop, step)
        return x[tuple(index)].contiguous()

    def extra_repr(self) -> str:
        return ", ".join(f"dim {d}: {a}:{'' if b is None else b}:{s}" for d, a, b, s in self.slices)


class ZeroPad(nn.Module):
    """Padding with zeros; `pads` in the order of `torch.nn.functional.pad`, last dimension first."""

    def __init__(self, pads: Sequence[int]) -> None:
        super().__init__()
        self.pads = tuple(int(p) for p in pads)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads)

    def extra_repr(self) -> str:
        return f"pads={self.pads}"


class NearestUpsample(nn.Module):
    """Repeats every value `factors` times along each spatial dimension."""

    def __init__(self, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = tuple(int(f) for f in factors)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=[float(f) for f in self.factors], mode="nearest")

    def extra_repr(self) -> str:
        return f"factors={self.factors}"


class HardSwish(nn.Module):
    """x * clip(x / 6 + 1/2, 0, 1) in the order of ONNX HardSwish-14, to the last bit of float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.clamp(x * float(np.float32(1 / 6)) + 0.5, 0, 1)


class Sigmoid(nn.Sigmoid):
    """Rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input.dtype)


class Tanh(nn.Tanh):
    """Rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input.dtype)


class SiLU(nn.SiLU):
    """x * sigmoid(x), rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.double()
        return (x * torch.sigmoid(x)).to(input.dtype)


class GELU(nn.GELU):
    """Rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input.dtype)


class ELU(nn.ELU):
    """Rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.double()
        return torch.where(x > 0, x, self.alpha * (torch.exp(x) - 1)).to(input.dtype)


class Softmax(nn.Softmax):
    """Rounded once from float64."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input.dtype)


class LayerNorm(nn.LayerNorm):
    """Rounded once from float64; epsilon is a float32, as in ONNX."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (p.double() if p is not None else None for p in (self.weight, self.bias))
        eps = float(np.float32(self.eps))
        return F.layer_norm(input.double(), self.normalized_shape, weight, bias, eps).to(input.dtype)


EXACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.Hardswish: HardSwish,
    nn.Sigmoid: Sigmoid,
    nn.Tanh: Tanh,
    nn.SiLU: SiLU,
    nn.GELU: GELU,
    nn.ELU: ELU,
    nn.Softmax: Softmax,
    nn.LayerNorm: LayerNorm,
}
"""PyTorch's modules and ours that stand in for them; each takes over the other's attributes."""


def depthwise(weight: Tensor, bias: Tensor | None, rank: int) -> nn.Module:
    """weight * x + bias per channel as a convolution. weight, bias: (C,); rank: 3 for (N, C, L), 4 for (N, C, H, W)."""
    kind = nn.Conv2d if rank == 4 else nn.Conv1d
    conv = kind(len(weight), len(weight), 1, groups=len(weight), bias=bias is not None)
    with torch.no_grad():
        conv.weight.copy_(weight.reshape(conv.weight.shape))
        if bias is not None and conv.bias is not None:
            conv.bias.copy_(bias)
    return conv.eval()
