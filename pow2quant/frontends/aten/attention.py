"""Scaled dot-product attention, as the matrix products and the softmax that it is."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.builder import Builder, Handler


def _attention(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    """softmax(q k^T * scale + mask) v. query, key, value: (N, …, T, C). See `scores` for what the softmax takes in."""
    scale = 1 / math.sqrt(b.shape(a.query)[-1]) if a.scale is None else float(a.scale)
    query, key, value = (b.operand(node, x) for x in (a.query, a.key, a.value))
    rank = b.rank(a.key)
    transposed = b.call(node, m.Permute((*range(rank - 2), rank - 1, rank - 2)), key)
    scores = b.call(node, m.MatMul(), query, transposed)
    scores = _masked(b, node, a, b.call(node, m.Scale(scale), scores))
    return b.call(node, m.MatMul(), b.call(node, nn.Softmax(-1), scores), value)


def _masked(b: Builder, node: fx.Node, a: SimpleNamespace, scores: fx.Node) -> fx.Node:
    """The scores with the mask, if there is one."""
    if a.is_causal:
        hidden = torch.ones(b.shape(a.query)[-2], b.shape(a.key)[-2]).triu(1).bool()
        return b.call(node, m.Masked(hidden, -torch.inf), scores)
    if a.attn_mask is None:
        return scores
    if a.attn_mask.meta["val"].dtype != torch.bool:
        return b.call(node, m.Add(), scores, b.operand(node, a.attn_mask))
    if b.is_data(a.attn_mask):
        nothing = b.hold(node, torch.tensor(-torch.inf))
        return b.call(node, m.Select(), b.operand(node, a.attn_mask), scores, nothing)
    return b.call(node, m.Masked(~b.tensor(node, a.attn_mask), -torch.inf), scores)


ROWS: dict[str, Handler] = {"scaled_dot_product_attention": _attention}
