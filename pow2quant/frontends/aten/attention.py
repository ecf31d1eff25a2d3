"""Scaled dot-product attention, as the matrix products and the softmax that it is."""

from __future__ import annotations

import math
from types import SimpleNamespace

from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.builder import Builder, Handler


def _attention(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """softmax(q k^T * scale + mask) v. query, key, value: (N, …, T, C)."""
    scale = 1 / math.sqrt(b.shape(a.query)[-1]) if a.scale is None else float(a.scale)
    query, key, value = (b.operand(node, x) for x in (a.query, a.key, a.value))
    rank = b.rank(a.key)
    transposed = b.call(node, m.Permute((*range(rank - 2), rank - 1, rank - 2)), key)
    scores = b.call(node, m.MatMul(), query, transposed)
    scores = b.call(node, m.Scale(scale), scores)
    if a.is_causal or a.attn_mask is not None:
        raise b.unsupported(node, "attention with a mask")
    weights = b.call(node, nn.Softmax(-1), scores)
    return b.call(node, m.MatMul(), weights, value)


ROWS: dict[str, Handler] = {"scaled_dot_product_attention": _attention}
