"""LSTM, GRU and plain recurrent networks, unrolled over the length of the example; every step shares its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.builder import Builder, Handler, Parts
from pow2quant.frontends.captured import scope
from pow2quant.frontends.modules import weighted


@dataclass
class Cell:
    """One layer in one direction, of a captured node.

    inner: the weight of the state, (gates * hidden, hidden). outer, bias: of the input; what both biases add together
    stands in `bias`, but for a GRU's third gate, whose state has its own, `apart`.
    """

    b: Builder
    node: fx.Node
    outer: Tensor
    inner: Tensor
    bias: Tensor | None
    apart: Tensor | None

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
        return self.b.call(self.node, module, *args, kind=kind)

    def gate(self, x: fx.Node, index: int) -> fx.Node:
        """The part of one gate of (N, gates * hidden)."""
        start = index * self.hidden
        return self.call(m.Slice([(1, start, start + self.hidden, 1)]), x, kind="gate")

    def sum(self, x: fx.Node, state: fx.Node | None) -> fx.Node:
        """What the input and the state give to all gates; a state of zeros gives nothing."""
        if state is None:
            return x
        return self.call(m.Add(), x, self.linear(state, self.inner, None, "state"))


State = tuple["fx.Node | None", "fx.Node | None"]
"""Hidden state and, of an LSTM, cell; None for zeros."""


def _lstm_step(cell: Cell, x: fx.Node, state: State) -> State:
    gates = cell.sum(x, state[0])
    enter, forget, leave = (cell.call(nn.Sigmoid(), cell.gate(gates, i)) for i in (0, 1, 3))
    new = cell.call(m.Mul(), enter, cell.call(nn.Tanh(), cell.gate(gates, 2)))
    if state[1] is not None:
        new = cell.call(m.Add(), cell.call(m.Mul(), forget, state[1]), new)
    return cell.call(m.Mul(), leave, cell.call(nn.Tanh(), new)), new


def _gru_step(cell: Cell, x: fx.Node, state: State) -> State:
    hidden, n = state[0], cell.hidden
    if hidden is None:
        inner = None if cell.apart is None else cell.b.hold(cell.node, cell.apart[2 * n :])
        reset, update = (cell.call(nn.Sigmoid(), cell.gate(x, i)) for i in (0, 1))
    else:
        own = cell.linear(hidden, cell.inner, cell.apart, "state")
        sums = [cell.call(m.Add(), cell.gate(x, i), cell.gate(own, i)) for i in (0, 1)]
        reset, update = (cell.call(nn.Sigmoid(), s) for s in sums)
        inner = cell.gate(own, 2)
    third = cell.gate(x, 2)
    third = third if inner is None else cell.call(m.Add(), third, cell.call(m.Mul(), reset, inner))
    new = cell.call(nn.Tanh(), third)
    rest = cell.call(m.Scale(-1.0, 1.0), update)
    result = cell.call(m.Mul(), rest, new)
    if hidden is not None:
        result = cell.call(m.Add(), result, cell.call(m.Mul(), update, hidden))
    return result, None


def _plain_step(activation: type[nn.Module]) -> Callable[[Cell, fx.Node, State], State]:
    return lambda cell, x, state: (cell.call(activation(), cell.sum(x, state[0])), None)


Step = Callable[[Cell, fx.Node, State], State]


def _cell(step: Step, third: bool = False, pair: bool = False) -> Handler:
    """lstm_cell, gru_cell, rnn_tanh_cell: one step on (N, C)."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> fx.Node | Parts:
        weights = [w for w in (a.w_ih, a.w_hh, a.b_ih, a.b_hh) if w is not None]
        cell = Cell.of(b, node, weights, third)
        states = [_state(b, node, h) for h in (a.hx if pair else [a.hx])]
        x = cell.linear(b.operand(node, a.input), cell.outer, cell.bias, "input")
        results = step(cell, x, (states[0], states[1] if pair else None))
        if pair:
            return lambda user, index: _known(results[index])
        return _known(results[0])

    return handler


def _known(state: fx.Node | None) -> fx.Node:
    assert state is not None
    return state


