"""Pooling, resizing and padding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor
from torch.nn import functional as F

from pow2quant.frontends.onnx.file import attribute
from pow2quant.frontends.onnx.step import Row, Step, scalar

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
AVERAGE_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
SMOOTH = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}


def paddings(node: NodeProto, sizes: list[int], kernel: list[int]) -> tuple[list[int], list[int]]:
    """What is padded before and behind each spatial dimension; sizes: of the map, for `auto_pad`."""
    n, auto = len(kernel), attribute(node, "auto_pad", "NOTSET")
    if not auto.startswith("SAME"):
        pads = attribute(node, "pads", [0] * 2 * n) if auto == "NOTSET" else [0] * 2 * n
        return list(pads[:n]), list(pads[n:])
    strides, dilations = attribute(node, "strides", [1] * n), attribute(node, "dilations", [1] * n)
    before, behind = [], []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (math.ceil(size / s) - 1) * s + d * (k - 1) + 1 - size)
        less, more = total // 2, total - total // 2
        before.append(less if auto == "SAME_UPPER" else more)
        behind.append(more if auto == "SAME_UPPER" else less)
    return before, behind


def interleaved(before: list[int], behind: list[int]) -> list[int]:
    """In the order of `F.pad`: the last dimension first."""
    return [p for pair in zip(reversed(before), reversed(behind), strict=True) for p in pair]


def pad(x: Tensor, before: list[int], behind: list[int], value: float = 0.0) -> Tensor:
    """Pads the last dimensions with a constant."""
    pads = interleaved(before, behind)
    return F.pad(x, pads, value=value) if any(pads) else x


def _pool(s: Step, x: Tensor) -> Any:
    kernel, sizes = s.attribute("kernel_shape"), list(x.shape[2:])
    n, is_max = len(kernel), s.node.op_type == "MaxPool"
    if len([o for o in s.node.output if o]) > 1:
        raise s.error("its indices are not supported")
    strides, dilations = s.attribute("strides", [1] * n), s.attribute("dilations", [1] * n)
    before, behind = paddings(s.node, sizes, kernel)
    padded, ceil = bool(s.attribute("count_include_pad", 0)), bool(s.attribute("ceil_mode", 0))
    if before != behind and padded and not is_max:
        x, before, behind = pad(x, before, behind), [0] * n, [0] * n
    if before != behind and all(
        a == 0 and d == 1 and size <= k <= size + b and size + b - k < stride
        for size, k, stride, d, a, b in zip(sizes, kernel, strides, dilations, before, behind, strict=True)
    ):  # one window, that holds the whole map
        dims = list(range(2, x.ndim))
        return torch.amax(x, dims, True) if is_max else torch.mean(x, dims, True)
    if before != behind and is_max and not ceil:
        x, before, behind = pad(x, before, behind, -math.inf), [0] * n, [0] * n
    if before != behind:
        _check_ceil(s, sizes, kernel, strides, dilations, before, behind)
        ceil = True
    if is_max:
        return MAX_POOLS[n - 1](x, kernel, strides, before, dilations, ceil)
    if any(d != 1 for d in dilations):
        raise s.error("an average pool with dilations is not supported")
    return AVERAGE_POOLS[n - 1](x, kernel, strides, before, ceil, padded)


def _check_ceil(s: Step, sizes: list[int], kernel: Any, strides: Any, dilations: Any, *pads: list[int]) -> None:
    """Padding that is missing behind the map is what `ceil_mode` adds, where it adds as many windows."""
    for size, k, stride, d, a, b in zip(sizes, kernel, strides, dilations, *pads, strict=True):
        span = d * (k - 1) + 1
        windows = math.ceil((size + 2 * a - span) / stride) + 1
        if (windows - 1) * stride >= size + a:
            windows -= 1
        if (size + a + b - span) // stride + 1 != windows:
            raise s.error(f"padding of {pads[0]} before and {pads[1]} behind is not supported")


def _resize(s: Step, x: Tensor, *rest: Any) -> Tensor:
    old = s.node.op_type == "Upsample" or s.opset < 11
    scales = s.attribute("scales", rest[0] if old and rest else rest[1] if len(rest) > 1 else None)
    sizes = rest[2] if len(rest) > 2 else None
    axes, n = [a % x.ndim for a in s.attribute("axes", range(x.ndim))], x.ndim - 2
    if sizes is not None and not np.asarray(sizes).size:
        sizes = None
    factors: list[float] | None = None
    if sizes is None:
        given = dict(zip(axes, np.asarray(scales, np.float32).reshape(-1).tolist(), strict=True))
        factors = [given.get(d, 1.0) for d in range(2, x.ndim)]
        wanted = [math.floor(x.shape[d] * given.get(d, 1.0)) for d in range(2, x.ndim)]
    else:
        given = dict(zip(axes, s.integers("", sizes) or [], strict=True))
        wanted = [int(given.get(d, x.shape[d])) for d in range(2, x.ndim)]
    if s.attribute("keep_aspect_ratio_policy", "stretch") != "stretch" or s.attribute("antialias", 0):
        raise s.error("keep_aspect_ratio_policy and antialias are not supported")
    if any(given.get(d, x.shape[d] if sizes is not None else 1.0) not in (1.0, x.shape[d]) for d in (1,)):
        raise s.error("resizes the channels")
    s.bounded([*x.shape[:2], *wanted])
    return _interpolated(s, x, wanted, n, factors, old)


def _interpolated(s: Step, x: Tensor, wanted: list[int], n: int, factors: list[float] | None, old: bool) -> Tensor:
    mode = s.attribute("mode", "nearest")
    coordinates = s.attribute("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    if mode == "nearest":
        rounding = s.attribute("nearest_mode", "floor" if old else "round_prefer_floor")
        scales = factors or [w / d for w, d in zip(wanted, x.shape[2:], strict=True)]
        pairs = list(zip(x.shape[2:], wanted, scales, strict=True))
        places = [_nearest(s, *pair, coordinates, rounding) for pair in pairs]
        for name, shift in (("nearest", 0.0), ("nearest-exact", 0.5)):
            if all(np.array_equal(p, _of_torch(*pair[:2], shift)) for p, pair in zip(places, pairs, strict=True)):
                return F.interpolate(x, wanted, mode=name)
        for d, p in enumerate(places, 2):
            if not np.array_equal(p, np.arange(x.shape[d])):
                x = torch.index_select(x, d, torch.from_numpy(p))
        return x
    kind = SMOOTH.get((mode, n))
    exact = factors is None or all(math.floor(d * f) == d * f for d, f in zip(x.shape[2:], factors, strict=True))
    if kind is None or coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners") or not exact:
        raise s.error(f"{mode} in {n} dimensions with {coordinates} is not supported")
    if mode == "cubic" and abs(s.attribute("cubic_coeff_a", -0.75) + 0.75) > 1e-6:
        raise s.error("cubic_coeff_a must be -0.75")
    return F.interpolate(x, wanted, mode=kind, align_corners=coordinates == "align_corners")


def _nearest(s: Step, size: int, wanted: int, scale: float, coordinates: str, rounding: str) -> NDArray[np.int64]:
    """The place along a dimension that each place of the result reads: the standard's formulas, in float32."""
    i, factor = np.arange(wanted, dtype=np.float32), np.float32(scale)
    if scale == 1:
        x = i
    elif coordinates == "align_corners":
        x = i * np.float32(size - 1) / np.float32(max(wanted - 1, 1))
    elif coordinates == "asymmetric":
        x = i / factor
    elif coordinates == "pytorch_half_pixel" and wanted == 1:
        x = 0 * i
    elif coordinates in ("half_pixel", "pytorch_half_pixel"):
        x = (i + np.float32(0.5)) / factor - np.float32(0.5)
    else:
        raise s.error(f"nearest with {coordinates} is not supported")
    half = np.float32(0.5)
    rounded = {
        "floor": np.floor(x),
        "ceil": np.ceil(x),
        "round_prefer_floor": np.ceil(x - half),
        "round_prefer_ceil": np.floor(x + half),
    }
    places: NDArray[np.int64] = rounded[rounding].astype(np.int64).clip(0, size - 1)
    return places


