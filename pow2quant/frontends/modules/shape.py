"""Modules that move values and do not change them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant.frontends.modules.rounded import Described


class Concat(Described):
    """Concatenation along `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, self.dim)


class Reshape(Described):
    """Reshape to `shape`, in which -1 stands for the dimension that holds the batch."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(int(d) for d in shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.shape)


class Permute(Described):
    """A permutation of the dimensions."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims).contiguous()


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


class ZeroPad(Described):
    """Padding with zeros; `pads` in the order of `torch.nn.functional.pad`, last dimension first."""

    def __init__(self, pads: Sequence[int]) -> None:
        super().__init__()
        self.pads = tuple(int(p) for p in pads)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads)


class NearestUpsample(Described):
    """Repeats every value `factors` times along each spatial dimension."""

    def __init__(self, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = tuple(int(f) for f in factors)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=[float(f) for f in self.factors], mode="nearest")


class Take(nn.Module):
    """x[…, indices, …] along `dim`: repetitions, mirrored borders, turns, and whatever else a list of places says."""

    def __init__(self, dim: int, indices: Sequence[int]) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("indices", torch.tensor([int(i) for i in indices], dtype=torch.int64))

    indices: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.indices)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, indices={len(self.indices)}"


class ConstantPad(Described):
    """Padding with `value`; `pads` in the order of `torch.nn.functional.pad`, last dimension first."""

    def __init__(self, pads: Sequence[int], value: float) -> None:
        super().__init__()
        self.pads, self.value = tuple(int(p) for p in pads), float(np.float32(value))

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, value=self.value)


class PaddedMaxPool(Described):
    """The largest value of every window; a map is padded otherwise in front than behind, and padding never counts.

    padding, behind: of each dimension of the map, first dimension first; so are the others.
    """

    ceil_mode = False

    def __init__(
        self,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[int],
        behind: Sequence[int],
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = list(kernel_size), list(stride), list(dilation)
        self.padding, self.behind = list(padding), list(behind)

    def forward(self, x: Tensor) -> Tensor:
        pads = [p for pair in zip(self.padding[::-1], self.behind[::-1], strict=True) for p in pair]
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(self.kernel_size) - 1]
        x = F.pad(x, pads, value=float("-inf"))
        return pool(x, self.kernel_size, self.stride, dilation=self.dilation)


class TopK(Described):
    """The `count` largest values along `dim`, or the least ones, in order."""

    def __init__(self, count: int, dim: int, largest: bool = True) -> None:
        super().__init__()
        self.count, self.dim, self.largest = count, dim, largest

    def forward(self, x: Tensor) -> Tensor:
        return torch.topk(x, self.count, self.dim, self.largest).values
