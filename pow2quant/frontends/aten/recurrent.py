"""LSTM, GRU and plain recurrent networks, unrolled over the length of the example; every step shares its weights.

All steps are alike, the first too, whose state is computed zeros. `meta` says of which step a node is (`STEP`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pow2quant.artifact import EVERY, SEQUENCE
from pow2quant.frontends import modules as m
from pow2quant.frontends.builder import Builder, Handler, Parts
from pow2quant.frontends.captured import scope
from pow2quant.frontends.loops import Call
from pow2quant.frontends.modules import weighted
from pow2quant.frontends.unrolled import BACKWARD, STEP, Step


@dataclass
class Cell:
    """One layer in one direction, of a captured node.

    inner: the weight of the state, (gates * hidden, hidden). outer, bias: of the input; what both biases add together
    stands in `bias`, but for a GRU's third gate, whose state has its own, `apart`. made: the nodes of a step.
    """

    b: Builder
    node: fx.Node
    outer: Tensor
    inner: Tensor
    bias: Tensor | None
    apart: Tensor | None
    made: list[fx.Node] = field(default_factory=list)

    @classmethod
    def of(cls, b: Builder, node: fx.Node, weights: Sequence[Any], third: bool) -> Cell:
        """weights: w_ih, w_hh and, where there are, b_ih and b_hh. third: the third gate keeps the state's bias."""
        held = [b.parameter(node, w) for w in weights]
        if len(held) == 2:
            return cls(b, node, held[0], held[1], None, None)
        first, second = (p.detach() for p in held[2:])
        if not third:
            return cls(b, node, held[0], held[1], nn.Parameter(first + second), None)
        hidden = held[1].shape[1]
        own = second.clone()
        own[2 * hidden :] = 0
        apart = torch.cat([torch.zeros(2 * hidden), second[2 * hidden :]])
        return cls(b, node, held[0], held[1], nn.Parameter(first + own), nn.Parameter(apart))

    @property
    def hidden(self) -> int:
        """The size of the state."""
        return int(self.inner.shape[1])

    def linear(self, x: fx.Node, weight: Tensor, bias: Tensor | None, kind: str) -> fx.Node:
        """A layer on (N, C)."""
        return self.call(weighted.linear(weight, bias), x, kind=kind)

    def call(self, module: nn.Module, *args: fx.Node, kind: str | None = None) -> fx.Node:
        """A module of this cell."""
        self.made.append(self.b.call(self.node, module, *args, kind=kind))
        return self.made[-1]

    def gate(self, x: fx.Node, index: int) -> fx.Node:
        """The part of one gate of (N, gates * hidden)."""
        start = index * self.hidden
        return self.call(m.Slice([(1, start, start + self.hidden, 1)]), x, kind="gate")

    def zeros(self, x: fx.Node, kind: str) -> fx.Node:
        """A state of zeros (N, hidden), of what the input gives to the gates: computed, so that the batch is known."""
        return self.call(m.Scale(0.0, 0.0), self.gate(x, 0), kind=kind)

    def sum(self, x: fx.Node, state: fx.Node) -> fx.Node:
        """What the input and the state give to all gates."""
        return self.call(m.Add(), x, self.linear(state, self.inner, None, "state"))


State = tuple[fx.Node, ...]
"""Hidden state and, of an LSTM, cell."""

STATES = ("hidden", "cell")
"""What they are called."""


def _lstm_step(cell: Cell, x: fx.Node, state: State) -> State:
    gates = cell.sum(x, state[0])
    enter, forget, leave = (cell.call(nn.Sigmoid(), cell.gate(gates, i)) for i in (0, 1, 3))
    new = cell.call(m.Mul(), enter, cell.call(nn.Tanh(), cell.gate(gates, 2)))
    new = cell.call(m.Add(), cell.call(m.Mul(), forget, state[1]), new)
    return cell.call(m.Mul(), leave, cell.call(nn.Tanh(), new)), new


