"""Layers with weights: convolutions, linear layers, normalizations."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.builder import Builder, Handler
from pow2quant.frontends.modules import weighted
from pow2quant.frontends.modules.weighted import equip
from pow2quant.frontends.writing import many


def linear(b: Builder, node: fx.Node, x: Any, weight: Tensor, bias: Tensor | None, name: str | None) -> fx.Node:
    """x @ weight.T + bias. x: (N, …, C_in); one with more than two dimensions is (N·…, C_in) between two reshapes."""
    return of_rows(b, node, b.operand(node, x), b.shape_with_batch(node), weight, bias, name)


def of_rows(
    b: Builder,
    node: fx.Node,
    x: fx.Node,
    shape: Sequence[int],
    weight: Tensor,
    bias: Tensor | None = None,
    name: str | None = None,
) -> fx.Node:
    """The same of a prepared node; shape: of the result, with -1 for what grows with the batch."""
    layer = weighted.linear(weight, bias)
    if len(shape) == 2:
        return b.call(node, layer, x, name=name)
    rows = b.call(node, m.Reshape((-1, weight.shape[1])), x, kind="rows")
    return b.call(node, m.Reshape(shape), b.call(node, layer, rows, name=name), kind="unrows")


def given_parameters(b: Builder, node: fx.Node, a: SimpleNamespace) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Weight and bias, each None where there is none."""
    weight, bias = (None if held is None else b.parameter(node, held) for held in (a.weight, getattr(a, "bias", None)))
    return weight, bias


def _linear(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    if b.is_data(a.weight):
        transposed = b.call(node, m.Permute((*range(b.rank(a.weight) - 2), -1, -2)), b.operand(node, a.weight))
        product = b.call(node, m.MatMul(), b.operand(node, a.input), transposed)
        return product if a.bias is None else b.call(node, m.Add(), product, b.operand(node, a.bias))
    _, bias = given_parameters(b, node, a)
    return linear(b, node, a.input, b.parameter(node, a.weight), bias, b.owner(node, a.weight))


def _conv(spatial: int, transposed: bool = False) -> Handler:
    names = ("stride", "padding", "dilation", *(["output_padding"] if transposed else []))

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
        _, bias = given_parameters(b, node, a)
        if b.rank(a.input) != spatial + 2:
            raise b.unsupported(node, f"a convolution of an image without a batch: {b.shape(a.input)}")
        given = {name: getattr(a, name) for name in names}
        options = {k: v if isinstance(v, str) else numbers(v, spatial) for k, v in given.items()}
        layer = weighted.convolution(b.parameter(node, a.weight), bias, a.groups, transposed, **options)
        return b.call(node, layer, b.operand(node, a.input), name=b.owner(node, a.weight))

    return handler


def numbers(value: Any, n: int) -> tuple[int, ...]:
    """One for each of n dimensions, from one or as many."""
    values = many(value, 1)
    return tuple(values * n if len(values) == 1 else values)


BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _batch_norm(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    kind: Any = BATCH_NORMS[b.rank(a.input)]
    if a.running_mean is None or a.running_var is None or getattr(a, "training", False):
        raise b.unsupported(node, "batch norm without running statistics cannot be folded")
    mean, variance = (b.tensor(node, v).detach().float() for v in (a.running_mean, a.running_var))
    weight, bias = given_parameters(b, node, a)
    norm = kind(len(mean), a.eps, a.momentum, affine=weight is not None or bias is not None)
    norm.running_mean, norm.running_var = mean.clone(), variance.clone()
    equip(norm, weight, bias)
    return b.call(node, norm, b.operand(node, a.input), name=b.owner(node, a.weight))


def _batch_norm_parts(b: Builder, node: fx.Node, a: SimpleNamespace) -> Any:
    """The same as torch.export's decomposition writes it: a list whose first is the result."""
    result = _batch_norm(b, node, a)
    return lambda _, index: result


def _layer_norm(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    weight, bias = given_parameters(b, node, a)
    affine = weight is not None or bias is not None
    layer = equip(nn.LayerNorm(a.normalized_shape, a.eps, affine, bias=bias is not None), weight, bias)
    return b.call(node, layer, b.operand(node, a.input), name=b.owner(node, a.weight))


def _prelu(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node:
    weight = b.parameter(node, a.weight)
    layer = nn.PReLU(weight.numel())
    layer.weight = weight
    return b.call(node, layer, b.operand(node, a.self), name=b.owner(node, a.weight))


ROWS: dict[str, Handler] = {
    "linear": _linear,
    **{f"conv{n}d": _conv(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _conv(n, transposed=True) for n in (1, 2, 3)},
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm_parts,
    "layer_norm": _layer_norm,
    "prelu": _prelu, "_prelu_kernel": _prelu,
}  # fmt: skip
