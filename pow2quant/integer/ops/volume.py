"""Windows over maps in three dimensions, seen as windows over maps in two, so that layers need no code of their own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.integer.nodes import Axis, Window
from pow2quant.integer.ops.copy import Copy, Part

if TYPE_CHECKING:
    from pow2quant.integer.lowering import Lowering
    from pow2quant.integer.program import Tensor


def window(graph: Lowering, name: str, x: Tensor, axes: list[Axis], fill: int) -> tuple[str, Window]:
    """What a window does along the dimensions of `x` (C, …), as a tensor and a window over it in two dimensions.

    A dimension along which every place is seen by itself joins the one beside it. Where there is none, the places that
    a window sees in depth and height are copied to lie behind one another: (C, D, H, W) becomes
    (C, D' H' k_d k_h, W), and the window, k_d k_h times k_w, moves down by its own height.

    name: of the layer. fill: the code of what lies beyond the map.
    """
    if len(axes) < 3:
        return x.name, Window.along(axes)
    depth, height, width = axes
    if depth.is_plain and height.is_plain:
        return x.name, Window.along([Axis(depth.size * height.size), width])
    if height.is_plain and width.is_plain:
        return x.name, Window.along([depth, Axis(height.size * width.size)])
    whole = np.arange(x.size).reshape(x.shape)
    shape = (len(whole), depth.result, height.result, depth.kernel, height.kernel, width.size)
    full = np.arange(math.prod(shape)).reshape(shape)
    parts = []
    for down, right in np.ndindex(depth.kernel, height.kernel):
        (d, from_d), (h, from_h) = depth.tap(down), height.tap(right)
        if d.stop > d.start and h.stop > h.start:
            parts.append(Part.of(0, whole[:, from_d, from_h], full[:, d, h, down, right]))
    rows, tall = depth.result * height.result, depth.kernel * height.kernel
    patches = graph.declare(f"{name}.patches", (len(whole), rows * tall, width.size), x.encoding)
    graph.steps.append(Copy(name, (x.name,), patches.name, tuple(parts), fill=fill))
    return patches.name, Window.along([Axis(rows * tall, tall, tall, result=rows), width])