def _state(b: Builder, node: fx.Node, value: Any) -> fx.Node | None:
    """A state, None where it is zeros."""
    if b.is_data(value):
        return b.operand(node, value)
    tensor = b.tensor(node, value)
    if not tensor.any():
        return None
    raise b.unsupported(node, "a first state that is constant and not zero")


def _layers(step: Step, third: bool = False, pair: bool = False) -> Handler:
    """lstm, gru, rnn_tanh: whole sequences, of several layers and both directions."""

    def handler(b: Builder, node: fx.Node, a: SimpleNamespace) -> Parts:
        if not hasattr(a, "input") or not hasattr(a, "batch_first"):
            raise b.unsupported(node, "packed sequences")
        firsts = a.hx if pair else [a.hx]
        given = [_state(b, node, h) for h in firsts]
        steps = _steps(b, node, a)
        size, directions = (4 if a.has_biases else 2), (2 if a.bidirectional else 1)
        finals: list[State] = []
        for layer in range(int(a.num_layers)):
            outputs = []
            for direction in range(directions):
                at = (layer * directions + direction) * size
                cell = Cell.of(b, node, a.params[at : at + size], third)
                first = [_part(cell, state, len(finals)) for state in (*given, None)[:2]]
                found, last = _run(cell, step, steps[::-1] if direction else steps, (first[0], first[1]))
                outputs.append(found[::-1] if direction else found)
                finals.append(last)
            steps = outputs[0]
            if directions == 2:
                steps = [cell.call(m.Concat(1), *pair_) for pair_ in zip(*outputs, strict=True)]
        return lambda user, index: _result(b, user, a, steps, finals, index)

    return handler


def _part(cell: Cell, states: fx.Node | None, at: int) -> fx.Node | None:
    """The state (N, hidden) of one layer and direction, out of those of all, (layers * directions, N, hidden)."""
    if states is None:
        return None
    return cell.call(m.Reshape((-1, cell.hidden)), cell.call(m.Slice([(0, at, at + 1, 1)]), states, kind="state"))


def _steps(b: Builder, node: fx.Node, a: SimpleNamespace) -> list[fx.Node]:
    """The inputs (N, C) of every step."""
    time = 1 if a.batch_first else 0
    x, (count, features) = b.operand(node, a.input), (b.shape(a.input)[time], b.shape(a.input)[2])
    b.unrolled[scope(node) or node.name] = count
    parts = [b.call(node, m.Slice([(time, t, t + 1, 1)]), x, kind="step") for t in range(count)]
    return [b.call(node, m.Reshape((-1, features)), part) for part in parts]


def _run(cell: Cell, step: Step, steps: Sequence[fx.Node], state: State) -> tuple[list[fx.Node], State]:
    results = []
    for x in steps:
        state = step(cell, cell.linear(x, cell.outer, cell.bias, "input"), state)
        results.append(_known(state[0]))
    return results, state


def _result(
    b: Builder, node: fx.Node, a: SimpleNamespace, steps: Sequence[fx.Node], finals: Sequence[State], index: int
) -> fx.Node:
    """All steps (index 0), or the last states of every layer, stacked."""
    if index == 0:
        time = 1 if a.batch_first else 0
        shape = list(b.shape_with_batch(node))
        shape[time] = 1
        rows = [b.call(node, m.Reshape(shape), x) for x in steps]
        return rows[0] if len(rows) == 1 else b.call(node, m.Concat(time), *rows)
    rows = [b.call(node, m.Reshape((1, *b.shape_with_batch(node)[1:])), _known(state[index - 1])) for state in finals]
    return rows[0] if len(rows) == 1 else b.call(node, m.Concat(0), *rows)


ROWS: dict[str, Handler] = {
    "lstm": _layers(_lstm_step, pair=True), "gru": _layers(_gru_step, third=True),
    "rnn_tanh": _layers(_plain_step(nn.Tanh)), "rnn_relu": _layers(_plain_step(nn.ReLU)),
    "lstm_cell": _cell(_lstm_step, pair=True), "gru_cell": _cell(_gru_step, third=True),
    "rnn_tanh_cell": _cell(_plain_step(nn.Tanh)), "rnn_relu_cell": _cell(_plain_step(nn.ReLU)),
}  # fmt: skip