def _of_torch(size: int, wanted: int, shift: float) -> NDArray[np.int64]:
    """The places that `F.interpolate` reads: of nearest without a shift, of nearest-exact by half a place."""
    i, scale = np.arange(wanted, dtype=np.float32), np.float32(size) / np.float32(wanted)
    places: NDArray[np.int64] = np.floor((i + np.float32(shift)) * scale).astype(np.int64).clip(0, size - 1)
    return places


def _pad(s: Step, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    given, mode = s.integers("pads", pads) or [], s.attribute("mode", "constant")
    dims = [a % x.ndim for a in (s.integers("", axes) or range(x.ndim))]
    before, behind = [0] * x.ndim, [0] * x.ndim
    for i, d in enumerate(dims):
        before[d], behind[d] = given[i], given[i + len(dims)]
    for d in range(x.ndim):  # negative padding cuts
        start, end = max(0, -before[d]), x.shape[d] - max(0, -behind[d])
        x = x if (start, end) == (0, x.shape[d]) else x.narrow(d, start, end - start)
    before, behind = [max(0, p) for p in before], [max(0, p) for p in behind]
    first = next((d for d in range(x.ndim) if before[d] or behind[d]), x.ndim)
    s.bounded([size + a + b for size, a, b in zip(x.shape, before, behind, strict=True)])
    if mode == "constant":
        return pad(x, before[first:], behind[first:], s.attribute("value", scalar(value, 0.0)))
    return _repeated(s, x, before, behind, MODES[mode])


def _repeated(s: Step, x: Tensor, before: list[int], behind: list[int], mode: str) -> Tensor:
    """Pads any dimensions but the first with values of the tensor; PyTorch does it for the last ones of an image."""
    dims = [d for d in range(x.ndim) if before[d] or behind[d]]
    if not dims:
        return x
    if 0 in dims or len(dims) > 3:
        raise s.error(f"mode {s.attribute('mode')!r} pads one to three dimensions, and not the batch")
    if min(dims) >= 2 and x.ndim <= 5:
        dims = list(range(2, x.ndim))
    pads = interleaved([before[d] for d in dims], [behind[d] for d in dims])
    rest = [d for d in range(1, x.ndim) if d not in dims]
    order = [0, *rest, *dims]
    image = x.permute(order).reshape(x.shape[0], math.prod(x.shape[d] for d in rest), *(x.shape[d] for d in dims))
    image = F.pad(image, pads, mode=mode)
    padded = image.reshape(x.shape[0], *(x.shape[d] for d in rest), *image.shape[2:])
    return padded.permute([order.index(d) for d in range(x.ndim)])


def _global(reduce: Any) -> Row:
    return lambda s, x: reduce(x, list(range(2, x.ndim)), True)


ROWS: dict[str, Row] = {
    "MaxPool": _pool, "AveragePool": _pool, "Resize": _resize, "Upsample": _resize, "Pad": _pad,
    "GlobalAveragePool": _global(torch.mean), "GlobalMaxPool": _global(torch.amax),
    "GlobalLpPool": lambda s, x: torch.linalg.vector_norm(x, s.attribute("p", 2), list(range(2, x.ndim)), True),
    "LRN": lambda s, x: F.local_response_norm(
        x, s.attribute("size"), s.attribute("alpha", 1e-4), s.attribute("beta", 0.75), s.attribute("bias", 1.0)
    ),
}  # fmt: skip
"""By operation."""
