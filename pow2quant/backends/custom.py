"""The `custom` backend: pure PyTorch, lean, the reference for what a backend does."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pow2quant.artifact import Artifact, Site, Table
from pow2quant.backends.base import ALL, Batch, Tap, tapping
from pow2quant.backends.calibration import calibrate
from pow2quant.backends.export import to_artifact
from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.backends.placement import Placement, behind_clips, connect, place
from pow2quant.backends.target_rounding import TargetRounding
from pow2quant.backends.wide_sums import WideSums, largest_sum, wide_sums
from pow2quant.config import QuantPlan
from pow2quant.errors import ConfigError, EncodingError
from pow2quant.frontends import modules as m
from pow2quant.frontends.copies import copied
from pow2quant.frontends.modules import CONVOLUTIONS
from pow2quant.frontends.writing import many


class QuantizedLayer(nn.Module):
    """A weighted module that computes with fake-quantized weight and bias; its own stay float parameters.

    source: the quantizer of its input, where its result goes to a quantizer too: then sums that float32 may not hold
    are exact, and the result is float64.
    """

    source: FakeQuantize | None = None

    def __init__(self, layer: nn.Module, weight: FakeQuantize | None, bias: FakeQuantize | None) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in vars(layer).items() if not k.startswith("_")})
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.bias_quantizer = weight, bias
        object.__setattr__(self, "layer", layer)  # its configuration; the parameters are registered once, above
        self._known: tuple[tuple[Any, ...], WideSums | None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self.layer),), self.__dict__

    def forward(self, x: Tensor) -> Tensor:
        weight: Any
        bias: Any
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        bias = self.bias if self.bias_quantizer is None else self.bias_quantizer(self.bias)
        how = self._wide_sums(weight, bias)
        return self._layer(x, weight, bias) if how is None else how.of(self._layer, x, weight, bias)

    def _layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer: Any = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(layer, CONVOLUTIONS):
            convolved: Tensor = layer._conv_forward(x, weight, bias)
            return convolved
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
        transposed: Tensor = convolve(
            x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        )
        return transposed

    def _wide_sums(self, weight: Tensor, bias: Tensor | None) -> WideSums | None:
        """How sums become exact that float32 may not hold; None where it does. Training does without."""
        layer: Any = self.layer
        source, own = self.source, self.weight_quantizer
        if self.training or source is None or source.encoding is None or own is None or own.encoding is None:
            return None
        seen = weight, bias, source.encoding, own.encoding
        if self._known is not None and all(a is b for a, b in zip(self._known[0], seen, strict=True)):
            return self._known[1]
        how = wide_sums(layer, weight, bias, source.encoding, own.encoding)
        results = any(x is not None and x.grad_fn is not None for x in (weight, bias))  # a copy cannot hold these
        self._known = None if results else (seen, how)
        return how

    def largest_sum(self) -> float | None:
        """No accumulator is beyond it, in units of s_in * s_w; None without the encodings of input and weight."""
        source, own = self.source, self.weight_quantizer
        if source is None or source.encoding is None or own is None or own.encoding is None:
            return None
        layer: Any = self.layer
        with torch.no_grad():
            bias: Any = self.bias
            bias = bias if bias is None or self.bias_quantizer is None else self.bias_quantizer(bias)
            return largest_sum(layer, own(self.weight), bias, source.encoding, own.encoding)

    def extra_repr(self) -> str:
        return repr(self.layer)


@cache
def layer_class(kind: type) -> type[QuantizedLayer]:
    """The class of quantized layers of a kind, such as `nn.Conv2d`: they are instances of it, with its attributes."""
    return type(f"Quantized{kind.__name__}", (QuantizedLayer, kind), {})


def _empty(kind: type) -> QuantizedLayer:
    return object.__new__(layer_class(kind))


SUMS = (m.Add, m.Sub, m.Mul, m.MatMul, m.Mean, m.Sum, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
"""Operations that are computed in float64 where an operand has more than 8 bits, and all have quantizers."""


def _unit(operands: Sequence[FakeQuantize], finest: bool) -> Callable[[], Any]:
    """The exponents in which an accumulator counts: those of the operands added up, or the finest of them."""

    def exponents() -> Any:
        found = [np.asarray(q.encoding.per_channel.exponent) for q in operands if q.encoding is not None]
        return np.min(found, 0) if finest else sum(found, np.zeros((), np.int64))

    return exponents


def _count_averaged(module: nn.Module, rounding: TargetRounding) -> None:
    """Notes at every call of how many values an average is. Raises ConfigError where that depends on the place."""
    if any(many(getattr(module, "padding", 0), 1)) and not getattr(module, "count_include_pad", True):
        raise ConfigError(f"{module}: the divisor depends on the place, which rounding {rounding.rule} cannot do")
    kernel = getattr(module, "kernel_size", None)

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        spatial = args[0].ndim - 2
        rounding.count = args[0].numel() // output.numel() if kernel is None else math.prod(many(kernel, spatial))

    module.register_forward_hook(note)


class CustomSimulation:
    """Pure PyTorch: fake quantization written into the graph (see `backends.base.Simulation` for every member).

    network: prepared, batch norm folded; not changed. example: one batch. plan: what is quantized and how.
    """

    def __init__(self, network: fx.GraphModule, example: Batch, plan: QuantPlan) -> None:
        self.placement: Placement = place(network, plan)
        self.sites: Sequence[Site] = self.placement.sites
        self.network = network
        self._quantizers: dict[str, FakeQuantize] = {}
        model = copied(network)
        self._wrap_layers(model)
        self._widen(model)
        self._insert_quantizers(model)
        self._tell_layers(model)
        self._tell_roundings(model)
        connect(model, network, self.placement, self._quantizers)
        self.model: fx.GraphModule = model

    def _wrap_layers(self, model: fx.GraphModule) -> None:
        for layer in self.placement.layers:
            weight, bias = (self._quantizer(s, caches=True) if s else None for s in (layer.weight, layer.bias))
            module = model.get_submodule(layer.module)
            kind: Any = type(module)
            model.set_submodule(layer.module, layer_class(kind)(module, weight, bias))

    def _widen(self, model: fx.GraphModule) -> None:
        """Lets layers and sums use float64 where float32 may not hold what a quantizer then rounds."""
        specs, carried = self.placement.specs, self.placement.carried
        nodes = {node.name: node for node in model.graph.nodes}
        for source in [n for n in self.network.graph.nodes if n.name in self.placement.rounded]:
            node = nodes[source.name]
            summed = source.op == "call_module" and isinstance(self.network.get_submodule(str(source.target)), SUMS)
            sites = [carried[a.name] for a in source.args if isinstance(a, fx.Node)]
            if summed and all(sites) and any(specs[s.name].bits > 8 for s in sites if s):
                for operand in [a for a in node.args if isinstance(a, fx.Node) and a.target != "double"]:
                    with model.graph.inserting_before(node):
                        node.replace_input_with(operand, model.graph.call_method("double", (operand,)))

    def _tell_layers(self, model: fx.GraphModule) -> None:
        """Tells the layers whose results are rounded what quantizes their inputs."""
        targets = {str(n.target) for n in self.network.graph.nodes if n.name in self.placement.rounded}
        for layer in self.placement.layers:
            if layer.input is not None and layer.module in targets:
                source = self._quantizers[layer.input.name]
                object.__setattr__(model.get_submodule(layer.module), "source", source)

    def _insert_quantizers(self, model: fx.GraphModule) -> None:
        graph = model.graph
        for node in list(graph.nodes):
            site = self.placement.quantized.get(node.name)
            if site is None:
                continue
            self._overwrite_fused_result(model, node)
            name = f"{node.name}_quantizer"
            model.add_submodule(name, self._quantizer(site, overwrites=bool(node.args)))
            with graph.inserting_after(node):
                quantized = graph.call_module(name)
            node.replace_all_uses_with(quantized)
            quantized.args = (node,)
        model.recompile()

    def _overwrite_fused_result(self, model: fx.GraphModule, node: fx.Node) -> None:
        """A ReLU that shares its quantizer with the operation in front is that result's only reader."""
        if node.args and getattr(node.args[0], "name", None) in self.placement.fused:
            module = model.get_submodule(str(node.target))
            if hasattr(module, "inplace"):
                module.inplace = True  # type: ignore[assignment]

    def _quantizer(self, site: Site, **options: bool) -> FakeQuantize:
        rule = self.placement.roundings.get(site.name)
        rounding = None if rule is None else TargetRounding(rule)
        self._quantizers[site.name] = FakeQuantize(site, **options, rounding=rounding)
        return self._quantizers[site.name]

    def _tell_roundings(self, model: fx.GraphModule) -> None:
        """Tells the quantizers whose rule looks at accumulators in which units these count."""
        layers = {layer.module: layer for layer in self.placement.layers}
        for node in self.network.graph.nodes:
            site = self.placement.quantized.get(node.name)
            rounding = None if site is None else self._quantizers[site.name].rounding
            if rounding is None or rounding.rule != "gemmlowp":
                continue
            core = behind_clips(self.network, node, self.placement.carried)
            module, layer = model.get_submodule(str(core.target)), layers.get(str(core.target))
            sources = [self.placement.carried[a.name] for a in core.args if isinstance(a, fx.Node)]
            units = [*sources, *([layer.weight] if layer is not None else [])]
            finest = isinstance(module, (m.Add, m.Sub, m.Concat, m.Maximum, m.Minimum))
            rounding.unit = _unit([self._quantizers[unit.name] for unit in units if unit is not None], finest)
            rounding.axis = -1 if layer is not None and isinstance(module.layer, nn.Linear) else 1
            if isinstance(module, (m.Mean, nn.AvgPool1d, nn.AvgPool2d)):
                _count_averaged(module, rounding)

    def adopt(self, plan: QuantPlan) -> None:
        """Takes another plan of the same network, whose quantizers are some of those that were made.

        Sites that it leaves out have no encoding from then on. Raises ConfigError for sites that were never made.
        """
        placement = place(self.network, plan)
        for site in placement.sites:
            if site.name not in self._quantizers:
                raise ConfigError(f"{site.name}: it has no quantizer; the plan of the simulation has to say so")
        for name, quantizer in self._quantizers.items():
            if name not in placement.specs:
                quantizer.encoding = None
        self.placement, self.sites = placement, placement.sites
        self._widen(self.model)
        self.model.recompile()

    def parameter(self, name: str) -> Tensor:
        """The float weight or bias of a module, by `<module>.weight` or `<module>.bias`."""
        return self.model.get_parameter(name)

    def calibrate(self, batches: Iterable[Batch], roles: Collection[str] = ALL) -> Table:
        return calibrate(self, batches, roles)

    def encodings(self) -> Table:
        return {name: q.encoding for name, q in self._quantizers.items() if q.encoding is not None}

    def load(self, table: Table) -> None:
        """See `Simulation.load`; sites that the table leaves out have no encoding afterwards."""
        foreign = sorted(set(table) - set(self.placement.specs))
        if foreign:
            raise EncodingError(
                f"{foreign[0]}: the network has no such site ({len(foreign)} of {len(table)} are unknown)"
            )
        for name, quantizer in self._quantizers.items():
            quantizer.encoding = table.get(name)

    def intercept(self, tap: Tap) -> AbstractContextManager[None]:
        """See `Simulation.intercept`. Taps do not nest: the inner one replaces the outer."""
        return tapping(self._quantizers.values(), tap)

    def export(self, example: Batch) -> Artifact:
        return to_artifact(self.network, self.placement, self.encodings(), self.parameter)
