"""From an artifact to integers: `lower` turns an artifact into a program.

A node's result that has no encoding is not rounded, so it belongs to the next result that has one: convolution, ReLU
and clip become one step, and so does every function of a single tensor, however many nodes it takes, as a table.
Whatever else stays float has no integers, and is an error that names it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx

from pow2quant.errors import UnsupportedModelError
from pow2quant.functions import definition, inside_definitions, quotient, resampling
from pow2quant.integer.lowering import Lowering
from pow2quant.integer.nodes import title, without_integers
from pow2quant.integer.ops import LOWER, LOWER_DEFINED
from pow2quant.integer.ops.average import Average
from pow2quant.integer.ops.copy import Copy, fills_exactly
from pow2quant.integer.ops.resample import Resample
from pow2quant.integer.ops.table import SHAPED_LIKE_INPUT, lower_function, sources
from pow2quant.integer.program import Program, Step
from pow2quant.operators import MOVES, OPERATIONS, Kind, values
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN

if TYPE_CHECKING:
    from pow2quant.artifact import Artifact

INT64_HALF = 2**62
"""Sums stay within this, so that rounding and a zero point fit int64 too."""


def lower(artifact: Artifact) -> Program:
    """The artifact in integers.

    Raises UnsupportedModelError for a tensor that stays float or an operation without integers, NotPowerOfTwoError for
    a free scale, EncodingError for a parameter off its grid; each names the tensor or node.
    """
    graph = Lowering.of(artifact)
    graph.lower = lambda node, output: LOWER[node.op_type](graph, node, output, -math.inf, math.inf)
    inner = inside_definitions(graph.index, graph.encodings)
    for node in artifact.model.graph.node:
        if node.output[0] not in inner:
            _add(graph, node)
    return _program(graph)


def _program(graph: Lowering) -> Program:
    """What has been built. Raises UnsupportedModelError for an output that stays float, or sums beyond 64 bits."""
    for name in graph.outputs:
        if name not in graph.tensors:
            raise UnsupportedModelError(f"{name}: the network's output stays float and has no integers")
        graph.read(name)
    read = {*graph.inputs, *graph.outputs, *(name for step in graph.steps for name in (*step.inputs, step.output))}
    tensors = {name: tensor for name, tensor in graph.tensors.items() if name in read}
    program = Program(tensors, graph.inputs, graph.outputs, tuple(graph.steps), graph.pixels)
    for step in graph.steps:
        _require_64_bits(program, step)
    return program


def _add(graph: Lowering, node: onnx.NodeProto) -> None:
    """Lowers what ends at a node; a node whose result is not rounded waits for the next one."""
    if node.op_type == "Constant":
        return
    for name in node.output:
        source = node.input[0] if node.input else ""
        moves = source in graph.tensors and values(node.op_type) in MOVES
        if name not in graph.encodings and moves and fills_exactly(graph, node):
            graph.encodings[name] = graph.encodings[source]
    graph.rounding = HALF_EVEN
    if node.op_type in LOWER and OPERATIONS[node.op_type].kind is Kind.INDEX:
        graph.lower(node, node.output[0])
        return
    if not any(name in graph.encodings for name in node.output):
        return
    defined = definition(node)
    if defined is not None:
        LOWER_DEFINED[type(defined)](graph, node, defined)
        return
    core, source, low, high = _peeled(graph, node)
    output = node.output[0]
    graph.rounding = graph.target.rounding.of((node if core is None else core).op_type)
    if core is None:
        x, target = graph.read(source, rows=True), graph.declare(output)
        requantization = graph.requantization(x.exponent, target, low, high)
        graph.steps.append(Copy.whole(node.name or output, x, target, requantization))
    elif _is_function(graph, core):
        lower_function(graph, node, core, low, high)
    elif _reads_float(graph, core) and not any(
        known(graph.index, graph.encodings, core) for known in (resampling, quotient)
    ):
        raise UnsupportedModelError(f"{core.name}: is computed in float, in several steps, and has no integers")
    elif core.op_type in LOWER:
        LOWER[core.op_type](graph, core, output, low, high)
    else:
        raise UnsupportedModelError(without_integers(core, graph.encodings, graph.floats))


def _reads_float(graph: Lowering, node: onnx.NodeProto) -> bool:
    """Whether a node reads what another node of the same module computes and does not round."""
    data = {"Expand": node.input[:1], "Reshape": node.input[:1], "Where": node.input[1:]}.get(node.op_type, node.input)
    return any(n.startswith(f"{node.name}.") and n not in graph.floats and n not in graph.tensors for n in data)


def _peeled(graph: Lowering, node: onnx.NodeProto) -> tuple[onnx.NodeProto | None, str, float, float]:
    """The node behind fused ReLUs and clips (None: an encoded tensor), what they read, and the real ends of these."""
    source, low, high = "", -math.inf, math.inf
    current: onnx.NodeProto | None = node
    while current is not None and current.op_type in ("Relu", "Clip"):
        ends = _ends(graph, current)
        # the inner clip comes first, so the outer one's ends hold where they are narrower or beyond it
        low, high = min(max(ends[0], low), high), max(min(ends[1], high), low)
        source = current.input[0]
        current = None if source in graph.encodings else graph.producers.get(source)
    return current, source, low, high


def _ends(graph: Lowering, node: onnx.NodeProto) -> tuple[float, float]:
    if node.op_type == "Relu":
        return 0.0, math.inf
    names = (*node.input[1:], "", "")[:2]
    if any(name and name not in graph.floats for name in names):
        raise UnsupportedModelError(f"{title(node)}: its ends are computed, not constant")
    return (
        float(graph.floats[names[0]]) if names[0] else -math.inf,
        float(graph.floats[names[1]]) if names[1] else math.inf,
    )


def _is_function(graph: Lowering, core: onnx.NodeProto) -> bool:
    """Whether a node is a function of a single encoded tensor, element by element.

    Where both operands of a sum, product or quotient have encodings, it is computed instead, as is what a constant mask
    chooses.
    """
    divided = quotient(graph.index, graph.encodings, core) is not None
    if divided or (core.op_type in LOWER and all(name in graph.encodings for name in core.input)):
        return False
    if core.op_type == "Where" and core.input[0] in graph.floats:
        return False
    return core.op_type in SHAPED_LIKE_INPUT and len(sources(graph, core)) == 1


def _require_64_bits(program: Program, step: Step) -> None:
    """Raises UnsupportedModelError, naming the node, where a sum, or its shift to the left, may leave int64."""
    rule = step.rule
    # what divides shifts its sum before, so that its bound has the shift
    up = 0 if rule is None or isinstance(step, (Average, Resample)) else max(0, -int(np.min(rule.shift)))
    if (largest := step.bound(program) << up) > INT64_HALF:
        raise UnsupportedModelError(f"{step.node}: its sums may reach {largest}; integers go up to 2^62")
