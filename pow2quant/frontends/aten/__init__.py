"""How PyTorch's operations are written in a prepared network: one row per aten operation, by family."""

from __future__ import annotations

from pow2quant.frontends.aten import (
    arithmetic,
    attention,
    counting,
    functions,
    indexing,
    layers,
    masks,
    normalization,
    pooling,
    products,
    recurrent,
    reductions,
    shapes,
)
from pow2quant.frontends.builder import Handler

ROWS: dict[str, Handler] = {
    **arithmetic.ROWS,
    **attention.ROWS,
    **functions.ROWS,
    **indexing.ROWS,
    **layers.ROWS,
    **masks.ROWS,
    **normalization.ROWS,
    **pooling.ROWS,
    **products.ROWS,
    **recurrent.ROWS,
    **reductions.ROWS,
    **shapes.ROWS,
    **counting.ROWS,
}
"""By the operation's name without namespace and overload; `relu` stands for `relu_`, too."""
