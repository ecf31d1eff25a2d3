"""Folding of batch norm: a rewrite of the prepared float network."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from pow2quant.backends.base import Batch
from pow2quant.errors import UnsupportedModelError, WeightsError
from pow2quant.frontends.modules import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED, Reshape, depthwise
from pow2quant.frontends.operators import called


def fold_batch_norm(network: fx.GraphModule, batches: Iterable[Batch] = ()) -> fx.GraphModule:
    """Folds each batch norm into the convolution or linear layer in front of it, in place, and returns the network.

    One that stands alone, or whose layer has other readers, becomes a per-channel affine operation (a 1x1 depthwise
    convolution) under its own name. Mean and deviation that a batch norm gives its result stay known, as
    `node.meta["normal"]`, two (C,); and of one that was folded, what it divided by, as `node.meta["batch_norm"]`: the
    deviation, (C,), and epsilon. `batches` is not used: the signature is that of every rewrite.
    """
    with torch.no_grad():
        for node in list(network.graph.nodes):
            if isinstance(called(network, node), BATCH_NORMS):
                _fold(network, node)
    network.graph.lint()
    network.recompile()
    return network


def _check_variance(name: str, variance: Tensor, eps: float) -> None:
    """Raises WeightsError where batch norm divides by the root of a number that is not above 0."""
    wrong = (variance.double() + eps <= 0).flatten()
    if wrong.any():
        channel = int(wrong.int().argmax())
        raise WeightsError(
            f"{name}: {float(variance.flatten()[channel]):g} in channel {channel} ({int(wrong.sum())} of "
            f"{wrong.numel()} channels): batch norm gives NaN or infinity; legal: variances v with "
            f"v + eps > 0, here eps is {eps:g}"
        )


def _fold(network: fx.GraphModule, node: fx.Node) -> None:
    norm = network.get_submodule(str(node.target))
    before = node.args[0]
    assert isinstance(norm, BATCH_NORMS)
    assert isinstance(before, fx.Node)
    if norm.running_mean is None or norm.running_var is None:
        raise UnsupportedModelError(f"{node.target}: batch norm without running statistics cannot be folded")
    _check_variance(f"{node.target}.running_var", norm.running_var, norm.eps)
    gamma = norm.weight.double() if norm.affine else torch.ones_like(norm.running_var, dtype=torch.float64)
    beta = norm.bias.double() if norm.affine else torch.zeros_like(gamma)
    layer = called(network, before)
    fused = _fused(layer, norm) if layer is not None and len(before.users) == 1 else None
    if fused is not None:
        own = getattr(layer, "bias", None)
        learns = norm.affine and norm.weight.requires_grad, norm.affine and norm.bias.requires_grad
        fused.get_parameter("bias").requires_grad_(learns[1] or (own is not None and own.requires_grad))
        network.set_submodule(str(before.target), fused)
        before.meta["normal"] = (beta, gamma.abs())
        before.meta["learns"] = learns
        before.meta["batch_norm"] = (torch.sqrt(norm.running_var.double() + norm.eps), float(norm.eps))
        node.replace_all_uses_with(before)
        network.graph.erase_node(node)
        network.delete_submodule(str(node.target))
        return
    deviation = torch.sqrt(norm.running_var.double() + norm.eps)
    weight = gamma / deviation
    node.meta["normal"] = (beta, gamma.abs())
    bias = beta - norm.running_mean.double() * weight
    rank = len(node.meta["shape"])
    network.set_submodule(str(node.target), depthwise(weight.float(), bias.float(), max(rank, 3)))
    if rank == 2:
        _between_reshapes(network, node)


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    if type(layer) in TRANSPOSED and layer.groups != 1:
        return None  # PyTorch folds these wrongly
    if norm.weight is None:
        norm = copy.copy(norm)
        ones, zeros = torch.ones_like(norm.running_var), torch.zeros_like(norm.running_var)
        norm._parameters = {"weight": nn.Parameter(ones), "bias": nn.Parameter(zeros)}
    if type(layer) in CONVOLUTIONS or type(layer) in TRANSPOSED:
        return fuse_conv_bn_eval(layer, norm, transpose=type(layer) in TRANSPOSED)  # type: ignore[type-var,arg-type]
    if type(layer) is nn.Linear:
        return fuse_linear_bn_eval(layer, norm)  # type: ignore[arg-type]
    return None


def _between_reshapes(network: fx.GraphModule, node: fx.Node) -> None:
    """(N, C) -> (N, C, 1) -> depthwise convolution -> (N, C)."""
    n, channels = node.meta["shape"]
    for suffix, shape in (("in", (-1, channels, 1)), ("out", (-1, channels))):
        name = f"{node.target}_{suffix}"
        network.add_submodule(name, Reshape(shape))
        if suffix == "in":
            with network.graph.inserting_before(node):
                inner = network.graph.call_module(name, (node.args[0],))
            node.args = (inner,)
            inner.meta = {"shape": (n, channels, 1), "free": (True, False, False)}
        else:
            with network.graph.inserting_after(node):
                outer = network.graph.call_module(name, ())
            node.replace_all_uses_with(outer)
            outer.args = (node,)
            outer.meta = dict(node.meta)
    node.meta = dict(node.meta, shape=(n, channels, 1), free=(True, False, False))
