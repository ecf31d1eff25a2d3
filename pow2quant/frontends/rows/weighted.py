"""Convolutions and linear layers."""

from __future__ import annotations

from torch import nn

from pow2quant.frontends.writing import Node, OnnxGraph, Operator, Rows, pads_of


def _weighted_inputs(node: Node) -> list[str]:
    return [
        node.inputs[0],
        node.parameters["weight"],
        *([node.parameters["bias"]] if "bias" in node.parameters else []),
    ]


def conv_pads(module: nn.Conv1d | nn.Conv2d) -> tuple[list[int], list[int]]:
    """Zeros in front of and behind every spatial dimension, also for padding="same"."""
    if module.padding == "valid":
        return [0] * len(module.kernel_size), [0] * len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [t // 2 for t in total], [t - t // 2 for t in total]
    pads = [int(p) for p in module.padding]
    return pads, pads


def _conv(module: nn.Conv2d, node: Node, graph: OnnxGraph) -> None:
    graph.node(
        "Conv",
        _weighted_inputs(node),
        node.output,
        node.name,
        kernel_shape=list(module.kernel_size),
        strides=list(module.stride),
        pads=pads_of(*conv_pads(module)),
        dilations=list(module.dilation),
        group=module.groups,
    )


def _conv_transpose(module: nn.ConvTranspose2d, node: Node, graph: OnnxGraph) -> None:
    pads = [int(p) for p in module.padding]
    graph.node(
        "ConvTranspose",
        _weighted_inputs(node),
        node.output,
        node.name,
        kernel_shape=list(module.kernel_size),
        strides=list(module.stride),
        pads=pads_of(pads, pads),
        output_padding=[int(p) for p in module.output_padding],
        dilations=list(module.dilation),
        group=module.groups,
    )


def _linear(module: nn.Linear, node: Node, graph: OnnxGraph) -> None:
    graph.node("Gemm", _weighted_inputs(node), node.output, node.name, transB=1)


ROWS: Rows = {
    nn.Conv1d: Operator("Conv", _conv, integers=True, proved=True),
    nn.Conv2d: Operator("Conv", _conv, integers=True, proved=True),
    nn.ConvTranspose1d: Operator("ConvTranspose", _conv_transpose, integers=True, proved=True),
    nn.ConvTranspose2d: Operator("ConvTranspose", _conv_transpose, integers=True, proved=True),
    nn.Conv3d: Operator("Conv", _conv, proved=True),
    nn.ConvTranspose3d: Operator("ConvTranspose", _conv_transpose, proved=True),
    nn.Linear: Operator("Gemm", _linear, integers=True, proved=True),
}
