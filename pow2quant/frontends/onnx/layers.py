"""Operations with weights as PyTorch's layers: weights are the file's tensors, so they can be trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import NodeProto
from torch import Tensor, nn

from pow2quant.frontends.modules import weighted
from pow2quant.frontends.modules.weighted import equip
from pow2quant.frontends.onnx.file import OnnxFile, attribute
from pow2quant.frontends.onnx.windows import interleaved, paddings


class Weights(Protocol):
    """What a layer is made from: the operands of its node. at: the operand's position."""

    file: OnnxFile

    def constant(self, node: NodeProto, at: int) -> NDArray[Any] | None: ...

    def parameter(self, node: NodeProto, at: int) -> nn.Parameter | None: ...


class PaddedConvolution(nn.Module):
    """A convolution behind an edge of zeros that is not the same on both sides. pads: in the order of `F.pad`."""

    def __init__(self, pads: list[int], convolution: nn.Module) -> None:
        super().__init__()
        self.pads, self.convolution = pads, convolution

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) -> (N, C', …)."""
        result: Tensor = self.convolution(nn.functional.pad(x, self.pads))
        return result


class SamePadded(nn.Module):
    """A convolution whose edge of zeros follows from the size of the map (`auto_pad` SAME_UPPER or SAME_LOWER)."""

    def __init__(self, node: NodeProto, convolution: nn.Module) -> None:
        super().__init__()
        self.node, self.convolution = node, convolution

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, …) -> (N, C', …)."""
        before, behind = paddings(self.node, list(x.shape[2:]), list(self.convolution.kernel_size))  # type: ignore[arg-type]
        result: Tensor = self.convolution(nn.functional.pad(x, interleaved(before, behind)))
        return result


def _conv(w: Weights, node: NodeProto) -> nn.Module:
    weight, bias = w.parameter(node, 1), w.parameter(node, 2)
    assert weight is not None
    kernel, group = list(weight.shape[2:]), attribute(node, "group", 1)
    n = len(kernel)
    same = attribute(node, "auto_pad", "NOTSET").startswith("SAME")
    before, behind = ([0] * n, [0] * n) if same else paddings(node, [], kernel)
    layer = weighted.convolution(
        weight, bias, group, stride=tuple(attribute(node, "strides", [1] * n)),
        padding=tuple(before) if before == behind else 0, dilation=tuple(attribute(node, "dilations", [1] * n)),
    )  # fmt: skip
    if same:
        return SamePadded(node, layer)
    return layer if before == behind else PaddedConvolution(interleaved(before, behind), layer)


def _conv_transpose(w: Weights, node: NodeProto) -> nn.Module:
    weight, bias = w.parameter(node, 1), w.parameter(node, 2)
    assert weight is not None
    kernel, group = list(weight.shape[2:]), attribute(node, "group", 1)
    n = len(kernel)
    same = attribute(node, "auto_pad", "NOTSET").startswith("SAME")
    before, behind = ([0] * n, [0] * n) if same else paddings(node, [], kernel)
    if same or before != behind or attribute(node, "output_shape"):
        raise w.file.error(node, "its padding (unequal, by output_shape or auto_pad) is not supported")
    return weighted.convolution(
        weight, bias, group, transposed=True, stride=tuple(attribute(node, "strides", [1] * n)), padding=tuple(before),
        output_padding=tuple(attribute(node, "output_padding", [0] * n)),
        dilation=tuple(attribute(node, "dilations", [1] * n)),
    )  # fmt: skip


def linear(w: Weights, node: NodeProto, transposed: bool) -> nn.Module | None:
    """x @ weight (+ bias); transposed: the file stores (out, in), as PyTorch does."""
    weight, bias = w.parameter(node, 1), w.parameter(node, 2)
    if weight is None or weight.ndim != 2:
        return None
    if not transposed:
        weight = nn.Parameter(weight.detach().t().contiguous())
    if bias is not None and bias.shape != (len(weight),):
        bias = nn.Parameter(bias.detach().reshape(-1).expand(len(weight)).contiguous())
    return weighted.linear(weight, bias)


def _gemm(w: Weights, node: NodeProto) -> nn.Module | None:
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    bias = w.constant(node, 2)
    if attribute(node, "transA", 0) or (bias is not None and bias.size not in (1, bias.shape[-1] if bias.ndim else 1)):
        return None
    layer = linear(w, node, bool(attribute(node, "transB", 0)))
    if isinstance(layer, nn.Linear) and (alpha != 1 or (beta != 1 and layer.bias is not None)):
        layer.weight = nn.Parameter(layer.weight.detach() * alpha)
        layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach() * beta)
    return layer


def _batch_norm(w: Weights, node: NodeProto) -> nn.Module:
    if attribute(node, "training_mode", 0) or len([o for o in node.output if o]) > 1:
        raise w.file.error(node, "is in training mode; export the network in eval mode")
    scale, bias = w.parameter(node, 1), w.parameter(node, 2)
    mean, variance = (torch.from_numpy(np.array(w.constant(node, i), np.float32)) for i in (3, 4))
    layer = BatchNorm(len(mean), attribute(node, "epsilon", 1e-5), 1 - attribute(node, "momentum", 0.9))
    equip(layer, scale, bias)
    layer.running_mean, layer.running_var = mean, variance
    return layer


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm in any number of dimensions."""

    one_operation = True

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm of a tensor of shape {tuple(input.shape)}")


class LayerNorm(nn.LayerNorm):
    """Over the dimensions of its weight; the file's axis says where they begin."""

    one_operation = True


def _layer_norm(w: Weights, node: NodeProto) -> nn.Module | None:
    scale, bias = w.parameter(node, 1), w.parameter(node, 2)
    axis = attribute(node, "axis", -1)
    if scale is None or (axis < 0 and scale.ndim != -axis) or len([o for o in node.output if o]) > 1:
        return None
    layer = LayerNorm(scale.shape, attribute(node, "epsilon", 1e-5), bias=bias is not None)
    return equip(layer, scale, bias)


def _rms_norm(w: Weights, node: NodeProto) -> nn.Module | None:
    scale, axis = w.parameter(node, 1), attribute(node, "axis", -1)
    if scale is None or (axis < 0 and scale.ndim != -axis):
        return None
    layer = nn.RMSNorm(scale.shape, attribute(node, "epsilon", 1e-5))
    layer.weight = scale
    return layer


def _prelu(w: Weights, node: NodeProto) -> nn.Module | None:
    slope = w.parameter(node, 1)
    if slope is None or slope.numel() not in (1, *slope.shape[:1]) or (slope.ndim == 1 and slope.numel() > 1):
        return None  # one number for each place of the last dimension
    layer = nn.PReLU(slope.numel())
    layer.weight = slope if slope.ndim == 1 else nn.Parameter(slope.detach().flatten())
    return layer


LAYERS: dict[str, Callable[[Weights, NodeProto], nn.Module | None]] = {
    "Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": lambda w, n: linear(w, n, False),
    "BatchNormalization": _batch_norm, "LayerNormalization": _layer_norm, "RMSNormalization": _rms_norm,
    "PRelu": _prelu,
}  # fmt: skip
"""By operation: None where the node is not a layer (a product of two activations)."""
