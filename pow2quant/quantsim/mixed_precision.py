"""AIMET's manual mixed precision on `custom`: widths of what modules read and of their weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from torch import fx, nn

from pow2quant.artifact import Site
from pow2quant.errors import ConfigError
from pow2quant.quantsim.attributes import quantized_modules
from pow2quant.saving import write

if TYPE_CHECKING:
    from pow2quant.quantsim.prepared import PreparedSim

Widths = str | Sequence[str | None] | None
"""A word for all tensors, or one for each; None: unchanged."""

BITS = {"int4": 4, "int8": 8, "int16": 16}
"""AIMET's words for widths."""


class MixedPrecisionConfigurator:
    """Collects what is asked for; `apply` sets it, and `compute_encodings` then chooses encodings of these widths.

    A tensor has one quantizer, where it is produced: its width is the same for all that read it. What has none, such as
    a result that the ReLU behind it quantizes, is left out.
    """

    def __init__(self, sim: PreparedSim) -> None:
        self._sim = sim
        self._nodes = {n.target: n for n in sim.simulation.network.graph.nodes if n.op == "call_module"}
        self._asked: dict[tuple[str, str], tuple[Site, int]] = {}

    def set_precision(
        self, arg: nn.Module | type[nn.Module], activation: Widths = None, param: Mapping[str, str] | None = None
    ) -> None:
        """Widths of a module of `sim.model`, of all in it, or of all of a type. For each module the last call counts.

        activation: "int4", "int8" or "int16", of its inputs. param: the same by parameter.
        Raises ConfigError where nothing that is meant has a quantizer, and for "fp16".
        """
        names, layers = self._modules(arg), {layer.module: layer for layer in self._sim.simulation.placement.layers}
        if activation is not None:
            for name in names:
                self._ask(name, [a for a in self._nodes[name].args if isinstance(a, fx.Node)], activation)
        for key, word in (param or {}).items():
            weights = {name: layers[name].weight for name in names if name in layers and key == "weight"}
            if not any(weights.values()):
                raise ConfigError(f"set_precision: {names[0]}: {key} has no quantizer; biases follow from the others")
            for name, site in weights.items():
                if site is not None:
                    self._asked[name, key] = site, _bits(word, f"{name}.{key}")

    def set_model_input_precision(self, activation: Widths) -> None:
        """The widths of the network's inputs."""
        graph = self._sim.simulation.network.graph
        self._ask("the model's input", [n for n in graph.nodes if n.op == "placeholder"], activation)

    def set_model_output_precision(self, activation: Widths) -> None:
        """The widths of the network's results."""
        (end,) = [n for n in self._sim.simulation.network.graph.nodes if n.op == "output"]
        self._ask("the model's output", end.all_input_nodes, activation)

    def apply(self, log_file: str | os.PathLike[str] | IO[str] = "./mmp_log.txt", strict: bool = True) -> None:
        """Sets the widths, and writes them to the log, a line for each quantizer.

        strict: raises ConfigError where a tensor is asked to have two widths; otherwise it takes the larger.
        """
        wanted: dict[Site, tuple[int, str]] = {}
        for (who, _), (site, bits) in self._asked.items():
            before, other = wanted.get(site, (bits, who))
            if strict and before != bits:
                why = "a tensor has one width (strict=False takes the larger)"
                raise ConfigError(f"{site.name}: {before} bits for {other} and {bits} bits for {who}; {why}")
            wanted[site] = max((before, other), (bits, who))
        for site, (bits, _) in wanted.items():
            self._sim.change(site, replace(self._sim.spec(site), bits=bits))
        text = "".join(f"{site.name}: {bits} bits, for {who}\n" for site, (bits, who) in wanted.items())
        if isinstance(log_file, (str, os.PathLike)):
            write(Path(log_file), text.encode())
        else:
            log_file.write(text)
        self._asked = {}

    def _modules(self, arg: nn.Module | type[nn.Module]) -> list[str]:
        """The modules with quantizers that are meant. Raises ConfigError where there are none."""
        known = {id(module): name for name, module in quantized_modules(self._sim.model)}
        if isinstance(arg, type):
            network = self._sim.simulation.network
            found = [name for name in known.values() if isinstance(network.get_submodule(name), arg)]
        else:
            found = [known[id(part)] for part in arg.modules() if id(part) in known]
        if not found:
            what = arg.__name__ if isinstance(arg, type) else type(arg).__name__
            raise ConfigError(f"set_precision: sim.model has no quantized module that is, or is in, {what}")
        return found

    def _ask(self, who: str, nodes: Sequence[fx.Node], widths: Widths) -> None:
        words = [widths] * len(nodes) if widths is None or isinstance(widths, str) else list(widths)
        if len(words) != len(nodes):
            raise ConfigError(f"{who}: {len(words)} widths for {len(nodes)} tensors")
        for index, (node, word) in enumerate(zip(nodes, words, strict=True)):
            site = self._sim.simulation.placement.carried[node.name]
            if word is not None and (bits := _bits(word, who)) and site is not None:
                self._asked[who, str(index)] = site, bits


def _bits(word: str, what: str) -> int:
    if word == "fp16":
        raise ConfigError(f'{what}: fp16: only integers are simulated; use backend="aimet"')
    if word not in BITS:
        raise ConfigError(f"{what}: {word!r} is not one of {', '.join(BITS)}")
    return BITS[word]
