"""One step of a recurrent network, cut out of the network that is written out over time.

All steps of a recurrent layer are alike, so the last one is the program of each: what it reads of the step before comes
in, and goes out for the next. Whatever lies in front of such a layer, behind it, or between two, has to compute the
steps of the sequence each for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from pow2quant.artifact import EVERY, RECURRENT, SEQUENCE, Artifact, Recurrent, recurrent_of
from pow2quant.errors import UnsupportedModelError
from pow2quant.graphs import GraphIndex
from pow2quant.integer.batch import Place, place_of
from pow2quant.integer.lower import lower
from pow2quant.integer.lowering import shapes_of, with_batch
from pow2quant.integer.nodes import attribute
from pow2quant.integer.run import run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.integer.batch import Found, Shapes
    from pow2quant.integer.program import Codes, Program

OUTPUT = ".output"
"""How the names of results end."""


def one_step(artifact: Artifact) -> Program:
    """The program of one step; its first inputs and outputs are those of the network, with one step of a sequence.

    Raises what `lower` raises; UnsupportedModelError, naming layer or tensor, where there is no such program.
    """
    cut = _Cut(artifact)
    program = lower(cut.artifact())
    return replace(program, states=tuple(zip(cut.states.values(), cut.after.values(), strict=True)))


def first_states(program: Program, samples: int) -> list[Codes]:
    """The codes (N, *shape) of the states before the first step: zeros."""
    tensors = [program.tensors[name] for name, _ in program.states]
    return [np.full((samples, *t.shape), t.zero, t.dtype) for t in tensors]


def advance(program: Program, inputs: Sequence[Codes], states: Sequence[Codes]) -> tuple[list[Codes], list[Codes]]:
    """One step: codes of the inputs and of the states -> codes of the results and of the next states."""
    found = run(program, [*inputs, *states])
    results = len(found) - len(states)
    return found[:results], found[results:]


def sequence(program: Program, inputs: Sequence[Codes]) -> list[Codes]:
    """All steps of one sequence, from zeros on: codes (steps, *shape) of the inputs -> of the results.

    inputs: at least those that are no states.
    """
    states, results = first_states(program, 1), []
    for step in range(len(inputs[0])):
        found, states = advance(program, [x[step : step + 1] for x in inputs[: -len(states)]], states)
        results.append(found)
    return [np.concatenate(column) for column in zip(*results, strict=True)]


class _Cut:
    """The last step of all layers.

    states: by the name of a state's tensor in the step before, what it is called as an input; after: as an output.
    instead: by the name of the part of a sequence that the step reads, the sequence, which has one step now.
    earlier: what belongs to other steps, by name. at: the layer, role and step of every tensor that has them.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.whole = artifact
        self.layers = recurrent_of(artifact.model)
        if not self.layers:
            raise UnsupportedModelError(
                "the network has no recurrent layer (LSTM, GRU, RNN), nor a loop of cells that pass their state on "
                "unchanged"
            )
        if reason := next((layer.whole for layer in self.layers if layer.whole), None):
            raise UnsupportedModelError(reason)
        if len({layer.steps for layer in self.layers}) > 1:
            lengths = ", ".join(f"{layer.layer}: {layer.steps}" for layer in self.layers)
            raise UnsupportedModelError(f"the recurrent layers have different lengths ({lengths})")
        self.model = with_batch(artifact.model, 1)
        self.index = GraphIndex(self.model.graph)
        self.at = {
            name: (layer.layer, role, time)
            for layer in self.layers
            for role, names in layer.tensors.items()
            for time, name in names.items()
            if role != EVERY
        }
        for layer in self.layers:
            self._require_alike(layer)
        last = self.layers[0].steps - 1
        self.states: dict[str, str] = {}
        self.after: dict[str, str] = {}
        for names in [names for layer in self.layers for names in layer.states]:
            name = names[-1].removesuffix(OUTPUT)
            self.states[names[last - 1]], self.after[names[last]] = name, f"{name}.next"
        self.earlier = {
            name: f"{layer.layer}: a result needs its step {time + 1} of {layer.steps}, not only the last one"
            for layer in self.layers
            for role, names in layer.tensors.items()
            for time, name in names.items()
            if time < last and role != EVERY and name not in self.states
        }
        parts = [layer.tensors[SEQUENCE].get(last) for layer in self.layers if SEQUENCE in layer.tensors]
        self.instead = {name: self.index.producers[name].input[0] for name in parts if name is not None}
        self.every = {name for layer in self.layers for name in layer.tensors.get(EVERY, {}).values()}

    def artifact(self) -> Artifact:
        """The step as a network of its own."""
        axes = self._axes()
        nodes, inputs = self._reached([*self.index.outputs, *self.after], set(self.states))
        model = onnx.ModelProto()
        model.CopyFrom(self.whole.model)
        graph = model.graph
        for field in (graph.node, graph.input, graph.value_info):
            del field[:]
        del model.metadata_props[:]
        model.metadata_props.extend(e for e in self.whole.model.metadata_props if e.key != RECURRENT)
        for value in self.whole.model.graph.input:
            if value.name in inputs:
                graph.input.add().CopyFrom(value)
                if value.name in axes:
                    graph.input[-1].type.tensor_type.shape.dim[axes[value.name]].dim_value = 1
        encodings, shapes = dict(self.whole.encodings), shapes_of(self.model)
        for before, name in self.states.items():
            encodings[name] = encodings[before]
            graph.input.append(
                helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shapes[before][1:]])
            )
        names = self.states | self.instead
        for node in nodes:
            made = graph.node.add()
            made.CopyFrom(node)
            made.input[:] = [names.get(name, name) for name in self._read(node)]
            if (shape := self.reshaped.get(node.output[0])) is not None:
                made.input[1] = f"{node.output[0]}.shape"
                graph.initializer.append(numpy_helper.from_array(shape, made.input[1]))
        for (last, after), name in zip(self.after.items(), self.states.values(), strict=True):
            graph.node.append(helper.make_node("Concat", [last], [after], after, axis=1))
            graph.output.append(helper.make_tensor_value_info(after, onnx.TensorProto.FLOAT, None))
            encodings[after] = encodings[name]
        return Artifact(model, encodings)

    def _require_alike(self, layer: Recurrent) -> None:
        """Raises UnsupportedModelError where a step is not computed as the last one is, or the first state is not zero.

        The note in the file is not relied on: what it says of a tensor is compared with how the graph computes it.
        """
        last = layer.steps - 1
        for role, names in layer.tensors.items():
            steps = {last} if role == EVERY else set(range(layer.steps))
            if set(names) - {-1} != steps:
                raise UnsupportedModelError(f"{layer.layer}: {role!r} is noted for the steps {sorted(names)}")
            for time, name in names.items():
                if time < 0:
                    same = self._is_zero(name) and self.whole.encodings.get(name) == self.whole.encodings.get(
                        names[last]
                    )
                elif role == SEQUENCE:
                    same = self._is_part(name, names[last], time)
                elif role == EVERY:
                    same = self._joins(name)
                else:
                    same = time == last or self._computed_alike(name, names[last], last - time)
                if not same:
                    raise UnsupportedModelError(
                        f"{name}: differs from {names[last]}, so the steps of {layer.layer} are not alike"
                    )

    def _is_zero(self, name: str) -> bool:
        node, constants = self.index.producers.get(name), self.index.constants
        return (
            node is not None
            and node.op_type == "Mul"
            and any(not constants.get(n, np.ones(1)).any() for n in node.input)
        )

    def _is_part(self, name: str, last: str, time: int) -> bool:
        """Whether a tensor is one step of the sequence of which another is the last step."""
        node, other = self.index.producers.get(name), self.index.producers.get(last)
        if node is None or other is None or node.op_type != "Slice" or node.input[0] != other.input[0]:
            return False
        starts, ends, axes, steps = (self.index.constants.get(n, np.empty(0)).tolist() for n in node.input[1:5])
        own = self.index.constants.get(other.input[3], np.empty(0)).tolist()
        return (starts, ends, axes, steps) == ([time], [time + 1], own, [1])

    def _joins(self, name: str) -> bool:
        """Whether a tensor holds the results of all steps in order."""
        node = self.index.producers.get(name)
        if node is None or node.op_type != "Concat":
            return node is not None and node.op_type == "Reshape"
        last = len(node.input) - 1
        return all(self._alike(part, node.input[last], last - time) for time, part in enumerate(node.input))

    def _alike(self, first: str, second: str, apart: int) -> bool:
        """Whether a tensor is in its step what another is so many steps behind it."""
        constants, table = self.index.constants, self.whole.encodings
        if first in constants or second in constants:
            same = first in constants and second in constants and np.array_equal(constants[first], constants[second])
            return same and table.get(first) == table.get(second)
        if first not in self.at and second not in self.at:
            return self._computed_alike(first, second, apart)
        (layer, role, time), other = self.at.get(first, ("", "", 0)), self.at.get(second)
        return other == (layer, role, time + apart)

    def _computed_alike(self, first: str, second: str, apart: int) -> bool:
        """Whether tensors are computed by the same operation, from operands that are `_alike`."""
        node, other, table = self.index.producers.get(first), self.index.producers.get(second), self.whole.encodings
        if node is None or other is None or node.op_type != other.op_type or table.get(first) != table.get(second):
            return False
        attributes = [sorted(a.SerializeToString(deterministic=True) for a in n.attribute) for n in (node, other)]
        if attributes[0] != attributes[1] or len(node.input) != len(other.input):
            return False
        return all(self._alike(a, b, apart) for a, b in zip(node.input, other.input, strict=True))

    def _read(self, node: onnx.NodeProto) -> list[str]:
        """What a node reads in a step: of all results in one tensor there is the last one only."""
        joins = node.output[0] in self.every and node.op_type == "Concat"
        return list(node.input[-1:]) if joins else list(node.input)

    def _reached(self, ends: Iterable[str], starts: set[str]) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes between, in order, and the inputs of the network that they read.

        Raises UnsupportedModelError where an earlier step is among them.
        """
        found, inputs, seen, pending = set[int](), set[str](), set(starts), list(ends)
        while pending:
            name = pending.pop()
            if name in seen or not name or name in self.index.constants:
                continue
            seen.add(name)
            if name in self.earlier:
                raise UnsupportedModelError(self.earlier[name])
            if name in self.instead:
                pending.append(self.instead[name])
            elif (node := self.index.producers.get(name)) is None:
                inputs.add(name)
            else:
                found.add(id(node))
                pending += self._read(node)
        return [node for node in self.model.graph.node if id(node) in found], inputs

    def _axes(self) -> dict[str, int]:
        """The dimension of time of the network's input that holds the sequence.

        Raises UnsupportedModelError where steps are not computed each for itself.
        """
        shapes = shapes_of(self.model)
        wanted = {
            sequence: int(self.index.constants[self.index.producers[part].input[3]].reshape(-1)[0])
            for part, sequence in self.instead.items()
        }
        inside = {name for layer in self.layers for names in layer.tensors.values() for name in names.values()}
        starts = inside - self.instead.keys()
        nodes, inputs = self._reached([*wanted, *self.index.outputs], starts)
        timed = {name: attribute(self.index.producers[name], "axis", 0) for name in self.every if name in starts}
        candidates = [
            {name: axis}
            for name in sorted(inputs)
            for axis, size in enumerate(shapes[name])
            if axis and size == self.layers[0].steps
        ]
        reason = "no input has a dimension of as many steps"
        for candidate in candidates or ([{}] if not wanted else []):
            found = self._followed(
                nodes, {name: a % len(shapes[name]) for name, a in (timed | candidate).items()}, shapes
            )
            wrong = {n: found.get(n) for n, axis in wanted.items() if found.get(n) != Place(axis)}
            wrong |= {n: place for n in self.index.outputs if isinstance(place := found.get(n), str)}
            if not wrong:
                return candidate
            reason = next((p for p in wrong.values() if isinstance(p, str)), "its steps lie elsewhere")
        raise UnsupportedModelError(f"{self.layers[0].layer}: cannot go step by step: {reason}")

    def _followed(self, nodes: Sequence[onnx.NodeProto], axes: Mapping[str, int], shapes: Shapes) -> dict[str, Found]:
        """Where time lies in every tensor that the nodes compute.

        Notes in `reshaped`, for a Reshape by its result, the shape that it makes of one step.
        """
        found: dict[str, Found] = {name: Place(axis) for name, axis in axes.items()}
        self.reshaped: dict[str, NDArray[np.int64]] = {}
        one, two = (
            {
                n: tuple(steps if axes.get(n) == d else size for d, size in enumerate(shape))
                for n, shape in shapes.items()
            }
            for steps in (1, 2)
        )
        for node in nodes:
            name, place = node.output[0], found.get(node.input[0])
            for steps, known in ((2, two), (1, one)):
                constants = {n: self.index.constants[n] for n in node.input if n in self.index.constants}
                if node.op_type == "Reshape" and isinstance(place, Place) and node.input[1] in constants:
                    constants[node.input[1]] = self._of_steps(node, place, shapes, steps)
                    self.reshaped[name] = constants[node.input[1]]
                known |= self._inferred(node, known, constants)
            found[name] = place_of(node, name, found, self.index.constants, one, two, "steps of a sequence")
        return found

    def _of_steps(self, node: onnx.NodeProto, place: Place, shapes: Shapes, steps: int) -> NDArray[np.int64]:
        """The shape that a Reshape makes of so many steps."""
        count, target = self.layers[0].steps, self.index.constants[node.input[1]].astype(np.int64)
        before, after = shapes[node.input[0]], shapes[node.output[0]]
        apart = place.inner * math.prod(before[place.axis + 1 :])
        for d, size in enumerate(after):
            inner, rest = divmod(apart, math.prod(after[d + 1 :]))
            if inner and not rest and size % (inner * count) == 0 and target[d] > 0:
                target[d] = size // count * steps
                break
        return target

    def _inferred(
        self, node: onnx.NodeProto, known: Shapes, constants: Mapping[str, NDArray[Any]]
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of a node's results."""
        kinds = self.index.inputs
        values = [
            helper.make_tensor_value_info(n, kinds.get(n, onnx.TensorProto.FLOAT), known.get(n))
            for n in dict.fromkeys(node.input)
            if n and n not in constants
        ]
        held = [numpy_helper.from_array(value, n) for n, value in constants.items()]
        graph = helper.make_graph([node], "node", values, [], initializer=held)
        model = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        shapes = shapes_of(onnx.shape_inference.infer_shapes(model, data_prop=True))
        return {name: shapes.get(name, ()) for name in node.output}
