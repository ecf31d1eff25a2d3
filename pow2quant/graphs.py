"""What is asked of an ONNX graph again and again: producers, readers, constants and shapes, read once."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

if TYPE_CHECKING:
    from numpy.typing import NDArray


class GraphIndex:
    """A graph that is not changed any more, by the names of its tensors. Everything is read when it is first asked."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph

    @cached_property
    def parameters(self) -> dict[str, onnx.TensorProto]:
        """The initializers."""
        return {tensor.name: tensor for tensor in self.graph.initializer}

    @cached_property
    def constants(self) -> dict[str, NDArray[Any]]:
        """The values of initializers and of Constant nodes that hold a tensor."""
        found = {name: numpy_helper.to_array(tensor) for name, tensor in self.parameters.items()}
        for node in self.graph.node:
            tensors = [a.t for a in node.attribute if a.name == "value"]
            if node.op_type == "Constant" and tensors:
                found[node.output[0]] = numpy_helper.to_array(tensors[0])
        return found

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that computes a tensor."""
        return {name: node for node in self.graph.node for name in node.output if name}

    @cached_property
    def order(self) -> dict[str, int]:
        """The place of an initializer among the initializers, and of a computed tensor's node among the nodes."""
        found = {name: i for i, name in enumerate(self.parameters)}
        return found | {name: i for i, node in enumerate(self.graph.node) for name in node.output if name}

    @cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read a tensor, a node once for every input."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in filter(None, node.input):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def inputs(self) -> dict[str, int]:
        """The types of the graph's inputs, by ONNX number."""
        return {value.name: value.type.tensor_type.elem_type for value in self.graph.input}

    @cached_property
    def outputs(self) -> set[str]:
        """The names of the graph's results."""
        return {value.name for value in self.graph.output}

    @cached_property
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Shapes as far as the graph states them; None: a free dimension."""
        found: dict[str, tuple[int | None, ...]] = {name: np.shape(v) for name, v in self.constants.items()}
        for value in (*self.graph.input, *self.graph.value_info, *self.graph.output):
            if value.type.tensor_type.HasField("shape"):
                dims = value.type.tensor_type.shape.dim
                found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
        return found