def _gru_step(cell: Cell, x: fx.Node, state: State) -> State:
    (hidden,) = state
    own = cell.linear(hidden, cell.inner, cell.apart, "state")
    sums = [cell.call(m.Add(), cell.gate(x, i), cell.gate(own, i)) for i in (0, 1)]
    reset, update = (cell.call(nn.Sigmoid(), s) for s in sums)
    inner = cell.call(m.Mul(), reset, cell.gate(own, 2))
    new = cell.call(nn.Tanh(), cell.call(m.Add(), cell.gate(x, 2), inner))
    rest = cell.call(m.Scale(-1.0, 1.0), update)
    kept = cell.call(m.Mul(), update, hidden)
    return (cell.call(m.Add(), cell.call(m.Mul(), rest, new), kept),)


def _plain_step(activation: type[nn.Module]) -> Callable[[Cell, fx.Node, State], State]:
    return lambda cell, x, state: (cell.call(activation(), cell.sum(x, state[0])),)


Advance = Callable[[Cell, fx.Node, State], State]
"""One step: (cell, what the input gives to the gates, state) -> the next state."""


def _cell(step: Advance, third: bool = False, pair: bool = False) -> Handler:
    """lstm_cell, gru_cell, rnn_tanh_cell: one step on (N, C). Calls of one cell share what was made of its biases."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node | Parts:
        weights = [w for w in (a.w_ih, a.w_hh, a.b_ih, a.b_hh) if w is not None]
        key = tuple(id(b.parameter(node, w)) for w in weights)
        if key not in b.cells:
            b.cells[key] = Cell.of(b, node, weights, third)
        cell = replace(b.cells[key], node=node, made=[])
        given = tuple(_state(b, node, h) for h in (a.hx if pair else [a.hx]))
        read = b.operand(node, a.input)
        x = cell.linear(read, cell.outer, cell.bias, "input")
        before = _first(cell, x, given)
        del cell.made[1:]  # zeros are no part of the step
        results = step(cell, x, before)
        b.calls.append(Call(scope(node) or node.name, cell.inner, read, given, before, results, tuple(cell.made)))
        return (lambda user, index: results[index]) if pair else results[0]

    return handler


def _first(cell: Cell, x: fx.Node, given: Sequence[fx.Node | None]) -> State:
    """The first state: as it is given, or zeros."""
    named = zip(given, STATES, strict=False)
    return tuple(cell.zeros(x, kind) if state is None else state for state, kind in named)


def _state(b: Builder, node: fx.Node, value: Any) -> fx.Node | None:
    """A state, None where it is zeros."""
    if b.is_data(value):
        return b.operand(node, value)
    tensor = b.tensor(node, value)
    if not tensor.any():
        return None
    raise b.unsupported(node, "a first state that is constant and not zero")


def _layers(step: Advance, third: bool = False, pair: bool = False) -> Handler:
    """lstm, gru, rnn_tanh: whole sequences, of several layers and both directions."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> Parts:
        if not hasattr(a, "input") or not hasattr(a, "batch_first"):
            raise b.unsupported(node, "packed sequences")
        if b.free(a.input)[0 if not a.batch_first else 1]:
            raise b.unsupported(node, "steps along the first dimension, that of the batch; use batch_first=True")
        size, directions = (4 if a.has_biases else 2), (2 if a.bidirectional else 1)
        if len(a.params) != size * directions * int(a.num_layers):
            raise b.unsupported(node, "proj_size")
        firsts = a.hx if pair else [a.hx]
        given = [_state(b, node, h) for h in firsts]
        name = _name(b, node)
        steps = _steps(b, node, a, name)
        finals: list[State] = []
        for layer in range(int(a.num_layers)):
            outputs = []
            for direction in range(directions):
                at = (layer * directions + direction) * size
                cell = Cell.of(b, node, a.params[at : at + size], third)
                first = [_part(cell, state, len(finals)) for state in given]
                role = f"{BACKWARD}.{layer}" if direction else f"{layer}"
                found, last = _run(cell, step, steps[::-1] if direction else steps, first, name, role)
                outputs.append(found[::-1] if direction else found)
                finals.append(last)
            steps = outputs[0]
            if directions == 2:
                steps = [cell.call(m.Concat(1), *both) for both in zip(*outputs, strict=True)]
                _mark(steps, name, f"{layer}.both")
        return lambda user, index: _result(b, user, a, steps, finals, index, name)

    return handler


