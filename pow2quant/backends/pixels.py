"""Input in pixels: the normalization of images goes into the first layer, so that the network takes the camera's bytes.

A layer w on normalized images, (p / white - mean) / std with a mean and a deviation per channel, is the layer
w / (white std) on pixels p, its bias less the sum of that weight times white mean. Where the layer pads with zeros, the
pixels are padded with white mean of each channel, rounded to a pixel.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from pow2quant.backends.placement import tensor_name
from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.modules import CONVOLUTIONS, Concat, ConstantPad, Slice, ZeroPad
from pow2quant.frontends.operators import called
from pow2quant.frontends.rows.weighted import zeros_around

LARGEST = 255
"""The largest pixel: a byte's."""


def fold_normalization(
    network: fx.GraphModule, mean: Sequence[float], std: Sequence[float], white: int
) -> fx.GraphModule:
    """Folds a normalization into the convolutions that read the network's input, in place; returns the network.

    network: prepared, with batch norms folded. mean, std: one number, or one per channel, of pixels / white.
    Raises UnsupportedModelError, naming the operation, where one that reads the input is no convolution.
    """
    entries = [node for node in network.graph.nodes if node.op == "placeholder"]
    if len(entries) != 1:
        raise UnsupportedModelError(f"--input pixels: the network has {len(entries)} inputs; it is for one image")
    (image,) = entries
    channels = int(image.meta["shape"][1]) if len(image.meta["shape"]) > 2 else 0
    shift, step = (_per_channel(values, channels) for values in (mean, std))
    with torch.no_grad():
        for reader in list(image.users):
            pads, layer = _layer_behind(network, reader)
            _fold(network, layer, shift * white, step * white)
            _pad(network, image, layer, reader, pads, (shift * white).round().clamp(0, LARGEST).tolist())
    network.graph.eliminate_dead_code()
    network.graph.lint()
    network.recompile()
    return network


def carriers(network: fx.GraphModule) -> set[str]:
    """The tensors that hold pixels in a network into which a normalization was folded."""
    nodes = [node for node in network.graph.nodes if node.op == "placeholder"]
    for node in network.graph.nodes:
        moves = isinstance(called(network, node), (Slice, ConstantPad, Concat))
        if moves and all(source in nodes for source in node.all_input_nodes):
            nodes.append(node)
    return {tensor_name(node) for node in nodes}


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    return torch.tensor(list(values) if len(values) == channels else [values[0]] * channels, dtype=torch.float64)


def _layer_behind(network: fx.GraphModule, reader: fx.Node) -> tuple[tuple[int, ...], fx.Node]:
    """The padding of zeros in front of a convolution, as `F.pad` takes it, and the convolution."""
    module = called(network, reader)
    if isinstance(module, ZeroPad) and len(reader.users) == 1 and not any(module.pads[4:]):
        (behind,) = reader.users
        pads, layer = _layer_behind(network, behind)
        own = (*module.pads, *[0] * len(pads))[: len(pads)]
        return tuple(a + b for a, b in zip(own, pads, strict=True)), layer
    if type(module) not in CONVOLUTIONS or module.padding_mode != "zeros":  # type: ignore[union-attr]
        what = "the result" if module is None else f"{reader.target} ({type(module).__name__})"
        raise UnsupportedModelError(
            f"--input pixels: {what} reads the network's input; only a convolution with zero padding can take the "
            "normalization: leave the option out, or begin the network with one"
        )
    return zeros_around(module), reader  # type: ignore[arg-type]


def _fold(network: fx.GraphModule, node: fx.Node, shift: Tensor, step: Tensor) -> None:
    """Makes a layer on (x - shift) / step one on x that does not pad; shift, step: (C,)."""
    layer = copy.copy(network.get_submodule(str(node.target)))
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    outputs, inputs = layer.weight.shape[:2]
    of = torch.arange(outputs)[:, None] // (outputs // layer.groups) * inputs + torch.arange(inputs)  # (C_out, C_in/g)
    weight = layer.weight.double() / step[of].reshape(outputs, inputs, *[1] * (layer.weight.ndim - 2))
    bias = -(weight.flatten(2).sum(2) * shift[of]).sum(1)
    bias = bias if layer.bias is None else bias + layer.bias.double()
    layer._parameters = {"weight": nn.Parameter(weight.float()), "bias": nn.Parameter(bias.float())}
    layer.padding = (0,) * len(layer.kernel_size)
    network.set_submodule(str(node.target), layer)


def _pad(
    network: fx.GraphModule,
    image: fx.Node,
    layer: fx.Node,
    reader: fx.Node,
    pads: tuple[int, ...],
    values: Sequence[float],
) -> None:
    """Puts in front of a layer a padding with another value for each channel: slices, pads, and a concatenation."""
    if not any(pads):
        layer.args = (image,)
        return
    name, parts = str(layer.target), []
    groups = [(0, len(values))] if len(set(values)) == 1 else [(c, c + 1) for c in range(len(values))]
    for start, stop in groups:
        part = image
        if len(groups) > 1:
            part = _call(network, layer, f"{name}_channel_{start}", Slice([(1, start, stop, 1)]), part)
        parts.append(_call(network, layer, f"{name}_pad_{start}", ConstantPad(pads, values[start]), part))
    joined = parts[0] if len(parts) == 1 else _call(network, layer, f"{name}_pixels", Concat(1), *parts)
    layer.args = (joined,)


def _call(network: fx.GraphModule, before: fx.Node, name: str, module: nn.Module, *sources: fx.Node) -> fx.Node:
    """A new step in front of a node, with its shape."""
    network.add_submodule(name, module)
    with network.graph.inserting_before(before):
        made = network.graph.call_module(name, sources)
    shapes = [torch.empty(source.meta["shape"], device="meta") for source in sources]
    made.meta = {"shape": tuple(module(*shapes).shape), "free": sources[0].meta["free"], "dtype": torch.float32}
    return made
