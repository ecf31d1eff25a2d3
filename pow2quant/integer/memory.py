"""Where tensors lie in static memory: buffers that are needed at different times share bytes.

A view is its input's memory, and the result of an elementwise step takes that of an input that is no longer read.
Inputs and outputs of the network are the caller's arrays. Codes of 8 and 16 bits share an arena, since C lets both be
read from an array of 16 bits; codes of 32 bits have their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pow2quant.integer.program import Program

NARROW, WIDE = 2, 4
"""The arenas, by the widest code that they hold, in bytes."""


@dataclass(frozen=True)
class Buffer:
    """Bytes that are needed from step `first` to step `last`, both included; offset: a multiple of `alignment`."""

    name: str
    size: int
    first: int
    last: int
    alignment: int = 1

    def meets(self, other: Buffer) -> bool:
        """Whether both are needed at the same time."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Plan:
    """Offsets in bytes by name. peak: the size of the memory. lower_bound: no plan of these buffers needs less."""

    offsets: dict[str, int]
    peak: int
    lower_bound: int


ORDERS: tuple[Callable[[Buffer], tuple[int, ...]], ...] = (
    lambda b: (-b.size, b.first),
    lambda b: (b.first, -b.size),
    lambda b: (-b.last, -b.size),
    lambda b: (-b.size * (b.last - b.first + 1), b.first),
    lambda b: (b.first - b.last, -b.size),
)
"""In what order the greedy planner places buffers: the best result of all is taken."""


def plan(buffers: Sequence[Buffer]) -> Plan:
    """Places every buffer at the lowest free offset, in several orders, and takes the smallest peak."""
    bound = max((sum(b.size for b in buffers if b.first <= t <= b.last) for t in {b.first for b in buffers}), default=0)
    plans = [_place(sorted(buffers, key=order)) for order in ORDERS]
    peaks = [max((offsets[b.name] + b.size for b in buffers), default=0) for offsets in plans]
    peak = min(peaks)
    return Plan(plans[peaks.index(peak)], peak, bound)


