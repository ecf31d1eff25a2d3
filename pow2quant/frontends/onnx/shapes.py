"""Operations that only move values, and shape arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import Tensor
from torch.nn import functional as F

from pow2quant.frontends.batches import regrown
from pow2quant.frontends.onnx.file import attribute
from pow2quant.frontends.onnx.step import Row, Step, tensor


def _reshape(s: Step, x: Tensor, shape: Any = None) -> Tensor:
    wanted = s.integers("shape", shape) or []
    if not s.attribute("allowzero", 0):
        wanted = [x.shape[i] if d == 0 else d for i, d in enumerate(wanted)]
    if s.fixed is not None and s.fixed[0] != tuple(x.shape) and not _leaves_batch_open(wanted, s.fixed[1], s.batch):
        return x.reshape(regrown(*s.fixed, x.shape))
    return x.reshape(wanted)


def _leaves_batch_open(wanted: list[int], result: tuple[int, ...], batch: int | None) -> bool:
    """Whether -1 stands where the samples lie, of a shape that a file with a fixed batch size asks for."""
    if -1 not in wanted:
        return False
    at = wanted.index(-1)
    return at == 0 or (result[at] == batch and batch not in wanted[:at])


def _flatten(s: Step, x: Tensor) -> Tensor:
    axis = s.attribute("axis", 1)
    if s.fixed is not None and s.fixed[0] != tuple(x.shape):
        return x.reshape(regrown(*s.fixed, x.shape))
    axis += x.ndim if axis < 0 else 0
    return x.flatten(1) if axis == 1 else x.reshape(math.prod(x.shape[:axis]), -1)


def _squeeze(s: Step, x: Tensor, axes: Any = None) -> Tensor:
    given = s.integers("axes", axes)
    dims = [d for d in range(1, x.ndim) if x.shape[d] == 1] if given is None else [a % x.ndim for a in given]
    if any(x.shape[d] != 1 for d in dims):
        raise s.error(f"only dimensions of size 1 can go; its operand has shape {tuple(x.shape)}")
    for d in sorted(dims, reverse=True):
        x = x.squeeze(d)
    return x


def _unsqueeze(s: Step, x: Tensor, axes: Any = None) -> Tensor:
    given = s.integers("axes", axes) or []
    for d in sorted(a % (x.ndim + len(given)) for a in given):
        x = x.unsqueeze(d)
    return x


def _concat(s: Step, *parts: Any) -> Tensor:
    tensors = [tensor(p) for p in parts]
    axis = s.attribute("axis") % tensors[0].ndim
    most = max(x.shape[0] for x in tensors)
    if axis and s.batch is not None:  # rows that the file repeats for its fixed batch
        tensors = [x.expand(most, *x.shape[1:]) if x.shape[0] == 1 else x for x in tensors]
    return torch.cat(tensors, axis)


def _slice(s: Step, x: Tensor, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Tensor:
    first, last = s.integers("starts", starts) or [], s.integers("ends", ends) or []
    dims = s.integers("axes", axes) or list(range(len(first)))
    strides = s.integers("", steps) or [1] * len(first)
    for d, start, end, step in zip(dims, first, last, strides, strict=True):
        d %= x.ndim
        places = range(*slice(start, end, step).indices(x.shape[d]))
        if step < 0:
            x = x.flip(d) if len(places) == x.shape[d] else x.index_select(d, torch.tensor(list(places)))
        elif len(places) != x.shape[d]:
            cut: list[slice] = [slice(None)] * x.ndim
            cut[d] = slice(places.start, places.stop, step)
            x = x[tuple(cut)]
    return x


def _split(s: Step, x: Tensor, split: Any = None) -> Any:
    axis, count = s.attribute("axis", 0) % x.ndim, len(s.node.output)
    sizes = s.integers("split", split)
    if sizes is None:
        each = -(-x.shape[axis] // count)
        sizes = [min(each, x.shape[axis] - i * each) for i in range(count)]
    return torch.split(x, sizes, axis) if count > 1 else x


def _parts(s: Step, x: Tensor, split: Any = None) -> Any:
    """SplitToSequence: parts of one size, or of the given sizes; of 1 without that dimension where there is no size."""
    axis, sizes = s.attribute("axis", 0) % x.ndim, s.integers("", split)
    if sizes is None:
        return torch.split(x, 1, axis) if s.attribute("keepdims", 1) else torch.unbind(x, axis)
    return torch.split(x, sizes[0] if np.asarray(split).ndim == 0 else sizes, axis)


def _joined(s: Step, parts: Any) -> Tensor:
    return (torch.stack if s.attribute("new_axis", 0) else torch.cat)([tensor(p) for p in parts], s.attribute("axis"))


def _gather(s: Step, table: Any, index: Any) -> Tensor:
    x = tensor(table)
    axis = s.attribute("axis", 0) % x.ndim
    if isinstance(index, Tensor):
        if axis != 0:
            raise s.error("places that are computed from data only choose rows of a table")
        return F.embedding(index, x) if x.ndim == 2 else x[index.long()]
    places = np.asarray(index).astype(np.int64)
    if places.ndim == 0:
        return x.select(axis, int(places) % x.shape[axis])
    flat = (places % x.shape[axis]).reshape(-1)
    if flat.tolist() == list(range(int(flat[0]), int(flat[0]) + len(flat))):
        taken = x if len(flat) == x.shape[axis] else x.narrow(axis, int(flat[0]), len(flat))
    else:
        taken = x.index_select(axis, torch.from_numpy(flat))
    return taken if places.ndim == 1 else taken.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def _expand(s: Step, x: Tensor, shape: Any) -> Tensor:
    wanted = s.integers("", shape) or []
    return x.expand(s.bounded(np.broadcast_shapes(tuple(x.shape), tuple(wanted))))


def _tile(s: Step, x: Tensor, repeats: Any) -> Tensor:
    times = s.integers("", repeats) or []
    s.bounded([d * t for d, t in zip(x.shape, times, strict=True)])
    return x if all(t == 1 for t in times) else x.repeat(times)


def _depth_to_space(s: Step, x: Tensor) -> Tensor:
    block = s.attribute("blocksize")
    if s.attribute("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    parts = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(s: Step, x: Tensor) -> Tensor:
    block = s.attribute("blocksize")
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block**2, h // block, w // block)


def _shape(s: Step, x: Tensor) -> Any:
    return np.array(x.shape[s.attribute("start", 0) : s.attribute("end")], np.int64)


def _cast(s: Step, x: Any, like: Any = None) -> Any:
    if like is not None:
        wanted = tensor(like).dtype
    else:
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(s.attribute("to")))
        wanted = torch.float32 if kind.kind not in "iub" else torch.from_numpy(np.empty(0, kind)).dtype
    wanted = torch.float32 if wanted.is_floating_point else wanted
    if not isinstance(x, Tensor):  # a constant, cast to the type of something computed
        return np.asarray(x).astype(str(wanted).removeprefix("torch."))
    return x if x.dtype == wanted else x.to(wanted)


def _transpose(s: Step, x: Tensor) -> Tensor:
    perm = list(s.attribute("perm") or range(x.ndim)[::-1])
    return x if perm == list(range(x.ndim)) else x.permute(perm)


def _same(s: Step, x: Tensor, *rest: Any) -> Tensor:
    return x


def _trilu(s: Step, x: Tensor, k: Any = None) -> Tensor:
    offset = 0 if k is None else int(np.asarray(k).reshape(()))
    return torch.triu(x, offset) if attribute(s.node, "upper", 1) else torch.tril(x, offset)


ROWS: dict[str, Row] = {
    "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Concat": _concat,
    "Slice": _slice, "Split": _split, "Gather": _gather, "Expand": _expand, "Tile": _tile, "Transpose": _transpose,
    "DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth, "Shape": _shape, "Cast": _cast,
    "CastLike": _cast, "Identity": _same, "Dropout": _same, "Trilu": _trilu,
    "SplitToSequence": _parts, "SequenceConstruct": lambda s, *x: x, "ConcatFromSequence": _joined,
    "SequenceAt": lambda s, parts, i: parts[int(i)], "SequenceLength": lambda s, parts: np.array(len(parts), np.int64),
    "Size": lambda s, x: np.array(x.numel(), np.int64),
}  # fmt: skip
"""By operation."""
