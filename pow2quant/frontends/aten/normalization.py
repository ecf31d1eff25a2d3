"""Softmax and the norms, also where PyTorch computes them in several operations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.aten.functions import unary
from pow2quant.frontends.aten.layers import ROWS as LAYERS
from pow2quant.frontends.aten.layers import given_parameters
from pow2quant.frontends.builder import Builder, Handler
from pow2quant.frontends.captured import arguments, operation
from pow2quant.frontends.modules.weighted import equip


def _group_norm(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    weight, bias = given_parameters(b, node, a)
    affine = weight is not None or bias is not None
    layer = equip(nn.GroupNorm(int(a.num_groups), b.shape(a.input)[1], a.eps, affine), weight, bias)
    return b.call(node, layer, b.operand(node, a.input), name=b.owner(node, a.weight))


def _instance_norm(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    """A group norm with one channel in each group; with the running statistics, a batch norm."""
    if not a.use_input_stats:
        return LAYERS["batch_norm"](b, node, SimpleNamespace(**vars(a), training=False))
    return _group_norm(b, node, SimpleNamespace(**vars(a), num_groups=b.shape(a.input)[1]))


def _rms_norm(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    weight, _ = given_parameters(b, node, a)
    layer = equip(nn.RMSNorm(list(a.normalized_shape), a.eps, elementwise_affine=weight is not None), weight, None)
    return b.call(node, layer, b.operand(node, a.input), name=b.owner(node, a.weight))


def along_last(b: Builder, node: fx.Node, layer: nn.Module, x: fx.Node, rank: int) -> fx.Node:
    """A layer's result; one that divides by a length along other dimensions than the last reads them as the last."""
    inner = sorted(layer.dims) if isinstance(layer, m.Normalize) else []
    order = [*(d for d in range(rank) if d not in inner), *inner]
    if order == list(range(rank)) or 0 in inner:
        return b.call(node, layer, x)
    assert isinstance(layer, m.Normalize)
    turned = b.call(node, m.Permute(order), x)
    layer = m.Normalize(range(rank - len(inner), rank), layer.eps)
    return b.call(node, m.Permute([order.index(d) for d in range(rank)]), b.call(node, layer, turned))


def _cosine_similarity(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    rank = max(map(b.rank, (a.x1, a.x2)))
    dim = int(a.dim) % rank

    def unit(x: Any) -> fx.Node:
        if b.is_data(x):
            if b.rank(x) < rank:
                raise b.unsupported(node, "cosine_similarity() of tensors with different numbers of dimensions")
            return along_last(b, node, m.Normalize([dim], float(a.eps)), b.operand(node, x), rank)
        held = b.tensor(node, x).float()
        held = held.reshape([1] * (rank - held.ndim) + list(held.shape))
        return b.hold(node, held / torch.linalg.vector_norm(held, dim=dim, keepdim=True).clamp(min=float(a.eps)))

    return b.call(node, m.Sum([dim], keepdim=False), b.call(node, m.Mul(), unit(a.x1), unit(a.x2)))


def normalized(b: Builder, node: fx.Node, a: SimpleNamespace) -> nn.Module | None:
    """x / |x| as `F.normalize` writes it, or a module of PyTorch's that ends in a division; None for another."""
    owner = b.module(node)
    if isinstance(owner, nn.LocalResponseNorm):
        return m.LocalResponseNorm(owner.size, owner.alpha, owner.beta, owner.k)
    divisor, eps = a.other, 0.0
    while isinstance(divisor, fx.Node) and divisor.op == "call_function":
        name, inner = operation(divisor), arguments(divisor)
        if name in ("linalg_vector_norm", "norm") and inner.self is a.self and inner.keepdim:
            order = getattr(inner, "ord", getattr(inner, "p", 2))
            dims = [inner.dim] if isinstance(inner.dim, int) else inner.dim
            return m.Normalize([int(d) % b.rank(a.self) for d in dims], eps) if order == 2 and dims else None
        if name == "add" and operation(inner.self) == "abs" and arguments(inner.self).self is a.self:
            return m.Softsign() if b.number(inner.other) == 1 else None
        if name not in ("expand", "expand_as", "clamp_min"):
            return None
        eps = eps if name != "clamp_min" else float(b.number(inner.min) or 0.0)
        divisor = inner.self
    return None


ROWS: dict[str, Handler] = {
    **dict.fromkeys(("softmax", "_softmax"), unary(lambda a: nn.Softmax(int(a.dim)))),
    **dict.fromkeys(("log_softmax", "_log_softmax"), unary(lambda a: nn.LogSoftmax(int(a.dim)))),
    "group_norm": _group_norm, "instance_norm": _instance_norm, "rms_norm": _rms_norm,
    "cosine_similarity": _cosine_similarity,
}  # fmt: skip
