"""The network as a picture: one column of boxes in the order of computation, as a commit graph is drawn.

A tensor that only the next operation reads is a straight line down; every other tensor leaves its box to the right into
a lane of its own and enters its readers from there. So a residual network reads as a column with short loops, a dense
one as a column beside a bus, and both stay readable at a hundred layers. The column is cut into strips, which flow side
by side where the width allows it, and break between pages in print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STRIPS, STRIP = 3, 12
"""A short network makes so many strips, side by side; a long one strips of so many boxes."""

WIDTH, PITCH, HEIGHT = 232, 80, 50
"""Of a box, from one box to the next, and of a box, in pixels."""

LEFT, TOP = 6, 16
ENTRY = 64
"""Between the boxes and the first lane: space for what is written where a line enters."""

LANE = 13


@dataclass(frozen=True)
class Box:
    """An operation. label: what is written on its straight line down, where it has one."""

    name: str
    lines: tuple[str, ...]
    title: str
    y: int
    quality: str
    tone: int | None
    label: str | None


@dataclass(frozen=True)
class Lane:
    """A tensor on its way around boxes. path: in SVG's words; enters: (x, y, label) at its readers."""

    path: str
    colour: int
    title: str
    heads: tuple[tuple[int, int], ...]
    enters: tuple[tuple[int, int, str], ...]
    right: int
    top: int
    bottom: int


@dataclass(frozen=True)
class Strip:
    """A part of the column: its first pixel row, its size, and what lies in it."""

    y: int
    width: int
    height: int
    boxes: tuple[Box, ...]
    lanes: tuple[Lane, ...]


def draw(
    network: Sequence[Mapping[str, Any]], labels: Mapping[str, str], notes: Mapping[str, Mapping[str, Any]]
) -> tuple[Strip, ...]:
    """Lays out what `network.describe` says.

    labels: what is written at a tensor's lines, such as its exponent. notes: by box, `weights` (a line on the weights'
    exponents), `quality` (a few words on the right) and `tone` (0, the best, to 4).
    """
    rows = {box["writes"]: i for i, box in enumerate(network)}
    readers: dict[int, list[int]] = {}
    for i, box in enumerate(network):
        for tensor in dict.fromkeys(box["reads"]):
            if tensor in rows:
                readers.setdefault(rows[tensor], []).append(i)
    straight = {i for i, found in readers.items() if i + 1 in found}
    lanes = _lanes({i: [j for j in found if j != i + 1] for i, found in readers.items()})
    boxes = [_box(i, box, labels, notes.get(box["name"], {}), i in straight) for i, box in enumerate(network)]
    drawn = [
        _lane(network[i], labels.get(network[i]["writes"], ""), i, [j for j in readers[i] if j != i + 1], lane)
        for i, lane in lanes.items()
    ]
    strips = []
    size = min(STRIP, max(6, -(-len(boxes) // STRIPS)))
    for start in range(0, len(boxes), size):
        part = boxes[start : start + size]
        before = (boxes[start - 1],) if start else ()  # for its line down, which is at the top of this strip
        y = part[0].y - (PITCH - HEIGHT - 1 if before else TOP)
        height = part[-1].y + HEIGHT + (1 if start + size < len(boxes) else TOP) - y
        inside = tuple(lane for lane in drawn if lane.top < y + height and lane.bottom > y)
        right = max((lane.right for lane in inside), default=LEFT + WIDTH + 10)
        strips.append(Strip(y, right + 8, height, (*before, *part), inside))
    return tuple(strips)


def _lanes(readers: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """The lane of every tensor that needs one: the innermost that is free from its row to its last reader's."""
    ends: list[int] = []
    found: dict[int, int] = {}
    for i in sorted(readers):
        if not readers[i]:
            continue
        lane = next((n for n, end in enumerate(ends) if end < i), len(ends))
        ends[lane : lane + 1] = [max(readers[i])]
        found[i] = lane
    return found


def _box(i: int, box: Mapping[str, Any], labels: Mapping[str, str], note: Mapping[str, Any], straight: bool) -> Box:
    operation = " ".join(filter(None, (box["op"], box["detail"])))
    lines = tuple(filter(None, (operation, note.get("weights"))))
    label = labels.get(box["writes"], "float") if straight else None
    title = "\n".join(filter(None, (box["name"], *lines, note.get("title"))))
    return Box(box["name"], lines, title, TOP + i * PITCH, note.get("quality") or "", note.get("tone"), label)


def _lane(box: Mapping[str, Any], label: str, row: int, readers: Sequence[int], lane: int) -> Lane:
    right = LEFT + WIDTH
    x, start = right + ENTRY + lane * LANE, TOP + row * PITCH + HEIGHT - 10
    arrivals = [TOP + j * PITCH + 10 for j in readers]
    last = max(arrivals)
    path = f"M{right} {start}H{x - 6}q6 0 6 6V{last - 6}q0 6 -6 6H{right + 5}"
    path += "".join(f"M{x} {y - 6}q0 6 -6 6H{right + 5}" for y in arrivals if y != last)
    return Lane(
        path=path,
        colour=lane % 5,
        title=f"{box['writes']}  {label}",
        heads=tuple((right, y) for y in arrivals),
        enters=tuple((right + 9, y - 4, label) for y in arrivals),
        right=x,
        top=start,
        bottom=last,
    )
