"""Scaled dot-product attention, as the matrix products and the softmax that it is."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, fx

from pow2quant.frontends import modules as m
from pow2quant.frontends.builder import Builder, Handler


def _attention(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """softmax(q k^T * scale + mask) v. query, key, value: (N, …, T, C). The factor belongs to the softmax."""
    scale = 1 / math.sqrt(b.shape(a.query)[-1]) if a.scale is None else float(a.scale)
    query, key, value = (b.operand(node, x) for x in (a.query, a.key, a.value))
    rank = b.rank(a.key)
    transposed = b.call(node, m.Permute((*range(rank - 2), rank - 1, rank - 2)), key)
    scores = b.call(node, m.MatMul(), query, transposed)
    weights = b.call(node, m.MaskedSoftmax(-1, scale, _mask(b, node, a)), scores, kind="softmax")
    return b.call(node, m.MatMul(), weights, value)


def _mask(b: Builder, node: fx.Node, a: SimpleNamespace) -> Tensor | None:
    """What is added to the scores, or None."""
    if a.is_causal:
        return torch.full((b.shape(a.query)[-2], b.shape(a.key)[-2]), -torch.inf).triu(1)
    if a.attn_mask is None:
        return None
    if b.is_data(a.attn_mask):
        raise b.unsupported(node, "attention with a mask that is computed from the inputs")
    mask = b.tensor(node, a.attn_mask)
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.float()


ROWS: dict[str, Handler] = {"scaled_dot_product_attention": _attention}
