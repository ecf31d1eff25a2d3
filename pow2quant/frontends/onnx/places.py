"""Operations that read or write values at places: constant ones, or computed ones as far as capture takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pow2quant.frontends.onnx.step import Row, Step, tensor

MODES = {"linear": "bilinear", "cubic": "bicubic"}


def _each(s: Step, value: Any, x: Tensor) -> Tensor:
    """A tensor for every sample of x; what a file with a fixed batch of one holds is the same for all."""
    t = tensor(value)
    return t.expand(len(x), *t.shape[1:]) if s.batch == 1 and len(t) == 1 else t


def _gather_nd(s: Step, data: Any, places: Any) -> Tensor:
    x = tensor(data)
    if isinstance(places, Tensor):
        if s.attribute("batch_dims", 0) != 1 or places.shape[-1] != 1:
            raise s.error("places that are computed from data choose along the dimension behind the batch only")
        index = places.reshape(*places.shape[:-1], *[1] * (x.ndim - 2)).expand(*places.shape[:-1], *x.shape[2:])
        return torch.gather(x, 1, index.long())
    if s.attribute("batch_dims", 0):
        raise s.error("batch_dims with constant places are not supported")
    front, flat, rest = _flat(s, x, places)
    taken = x.reshape(*front, -1, *rest).index_select(len(front), torch.from_numpy(flat.reshape(-1)))
    return taken.reshape(*front, *flat.shape, *rest)


def _scatter_nd(s: Step, data: Any, places: Any, updates: Any) -> Tensor:
    x = tensor(data)
    if isinstance(places, Tensor):
        raise s.error("places that are computed from data are not supported")
    front, flat, rest = _flat(s, x, places)
    dim, index, how = len(front), flat.reshape(-1), s.attribute("reduction", "none")
    whole, new = x.reshape(*front, -1, *rest), _each(s, updates, x).reshape(*front, index.size, *rest)
    if how == "add":
        return whole.index_add(dim, torch.from_numpy(index), new).reshape(x.shape)
    if how != "none":
        raise s.error(f"reduction {how!r} is not supported")
    source = np.arange(whole.shape[dim])
    source[index] = whole.shape[dim] + np.arange(index.size)
    return torch.cat([whole, new], dim).index_select(dim, torch.from_numpy(source)).reshape(x.shape)


def _flat(s: Step, x: Tensor, places: Any) -> tuple[list[int], NDArray[np.int64], list[int]]:
    """Places along several dimensions as places along one: (the dimensions in front, places, the dimensions behind).

    In front stands the batch, where each sample has the same places.
    """
    given = np.asarray(places).astype(np.int64)
    depth = given.shape[-1]
    first = given[..., 0]
    batch = given.ndim > 1 and len(given) == (s.batch or len(x))
    if batch and (first == np.arange(len(given)).reshape(-1, *[1] * (first.ndim - 1))).all():
        if not (given[:, ..., 1:] == given[:1, ..., 1:]).all():
            raise s.error("places that are not the same in each sample are not supported")
        front, given = [len(x)], given[0, ..., 1:]
    else:
        front = []
    sizes = list(x.shape[len(front) : depth])
    flat = np.zeros(given.shape[:-1], np.int64)
    for i, size in enumerate(sizes):
        flat = flat * size + given[..., i] % size
    return front, flat, list(x.shape[depth:])


def _scatter(s: Step, data: Any, places: Any, updates: Any) -> Tensor:
    x, axis = tensor(data), s.attribute("axis", 0)
    index, new = _each(s, places, x), _each(s, updates, x)
    how = s.attribute("reduction", "none")
    if how not in ("none", "add"):
        raise s.error(f"reduction {how!r} is not supported")
    return torch.scatter_add(x, axis, index, new) if how == "add" else torch.scatter(x, axis, index, new)


def _grid_sample(s: Step, x: Tensor, grid: Any) -> Tensor:
    mode = s.attribute("mode", "linear")
    aligned = bool(s.attribute("align_corners", 0))
    return F.grid_sample(x, _each(s, grid, x), MODES.get(mode, mode), s.attribute("padding_mode", "zeros"), aligned)


def _affine_grid(s: Step, theta: Any, size: Any) -> Tensor:
    matrices, sizes = tensor(theta), s.integers("", size) or []
    return F.affine_grid(matrices, [len(matrices), *sizes[1:]], bool(s.attribute("align_corners", 0)))


def _one_hot(s: Step, places: Any, depth: Any, values: Any) -> Tensor:
    """Rows of a table that holds the one value on its diagonal."""
    if s.attribute("axis", -1) not in (-1, places.ndim):
        raise s.error("only a last dimension is supported")
    off, on = (float(v) for v in np.asarray(values).reshape(-1))
    return F.embedding(places.long(), torch.eye(int(np.asarray(depth).reshape(()))) * (on - off) + off)


def _gather(s: Step, data: Any, places: Any) -> Tensor:
    x = tensor(data)
    return torch.gather(x, s.attribute("axis", 0), _each(s, places, x))


ROWS: dict[str, Row] = {
    "GatherElements": _gather, "GatherND": _gather_nd, "ScatterND": _scatter_nd, "ScatterElements": _scatter,
    "OneHot": _one_hot, "GridSample": _grid_sample, "AffineGrid": _affine_grid,
}  # fmt: skip
"""By operation."""
