"""What is not the same in the networks of two files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from pow2quant.functions import definition
from pow2quant.integer.nodes import attribute

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact


@dataclass(frozen=True)
class Named:
    """A network, and the executor whose it is."""

    name: str
    network: Artifact

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        """The initializers, and the tensors of Constant nodes, by name."""
        graph = self.network.model.graph
        nodes = [node for node in graph.node if node.op_type == "Constant"]
        found = {node.output[0]: a.t for node in nodes for a in node.attribute if a.name == "value"}
        return found | {tensor.name: tensor for tensor in graph.initializer}

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that computes a tensor."""
        return {name: node for node in self.network.model.graph.node for name in node.output}

    def stored(self, name: str) -> NDArray[Any]:
        """A constant as a file has it: codes, where it is encoded."""
        constant, encoding = numpy_helper.to_array(self.constants[name]), self.network.encodings.get(name)
        return constant if encoding is None else encoding.quantize(constant)


def first_difference(a: Named, b: Named) -> str | None:
    """The first thing that is not the same, inputs first, then in the order of computation; None where nothing is."""
    graph = a.network.model.graph
    ends = _ends_differ(a, b)
    return next(ends, None) or next(differences(a, b, [value.name for value in graph.input], graph.node), None)


def _ends_differ(a: Named, b: Named) -> Iterator[str]:
    for what in ("input", "output"):
        x, y = (
            [v.name for v in getattr(side.network.model.graph, what) if v.name not in side.constants] for side in (a, b)
        )
        if x != y:
            yield f"the {what}s are {', '.join(x)} in {a.name} and {', '.join(y)} in {b.name}"


def differences(a: Named, b: Named, tensors: Iterable[str], nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """A sentence for whatever is not the same.

    That is: encodings of tensors; kind, attributes, operands in their order, and constants of nodes of `a`.
    """
    for name in tensors:
        yield from _encodings_differ(name, a, b)
    for node in nodes:
        if node.output[0] in a.constants:  # compared where it is read
            continue
        twin, title = b.producers.get(node.output[0]), node.name or node.output[0]
        if twin is None or (twin.op_type, twin.domain) != (node.op_type, node.domain):
            found = "missing" if twin is None else twin.op_type
            yield f"{title} is {node.op_type} in {a.name} and {found} in {b.name}"
            continue
        for name in sorted({attr.name for attr in (*node.attribute, *twin.attribute)}):
            x, y = (attribute(n, name, "the default") for n in (node, twin))
            if x != y:
                yield f"{name} of {title} is {_text(x)} in {a.name} and {_text(y)} in {b.name}"
        if definition(node) != definition(twin):
            yield f"{title} means other integers in {a.name} than in {b.name}"
        for n in range(max(len(node.input), len(twin.input))):
            mine, yours = (one.input[n] if n < len(one.input) else "" for one in (node, twin))
            if mine in a.constants and yours in b.constants:
                yield from _encodings_differ(mine, a, b)
                yield from _arrays_differ(mine, a.stored(mine), b.stored(yours), a, b)
            elif mine != yours:
                yield f"operand {n + 1} of {title} is {mine or 'none'} in {a.name} and {yours or 'none'} in {b.name}"
        if list(node.output) != list(twin.output):
            yield f"{title} gives {', '.join(node.output)} in {a.name} and {', '.join(twin.output)} in {b.name}"
        for name in node.output:
            yield from _encodings_differ(name, a, b)


def _encodings_differ(name: str, a: Named, b: Named) -> Iterator[str]:
    first, second = (side.network.encodings.get(name) for side in (a, b))
    if first is None or second is None:
        if first is not second:
            there, missing = (a, b) if second is None else (b, a)
            yield f"{name} has an encoding in {there.name} and none in {missing.name}"
        return
    yield from _arrays_differ(f"the scale of {name}", first.scale, second.scale, a, b)
    yield from _arrays_differ(f"the zero point of {name}", first.zero_point, second.zero_point, a, b)
    yield from _arrays_differ(f"the lower end of {name}", first.grid.qmin, second.grid.qmin, a, b)
    yield from _arrays_differ(f"the upper end of {name}", first.grid.qmax, second.grid.qmax, a, b)


def _arrays_differ(what: str, x: NDArray[Any], y: NDArray[Any], a: Named, b: Named) -> Iterator[str]:
    if x.shape != y.shape:
        yield f"{what} has shape {x.shape} in {a.name} and {y.shape} in {b.name}"
    elif (x != y).any():
        at = tuple(np.argwhere(x != y)[0])
        index = f"[{', '.join(map(str, at))}]" if at else ""
        count = f" ({int((x != y).sum())} of {x.size} values)" if at else ""
        yield f"{what}{index} is {_text(x[at])} in {a.name} and {_text(y[at])} in {b.name}{count}"


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float | np.floating) else str(value)