def _part(cell: Cell, states: fx.Node | None, at: int) -> fx.Node | None:
    """The state (N, hidden) of one layer and direction, out of those of all, (layers * directions, N, hidden)."""
    if states is None:
        return None
    return cell.call(m.Reshape((-1, cell.hidden)), cell.call(m.Slice([(0, at, at + 1, 1)]), states, kind="state"))


def _name(b: Builder, node: fx.Node) -> str:
    """What a layer is called: as the user's module, which may be called twice."""
    name = scope(node)
    return name if name and name not in b.unrolled else f"{name}{'.' if name else ''}{node.name}"


def _mark(nodes: Sequence[fx.Node], layer: str, role: str) -> None:
    """Notes of nodes, one for each step, what they are."""
    for time, made in enumerate(nodes):
        made.meta[STEP] = Step(layer, role, time)


def _steps(b: Builder, node: fx.Node, a: SimpleNamespace, name: str) -> list[fx.Node]:
    """The inputs (N, C) of every step."""
    time = 1 if a.batch_first else 0
    x, (count, features) = b.operand(node, a.input), (b.shape(a.input)[time], b.shape(a.input)[2])
    b.unrolled[name] = count
    parts = [b.call(node, m.Slice([(time, t, t + 1, 1)]), x, kind="step") for t in range(count)]
    _mark(parts, name, SEQUENCE)
    return [b.call(node, m.Reshape((-1, features)), part) for part in parts]


def _run(
    cell: Cell, step: Advance, steps: Sequence[fx.Node], given: Sequence[fx.Node | None], name: str, role: str
) -> tuple[list[fx.Node], State]:
    """One layer in one direction: its results in the order of `steps`, and its last state."""
    results: list[fx.Node] = []
    state: State = ()
    for time, x in enumerate(steps):
        cell.made.clear()
        entering = cell.linear(x, cell.outer, cell.bias, "input")
        if not state:
            first = state = _first(cell, entering, given)
            del cell.made[1:]  # they are no part of the step
        state = step(cell, entering, state)
        for i, made in enumerate(cell.made):
            made.meta[STEP] = Step(name, f"{role}.{i}", time)
        results.append(state[0])
    for before, after, own in zip(first, state, given, strict=True):
        if own is None:
            before.meta[STEP] = replace(after.meta[STEP], time=-1)
    return results, state


def _result(
    b: Builder,
    node: fx.Node,
    a: SimpleNamespace,
    steps: Sequence[fx.Node],
    finals: Sequence[State],
    index: int,
    name: str,
) -> fx.Node:
    """All steps (index 0), or the last states of every layer, stacked."""
    if index == 0:
        time = 1 if a.batch_first else 0
        shape = list(b.shape_with_batch(node))
        shape[time] = 1
        rows = [b.call(node, m.Reshape(shape), x) for x in steps]
        joined = rows[0] if len(rows) == 1 else b.call(node, m.Concat(time), *rows)
        joined.meta[STEP] = Step(name, EVERY, len(rows) - 1)
        return joined
    rows = [b.call(node, m.Reshape((1, *b.shape_with_batch(node)[1:])), state[index - 1]) for state in finals]
    return rows[0] if len(rows) == 1 else b.call(node, m.Concat(0), *rows)


ROWS: dict[str, Handler] = {
    "lstm": _layers(_lstm_step, pair=True), "gru": _layers(_gru_step, third=True),
    "rnn_tanh": _layers(_plain_step(nn.Tanh)), "rnn_relu": _layers(_plain_step(nn.ReLU)),
    "lstm_cell": _cell(_lstm_step, pair=True), "gru_cell": _cell(_gru_step, third=True),
    "rnn_tanh_cell": _cell(_plain_step(nn.Tanh)), "rnn_relu_cell": _cell(_plain_step(nn.ReLU)),
}  # fmt: skip
