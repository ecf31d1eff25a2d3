"""A tensor's exact result, from what stands in front of it: in float64, by the standard's reference evaluator.

Sums of products of codes are exact there up to 2^53.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pow2quant.integer.certificate import certify

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact
    from pow2quant.pow2_constraints import Encoding

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Values = Mapping[str, NDArray[np.float32]]

LINEAR = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "Add",
    "Sub",
    "Mul",
    "AveragePool",
    "GlobalAveragePool",
    "ReduceMean",
)
"""Operations whose terms' magnitudes add up to the operation's result for its inputs' magnitudes."""


@dataclass(frozen=True)
class Witness:
    """What one executor says about a tensor, and the network in its own file.

    values: real, (N, …). unfused: the values without graph optimizations, where the executor has them.
    """

    name: str
    network: Artifact
    values: NDArray[np.float32]
    unfused: Callable[[], NDArray[np.float32] | None] = field(default=lambda: None)


class Side:
    """One executor's codes of a tensor beside the exact result of its own network.

    u: the exact result in units of the scale, before a fused ReLU or clip. ends: between which codes these leave it.
    low, high: the same within the grid. correct: the codes that follow.
    """

    def __init__(self, tensor: str, witness: Witness, known: Values) -> None:
        self.tensor, self.witness = tensor, witness
        self.part = Part(witness.network, tensor, known)
        self.encoding = witness.network.encodings[tensor]
        self.scale, self.zero, qmin, qmax = (
            self.encoding.along(v, witness.values.shape)
            for v in (self.encoding.scale.astype(np.float64), self.encoding.zero_point, *grid_ends(self.encoding))
        )
        self.u: Floats = self.part.value(self.part.core_output) / self.scale
        if self.u.shape != witness.values.shape:
            raise ValueError(f"{tensor}: computed {self.u.shape}, {witness.name} has {witness.values.shape}")
        self.ends = [np.rint(self.part.behind_core(end) / self.scale) + self.zero for end in (-1e30, 1e30)]
        self.low, self.high = (np.clip(end, qmin, qmax).astype(np.int64) for end in self.ends)
        self.codes = self.coded_as(witness.values)
        self.correct = self.coded(np.rint(self.u))

    @property
    def name(self) -> str:
        return self.witness.name

    def coded(self, rounded: Floats) -> Ints:
        """Integers in units of the scale -> codes."""
        return np.asarray(np.clip(rounded + self.zero, self.low, self.high), np.int64)

    def gives(self, rounded: Floats) -> bool:
        """Whether these integers, the zero point added and saturated, are the executor's codes everywhere."""
        return bool((self.coded(rounded) == self.codes).all())

    def coded_as(self, values: NDArray[np.float32]) -> Ints:
        return np.asarray(np.rint(values / self.scale) + self.zero, np.int64)

    @cached_property
    def reason(self) -> str:
        """Why nothing is proved of the nodes between; "" where it is."""
        outputs = {name for node in self.part.nodes for name in node.output}
        layers = certify(self.witness.network).layers
        return next((layer.reason for layer in layers if layer.tensor in outputs and layer.reason), "")


class Part:
    """The nodes of a network between a tensor and the known ones in front of it, computed in float64."""

    def __init__(self, network: Artifact, tensor: str, known: Values) -> None:
        graph = network.model.graph
        self.network, self.tensor = network, tensor
        self.constants = {t.name: t for t in graph.initializer}
        self.inputs = {value.name for value in graph.input} - self.constants.keys()
        self.producers = {name: node for node in graph.node for name in node.output}
        self.known = {name: value for name, value in known.items() if name != tensor or name in self.inputs}
        self.values: dict[str, NDArray[Any]] = {}
        self.core = self.producers.get(tensor)
        self.core_output = tensor
        while self.core is not None and self.core.op_type in ("Relu", "Clip"):
            self.core_output = self.core.input[0]
            self.core = None if self.core_output in self.known else self.producers[self.core_output]
        self.nodes: list[onnx.NodeProto] = []
        if tensor not in self.inputs:
            self._collect(tensor)

    def _quantized(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """A value on its tensor's grid; the tensor in question is not rounded."""
        encoding = None if name == self.tensor else self.network.encodings.get(name)
        return value if encoding is None else _wide(encoding.fake_quantize(value))

    def _collect(self, name: str) -> None:
        node = self.producers[name]
        if node in self.nodes:
            return
        for source in filter(None, node.input):
            if source not in self.known and source not in self.constants:
                self._collect(source)
        self.nodes.append(node)

    def constant(self, name: str) -> NDArray[Any]:
        """An initializer."""
        return numpy_helper.to_array(self.constants[name])

    def value(self, name: str) -> NDArray[Any]:
        """A tensor's exact values; the tensor in question before it is rounded."""
        if name in self.constants:
            return _wide(self.constant(name))
        if name in self.known:
            known = self.known[name]  # a graph input as it is fed
            return _wide(self._quantized(name, known) if name in self.inputs else known)
        if name not in self.values:
            node = self.producers[name]
            results = _evaluate(node, [self.value(source) if source else None for source in node.input], self.network)
            self.values |= {output: self._quantized(output, x) for output, x in zip(node.output, results, strict=False)}
        return self.values[name]

    def behind_core(self, end: float) -> Floats:
        """What the fused ReLU and clip make of a value."""
        value: NDArray[Any] = np.array([end])
        name = self.core_output
        for node in self.nodes:
            if node.op_type in ("Relu", "Clip") and node.input[0] == name:
                rest = [self.value(source) if source else None for source in node.input[1:]]
                (value,), name = _evaluate(node, [value, *rest], self.network), node.output[0]
        return value

    def magnitude(self) -> NDArray[Any]:
        """By how much the terms of the core's result add up, their signs left aside."""
        core = self.core
        if core is None or core.op_type not in LINEAR:
            result = np.abs(self.value(self.core_output))
            inputs = [np.abs(self.value(name)) for name in (core.input if core else ()) if name not in self.constants]
            return np.asarray(np.maximum.reduce([result, *(x for x in inputs if x.shape == result.shape)]))
        node = onnx.NodeProto()
        node.CopyFrom(core)
        node.op_type = core.op_type.replace("Sub", "Add")
        operands = [_absolute(self.value(source)) for source in filter(None, core.input)]
        (result,) = _evaluate(node, operands, self.network)
        return result


def grid_ends(encoding: Encoding) -> tuple[Ints, Ints]:
    """The smallest and the largest code, in the shape of the scale: () or (C,)."""
    shape = encoding.scale.shape
    return np.broadcast_to(encoding.grid.qmin, shape), np.broadcast_to(encoding.grid.qmax, shape)


def _wide(value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float64) if value.dtype.kind == "f" else value


def _absolute(value: NDArray[Any]) -> NDArray[Any]:
    return np.abs(value) if value.dtype.kind == "f" else value


def _evaluate(node: onnx.NodeProto, values: Sequence[NDArray[Any] | None], network: Artifact) -> list[NDArray[Any]]:
    """A node's results, by the standard's reference."""
    feeds = {name: value for name, value in zip(node.input, values, strict=True) if value is not None}
    inputs, outputs = (
        [helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in filter(None, names)]
        for names in (dict.fromkeys(node.input), node.output)
    )
    graph = helper.make_graph([node], "node", inputs, outputs)
    model = helper.make_model(graph, opset_imports=network.model.opset_import)
    results: Any = ReferenceEvaluator(model).run(None, feeds)
    return [_wide(np.asarray(result)) for result in results]
