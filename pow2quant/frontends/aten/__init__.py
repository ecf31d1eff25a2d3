"""How PyTorch's operations are written in a prepared network: one row per aten operation, by family."""

from __future__ import annotations

from pow2quant.frontends.aten import arithmetic, attention, functions, layers, pooling, shapes
from pow2quant.frontends.builder import Handler

ROWS: dict[str, Handler] = {
    **arithmetic.ROWS,
    **attention.ROWS,
    **functions.ROWS,
    **layers.ROWS,
    **pooling.ROWS,
    **shapes.ROWS,
}
"""By the operation's name without namespace and overload; `relu` stands for `relu_`, too."""
