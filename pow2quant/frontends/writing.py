"""What a row of the table of modules is made of: the ONNX graph under construction, and who writes into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from torch import nn

from pow2quant.operators import OPERATIONS, Kind

OPSET = 21


@dataclass
class OnnxGraph:
    """An ONNX graph under construction."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def node(self, op: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> None:
        """Appends a node with one result."""
        self.nodes.append(onnx.helper.make_node(op, list(inputs), [output], name=name, **attributes))

    def constant(self, name: str, value: ArrayLike) -> str:
        """Adds an initializer and returns its name."""
        self.initializers.append(onnx.numpy_helper.from_array(np.array(value), name))
        return name


@dataclass(frozen=True)
class Node:
    """What an emitter needs to know of a node: names as in ONNX, shapes (of any one batch) as in PyTorch.

    parameters: the initializers of a layer, its weight first, by what the module calls them.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    shapes: tuple[tuple[int, ...], ...]
    parameters: dict[str, str]


Emit = Callable[[Any, Node, OnnxGraph], None]


@dataclass(frozen=True)
class Operator:
    """A row: which ONNX operation a module is (of several, the one that is quantized), and how it is written.

    own: how the module treats encodings, where that is not what the operation does.
    stored: the parameter whose values the result has; it is stored on the result's grid.
    clipped: it shares one quantizer with a ReLU or Clip behind it, as layers do.
    integers: the engine and C compute it, on integers alone. proved: the certificate proves that every executor gives
    the same result, where sums stay within its bounds; where it does not, the claim is "observed".
    """

    onnx: str
    emit: Emit
    stored: str | None = None
    own: Kind | None = None
    clipped: bool = False
    integers: bool = False
    proved: bool = False

    @property
    def kind(self) -> Kind:
        """How it treats encodings."""
        return self.own or OPERATIONS[self.onnx].kind


Rows = dict[type[nn.Module], Operator]


def plain(op: str, of: Callable[[Any], dict[str, Any]] = lambda _: {}, **attributes: Any) -> Emit:
    """One node of this type, with these attributes, and those that follow from the module."""
    return lambda module, node, graph: graph.node(op, node.inputs, node.output, node.name, **attributes, **of(module))


def many(value: Any, n: int) -> list[int]:
    """A number for each of n dimensions."""
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)] * n


def pads_of(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """ONNX's order: in front of every dimension, then behind."""
    return [int(p) for p in (*before, *after)]


class Formula:
    """Writes one module as several nodes: every call adds a node and returns its result's name."""

    def __init__(self, node: Node, graph: OnnxGraph) -> None:
        self.name, self.graph, self.count = node.name, graph, 0

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node of type `op`."""
        name = self._fresh(op)
        self.graph.node(op, inputs, name, name, **attributes)
        return name

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.graph.constant(self._fresh("number"), np.float32(value))

    def floats(self, values: ArrayLike) -> str:
        """A float32 array."""
        return self.graph.constant(self._fresh("values"), np.asarray(values, np.float32))

    def integers(self, values: ArrayLike) -> str:
        """An int64 array."""
        return self.graph.constant(self._fresh("integers"), np.asarray(values, np.int64))

    def _fresh(self, kind: str) -> str:
        self.count += 1
        return f"{self.name}.{kind.lower()}_{self.count}"


def formula(write: Callable[..., str]) -> Emit:
    """What `write(formula, module, *inputs)` returns becomes the module's result; its node gets the module's name."""

    def emit(module: nn.Module, node: Node, graph: OnnxGraph) -> None:
        write(Formula(node, graph), module, *node.inputs)
        graph.nodes[-1].output[0], graph.nodes[-1].name = node.output, node.name

    return emit