def _place(buffers: Sequence[Buffer]) -> dict[str, int]:
    offsets: dict[str, int] = {}
    for i, buffer in enumerate(buffers):
        taken = sorted((offsets[b.name], offsets[b.name] + b.size) for b in buffers[:i] if b.meets(buffer))
        offset = 0
        for start, end in taken:
            if offset + buffer.size <= start:
                break
            offset = max(offset, -(-end // buffer.alignment) * buffer.alignment)
        offsets[buffer.name] = offset
    return offsets


@dataclass(frozen=True)
class Needs:
    """What a step asks of the memory.

    is_view: its result is its input's memory. overwrites: inputs whose memory the result may take: those of its size
    whose every code is read before the one at its place is written. scratch: (name, type, count) that it needs besides.
    """

    is_view: bool
    overwrites: tuple[str, ...] = ()
    scratch: Sequence[tuple[str, np.dtype[np.integer], int]] = field(default=())


@dataclass(frozen=True)
class Spot:
    """Where a tensor lies: in the array of a network's input or output, `caller`, or at `offset` bytes of an arena."""

    caller: str | None
    width: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Placement:
    """Where everything lies.

    spots: by tensor or scratch. arenas, buffers: by width. types: the type of an arena's array. copies: outputs that
    cannot be computed in place, and are copied at the end.
    """

    spots: dict[str, Spot]
    arenas: dict[int, Plan]
    buffers: dict[int, list[Buffer]]
    types: dict[int, np.dtype[np.integer]]
    copies: list[str]

    @property
    def ram(self) -> int:
        """Bytes of all arenas."""
        return sum(-(-plan.peak // self.types[w].itemsize) * self.types[w].itemsize for w, plan in self.arenas.items())

    def spare(self, steps: int) -> list[int]:
        """For every step the bytes of the narrow arena that no tensor needs then."""
        live = [sum(b.size for b in self.buffers[NARROW] if b.first <= t <= b.last) for t in range(steps)]
        return [self.arenas[NARROW].lower_bound - size for size in live]

    @property
    def lower_bound(self) -> int:
        """Bytes that no plan of the same buffers can do without."""
        return sum(plan.lower_bound for plan in self.arenas.values())


def place(program: Program, needs: Sequence[Needs]) -> Placement:
    """Places every tensor that is computed, and every step's scratch memory; `needs` goes with `program.steps`."""
    groups = _Groups(program, needs)
    callers, copies = groups.callers()
    buffers: dict[int, list[Buffer]] = {NARROW: [], WIDE: []}
    kinds: dict[int, set[np.dtype[np.integer]]] = {NARROW: set(), WIDE: set()}
    members: dict[str, list[str]] = {}
    for group in groups.distinct():
        tensors = [program.tensors[name] for name in group]
        if any(t.constant is not None for t in tensors) or group[0] in callers:
            continue
        width = _width(tensors[0].dtype)
        kinds[width] |= {t.dtype for t in tensors}
        first, last = groups.lifetime(group)
        item = tensors[0].dtype.itemsize
        buffers[width].append(Buffer(group[0], tensors[0].size * item, first, last, item))
        members[group[0]] = group
    for i, need in enumerate(needs):
        for name, dtype, count in need.scratch:
            buffers[_width(dtype)].append(Buffer(name, count * dtype.itemsize, i, i, dtype.itemsize))
            kinds[_width(dtype)].add(dtype)
    arenas = {width: plan(found) for width, found in buffers.items()}
    spots = {name: Spot(caller) for name, caller in callers.items()}
    for width, found in buffers.items():
        for buffer in found:
            spot = Spot(None, width, arenas[width].offsets[buffer.name])
            spots |= dict.fromkeys(members.get(buffer.name, [buffer.name]), spot)
    types = {w: max(kinds[w], key=lambda d: (d.itemsize, d.kind), default=np.dtype(np.uint8)) for w in kinds}
    return Placement(spots, arenas, buffers, types, copies)


def _width(dtype: np.dtype[np.integer]) -> int:
    return NARROW if dtype.itemsize <= NARROW else WIDE


class _Groups:
    """Tensors that share memory."""

    def __init__(self, program: Program, needs: Sequence[Needs]) -> None:
        self.program = program
        self.born = dict.fromkeys(program.inputs, -1) | {s.output: i for i, s in enumerate(program.steps)}
        self.read = {name: i for i, step in enumerate(program.steps) for name in step.inputs}
        self.group = {name: [name] for name in program.tensors}
        for step, need in zip(program.steps, needs, strict=True):
            if need.is_view:
                self._unite(step.inputs[0], step.output)
        for i, (step, need) in enumerate(zip(program.steps, needs, strict=True)):
            for name in need.overwrites:
                if self._may_overwrite(name, step.output, i):
                    self._unite(name, step.output)
                    break

    def distinct(self) -> list[list[str]]:
        """Every group once."""
        return list({id(group): group for group in self.group.values()}.values())

    def lifetime(self, group: list[str]) -> tuple[int, int]:
        """The steps from the first that writes to the last that reads."""
        return min(self.born[n] for n in group), max(max(self.born[n], self.read.get(n, -1)) for n in group)

    def callers(self) -> tuple[dict[str, str], list[str]]:
        """The input or output in whose array a tensor lies, by tensor, and the outputs that have to be copied."""
        found: dict[str, str] = {}
        copies = []
        for name in self.program.inputs:
            found |= dict.fromkeys(self.group[name], name)
        for name in self.program.outputs:
            if name in found or self.program.tensors[name].constant is not None:
                copies.append(name)
            else:
                found |= dict.fromkeys(self.group[name], name)
        return found, copies

    def _unite(self, first: str, second: str) -> None:
        if self.group[first] is not self.group[second]:
            united = [*self.group[first], *self.group[second]]
            self.group |= dict.fromkeys(united, united)

    def _may_overwrite(self, name: str, output: str, step: int) -> bool:
        tensors, old, new = self.program.tensors, self.group[name], self.group[output]
        ends = {*self.program.inputs, *self.program.outputs}
        return (
            tensors[name].constant is None
            and tensors[name].size == tensors[output].size
            and tensors[name].dtype.itemsize == tensors[output].dtype.itemsize
            and self.lifetime(old)[1] == step
            and not ends & {*old, *new}
            and not any(tensors[n].constant is not None for n in old)
        )
