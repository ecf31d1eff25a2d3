"""Convolutions and linear layers."""

from __future__ import annotations

from torch import nn

from pow2quant.frontends.writing import Emit, Node, OnnxGraph, Operator, Rows, pads_of


def conv_pads(module: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d) -> tuple[list[int], list[int]]:
    """Zeros in front of and behind every spatial dimension, also for padding="same"."""
    if module.padding == "valid":
        return [0] * len(module.kernel_size), [0] * len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [t // 2 for t in total], [t - t // 2 for t in total]
    pads = [int(p) for p in module.padding]
    return pads, pads


def zeros_around(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """A convolution's own padding as `torch.nn.functional.pad` takes it: the last dimension first."""
    sides = zip(*conv_pads(module), strict=True)
    return tuple(p for side in reversed(list(sides)) for p in side)


def _conv(op: str) -> Emit:
    def emit(module: nn.Conv2d | nn.ConvTranspose2d, node: Node, graph: OnnxGraph) -> None:
        attributes = {
            "kernel_shape": list(module.kernel_size),
            "strides": list(module.stride),
            "pads": pads_of(*conv_pads(module)),
            "dilations": list(module.dilation),
            "group": module.groups,
        }
        if op == "ConvTranspose":
            attributes["output_padding"] = [int(p) for p in module.output_padding]
        graph.node(op, [node.inputs[0], *node.parameters.values()], node.output, node.name, **attributes)

    return emit


def _linear(module: nn.Linear, node: Node, graph: OnnxGraph) -> None:
    graph.node("Gemm", [node.inputs[0], *node.parameters.values()], node.output, node.name, transB=1)


ROWS: Rows = {
    nn.Conv1d: Operator("Conv", _conv("Conv"), integers=True, proved=True),
    nn.Conv2d: Operator("Conv", _conv("Conv"), integers=True, proved=True),
    nn.ConvTranspose1d: Operator("ConvTranspose", _conv("ConvTranspose"), integers=True, proved=True),
    nn.ConvTranspose2d: Operator("ConvTranspose", _conv("ConvTranspose"), integers=True, proved=True),
    nn.Conv3d: Operator("Conv", _conv("Conv"), integers=True, proved=True),
    nn.ConvTranspose3d: Operator("ConvTranspose", _conv("ConvTranspose"), integers=True, proved=True),
    nn.Linear: Operator("Gemm", _linear, integers=True, proved=True),
}
