"""Cells in a loop of the user's: of which steps they are.

An LSTM that is written out by `aten/recurrent.py` says so itself. A loop over LSTMCell, GRUCell or RNNCell comes as one
call after the other; it is a recurrent layer where each call reads the state of the one before, from zeros on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor, fx, nn

from pow2quant.artifact import EVERY, SEQUENCE
from pow2quant.frontends import modules as m
from pow2quant.frontends.unrolled import STEP, Step

Modules = dict[str, nn.Module]


@dataclass(frozen=True)
class Call:
    """A cell that was called once.

    name: of the user's module. weight: of the state; all calls of a cell have the same one. x: what it reads beside the
    state. given: the states that it is given, None for zeros; before, after: those that it has, and makes. made: its
    nodes.
    """

    name: str
    weight: Tensor
    x: fx.Node
    given: tuple[fx.Node | None, ...]
    before: tuple[fx.Node, ...]
    after: tuple[fx.Node, ...]
    made: tuple[fx.Node, ...]


def mark_loops(calls: Sequence[Call], modules: Modules) -> dict[str, int]:
    """Notes in the nodes' `meta` which step they are of; gives the number of steps of every loop, by its name."""
    by_weight: dict[int, list[Call]] = {}
    for call in calls:
        by_weight.setdefault(id(call.weight), []).append(call)
    found: dict[str, int] = {}
    for loop in by_weight.values():
        if len(loop) < 2 or not _is_loop(loop):
            continue
        name = loop[0].name if loop[0].name not in found else f"{loop[0].name}.{len(found)}"
        found[name] = len(loop)
        for time, call in enumerate(loop):
            for i, made in enumerate(call.made):
                made.meta[STEP] = Step(name, f"0.{i}", time)
        for before, after in zip(loop[0].before, loop[0].after, strict=True):
            before.meta[STEP] = replace(after.meta[STEP], time=-1)
        _mark_parts([call.x for call in loop], name, "enter", modules)
        _mark_joins(loop, name, modules)
    return found


def _is_loop(loop: Sequence[Call]) -> bool:
    zeros = all(state is None for state in loop[0].given)
    return zeros and all(second.given == first.after for first, second in pairwise(loop))


def _mark_parts(ends: Sequence[fx.Node], name: str, role: str, modules: Modules) -> bool:
    """Marks what is computed between the sequence or marked nodes and `ends`, one for each step; False where nothing.

    That is done where it is the same in every step, and every step has its own nodes.
    """
    paths, slices = zip(*(_path(end, time, modules) for time, end in enumerate(ends)), strict=True)
    nodes = [node for path in paths for node in path]
    if len({len(path) for path in paths}) > 1 or len(set(nodes)) < len(nodes) or None in slices:
        return False
    for time, (path, cut) in enumerate(zip(paths, slices, strict=True)):
        for i, node in enumerate(path):
            node.meta[STEP] = Step(name, f"{role}.{i}", time)
        for node in cut or ():
            node.meta.setdefault(STEP, Step(name, SEQUENCE, time))
    return True


def _path(end: fx.Node, time: int, modules: Modules) -> tuple[list[fx.Node], list[fx.Node] | None]:
    """The nodes without a mark that lead to `end`, and the parts of sequences that they read.

    None in place of the latter where something else is read that has no step, such as an input of the network.
    """
    path: list[fx.Node] = []
    parts: list[fx.Node] = []
    pending = [end]
    while pending:
        node = pending.pop()
        module = modules.get(str(node.target))
        step = node.meta.get(STEP)
        if step is not None and step.time == time:
            continue
        if isinstance(module, m.Slice) and [(a, b) for _, a, b, _ in module.slices] == [(time, time + 1)]:
            parts.append(node)
        elif step is not None or module is None:
            return path, None
        elif not isinstance(module, m.Constant) and node not in path:
            path.append(node)
            pending += node.all_input_nodes
    return path, parts


def _mark_joins(loop: Sequence[Call], name: str, modules: Modules) -> None:
    """Marks the tensors that hold the results of all steps in order, and what makes these of the states."""
    pending, seen = [loop[-1].after[0]], set[fx.Node]()
    while pending:
        node = pending.pop()
        joins = isinstance(modules.get(str(node.target)), m.Concat) and len(node.args) == len(loop)
        if joins and _mark_parts(node.all_input_nodes, name, f"leave{len(seen)}", modules):
            node.meta[STEP] = Step(name, EVERY, len(loop) - 1)
        elif not joins and node not in seen:
            pending += node.users
        seen.add(node)
