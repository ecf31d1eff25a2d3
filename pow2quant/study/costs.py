"""What a plan costs: bytes, average width, bit operations, and time by a table of a chip."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from torch import fx, nn

from pow2quant import config as configuration
from pow2quant.backends.placement import Layer, Placement
from pow2quant.config import ABOVE_ZERO, FROM_ZERO, Legal
from pow2quant.errors import ConfigError
from pow2quant.frontends.modules import TRANSPOSED
from pow2quant.pow2_constraints.encoding import block_shape
from pow2quant.study.candidates import CANDIDATES, Group, Plan
from pow2quant.study.program import Quantity

BIAS_BYTES, EXPONENT_BYTES = 4, 1

COSTS = ("size", "average_bits", "bops", "latency")

_PAIR = re.compile(r"(?P<weight>\w+)x(?P<input>\w+)")


@dataclass(frozen=True)
class LayerShape:
    """What a weighted layer's cost follows from.

    name: of the module. group: of its weight. source: the group of the activation that enters; None for one of a width
    that is not chosen, `source_bits`. weights: how many. macs: multiply-accumulates for one image. scales: how many.
    """

    name: str
    group: str
    source: str | None
    source_bits: int
    weights: int
    biases: int
    scales: int
    macs: int

    @property
    def given(self) -> str:
        """The name of the width that enters where it is not chosen."""
        return str(self.source_bits) if self.source_bits < 32 else "float32"

    def widths(self, plan: Plan) -> tuple[str, str]:
        """What a plan takes for the weight, and for the activation that enters."""
        return plan[self.group], plan[self.source] if self.source is not None else self.given


def layers_of(network: fx.GraphModule, placement: Placement, groups: Collection[Group]) -> tuple[LayerShape, ...]:
    """The weighted layers of a prepared network, in order of computation."""
    by_site = {name: group.name for group in groups for name in group.sites}
    nodes = {str(node.target): node for node in network.graph.nodes if node.op == "call_module"}
    found = []
    for layer in placement.layers:
        module: Any = network.get_submodule(layer.module)
        entering = None if layer.input is None else placement.leader(layer.input.name)
        bits = 32 if entering is None else placement.specs[entering].bits
        found.append(
            LayerShape(
                name=layer.module,
                group=by_site[f"{layer.module}.weight"],
                source=by_site.get(entering or ""),
                source_bits=bits,
                weights=module.weight.numel(),
                biases=0 if module.bias is None else module.bias.numel(),
                scales=_scales(module.weight.shape, layer),
                macs=macs(module, nodes[layer.module]),
            )
        )
    return tuple(found)


def _scales(shape: Sequence[int], layer: Layer) -> int:
    if layer.axis is None:
        return 1
    if layer.block is None:
        return shape[layer.axis]
    return math.prod(block_shape(shape, layer.axis, layer.block))


def macs(module: nn.Module, node: fx.Node) -> int:
    """Multiply-accumulates of a convolution or a linear layer for one image.

    Every result takes C_in / groups times the kernel's size; every input of a transposed convolution gives C_out /
    groups times that. A linear layer on (N, 64): 64 x C_out; on T tokens, which it sees as (N T, 64): T times that.
    """
    transposed = isinstance(module, TRANSPOSED)
    values = node.all_input_nodes[0].meta["shape"] if transposed else node.meta["shape"]
    entering = next(n for n in node.graph.nodes if n.op == "placeholder")
    weight: Any = module.weight
    return int(math.prod(values) * math.prod(weight.shape[1:])) // int(entering.meta["shape"][0])


def quantities(
    layers: Sequence[LayerShape], groups: Collection[Group], chip: Chip | None = None
) -> dict[str, Quantity]:
    """Every cost as a quantity of the integer program.

    size: bytes of packed weights, 32-bit biases and one byte per exponent. average_bits: per weight. bops: sum of
    macs x bits of the weight x bits of the input (Baskin et al. 2021, without the accumulator's term). latency:
    microseconds by the chip's table, where one is given.
    """
    by_name = {group.name: group for group in groups}
    bits = {g.name: np.array([CANDIDATES[name].bits for name in g.candidates], float) for g in groups}
    stored = {y.group: y for y in reversed(layers)}  # a weight that is used twice is stored once
    total = sum(layer.weights for layer in stored.values())
    size = {
        y.group: np.ceil(y.weights * bits[y.group] / 8) + BIAS_BYTES * y.biases + EXPONENT_BYTES * y.scales
        for y in stored.values()
    }
    found = {
        "size": Quantity(size, {}),
        "average_bits": Quantity({y.group: y.weights * bits[y.group] / total for y in stored.values()}, {}),
        "bops": _by_layer(layers, by_name, lambda y, w, a: y.macs * CANDIDATES[w].bits * CANDIDATES[a].bits),
    }
    if chip is not None:
        for name in set(chip.layers) - {layer.name for layer in layers}:
            raise ConfigError(f"layers.{name}: no such layer; layers: {', '.join(layer.name for layer in layers)}")
        found["latency"] = _by_layer(layers, by_name, chip.microseconds)
    return found


def _by_layer(layers: Sequence[LayerShape], groups: Mapping[str, Group], cost: Any) -> Quantity:
    singles: dict[str, Any] = {}
    pairs: dict[tuple[str, str], Any] = {}
    for layer in layers:
        weights = groups[layer.group].candidates
        sources = groups[layer.source].candidates if layer.source is not None else (layer.given,)
        values = np.array([[cost(layer, w, a) for a in sources] for w in weights], float)
        if layer.source is None or len(sources) == 1:
            singles[layer.group] = singles.get(layer.group, 0) + values[:, 0]
        else:
            key = (layer.group, layer.source)
            pairs[key] = pairs.get(key, 0) + values
    return Quantity(singles, pairs)


_TEXT = Legal(lambda: "text")
_RATES = Legal(lambda: "{4x8: NUMBER, 8x8: NUMBER, ...}: widths of weight and input")
_LAYERS = Legal(lambda: "{LAYER: {4x8: MICROSECONDS, ...}}: by layer, then by widths of weight and input")


@dataclass(frozen=True)
class Chip:
    """How long a layer takes for one image, by the widths of its weight and its input: `4x8`, `float32x8`.

    layers: microseconds, measured or known. Other layers take as long as the slower of multiplying and of reading the
    weights: macs_per_us, by widths, and weight_bytes_per_us (null: reading costs nothing); layer_us is added to each. A
    pair of widths that is not listed runs as the next wider one of the weight, then of the input; a float that is not
    listed is an error. name: for people.
    """

    name: Annotated[str, _TEXT] = "a chip"
    layers: Annotated[Mapping[str, Any], _LAYERS] = field(default_factory=dict)
    macs_per_us: Annotated[Mapping[str, Any], _RATES] = field(default_factory=dict)
    weight_bytes_per_us: Annotated[float | None, ABOVE_ZERO] = None
    layer_us: Annotated[float, FROM_ZERO] = 0.0

    def microseconds(self, layer: LayerShape, weight: str, entering: str) -> float:
        """A layer's time. weight, entering: candidates' names. Raises ConfigError, naming the key that is missing."""
        if layer.name in self.layers:
            return float(self._at(self.layers[layer.name], f"layers.{layer.name}", weight, entering))
        rate = self._at(self.macs_per_us, "macs_per_us", weight, entering)
        loaded = (
            layer.weights * CANDIDATES[weight].bits / 8 / self.weight_bytes_per_us if self.weight_bytes_per_us else 0
        )
        return max(layer.macs / float(rate), loaded) + self.layer_us

    def _at(self, values: Mapping[str, Any], key: str, weight: str, entering: str) -> Any:
        fits = [
            (_width(w), _width(a), value)
            for w, a, value in ((*name.split("x"), value) for name, value in values.items())
            if _holds(w, weight) and _holds(a, entering)
        ]
        if not fits:
            listed = ", ".join(values) or "nothing"
            raise ConfigError(f"{key}.{weight}x{entering}: missing, nor is a wider one there ({listed})")
        return min(fits)[2]


def load_chip(path: Path) -> Chip:
    """Reads a chip's table. Raises ConfigError that names the file and the key."""
    mapping = configuration.read(path)
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{path}: a mapping with keys of {', '.join(configuration.defaults(Chip))}")
    try:
        chip = configuration.parameters(Chip, mapping, "")
        for key, value in _entries(chip):
            _check(key, value)
        if not (chip.layers or chip.macs_per_us):
            raise ConfigError("neither layers nor macs_per_us: the table says nothing")
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('.')}") from None
    return chip


def _entries(chip: Chip) -> Iterator[tuple[str, Any]]:
    yield from ((f"macs_per_us.{name}", value) for name, value in chip.macs_per_us.items())
    for layer, values in chip.layers.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"layers.{layer}: {values!r} is not legal; legal: {{4x8: MICROSECONDS, ...}}")
        yield from ((f"layers.{layer}.{name}", value) for name, value in values.items())


def _check(key: str, value: Any) -> None:
    match = _PAIR.fullmatch(key.rpartition(".")[2])
    if match is None or not {match["weight"], match["input"]} <= CANDIDATES.keys():
        raise ConfigError(f"{key}: unknown key; widths of weight and input are known, such as 4x8 or float32x8")
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{key}: {value!r} is not legal; legal: a number above 0")


def _width(name: str) -> int:
    return CANDIDATES[name].bits


def _holds(listed: str, wanted: str) -> bool:
    """Whether what is listed can hold what is wanted: the same float, or as many bits."""
    if "float" in listed or "float" in wanted:
        return listed == wanted
    return _width(listed) >= _width(wanted)
