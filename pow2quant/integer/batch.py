"""Where the batch lies in every tensor of a graph, followed from node to node.

A program is what one sample sees: the graph with a batch of one. That is the network only where no operation mixes
samples, so the batch is followed through every node, also where a Transpose moves it and a Reshape joins it with
another dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.integer.nodes import attribute, title
from pow2quant.operators import OPERATIONS, Kind

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    Shapes = Mapping[str, tuple[int, ...]]

RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
"""Operations that keep the order in memory."""


WINDOWED = ("AveragePool", "Conv", "ConvTranspose", "InstanceNormalization", "MaxPool", "Resize")
"""Operations whose results depend on several places of an image."""


@dataclass(frozen=True)
class Place:
    """The dimension in which the batch lies, and by how many elements of it two samples are apart.

    (N, C): axis 0, inner 1. (T * N, C): axis 0, inner 1. (N * T, C): axis 0, inner T.
    """

    axis: int
    inner: int = 1


Found = Place | str | None
"""A tensor's place; None for what has no batch; why there is none, where samples are mixed or shapes are not known."""


def places(
    inputs: Mapping[str, Place],
    nodes: Iterable[onnx.NodeProto],
    constants: Mapping[str, NDArray[Any]],
    single: Shapes,
    doubled: Shapes,
    of: str = "samples of a batch",
) -> dict[str, Found]:
    """The place of every tensor. single, doubled: shapes with a batch of one and of two. of: what is counted there."""
    found: dict[str, Found] = dict(inputs)
    for node in nodes:
        for name in filter(None, node.output):
            found[name] = place_of(node, name, found, constants, single, doubled, of)
    return found


def place_of(
    node: onnx.NodeProto,
    name: str,
    found: dict[str, Found],
    constants: Mapping[str, NDArray[Any]],
    single: Shapes,
    doubled: Shapes,
    of: str,
) -> Found:
    """The place of a node's result; see `places`."""
    row = OPERATIONS.get(node.op_type)
    passes = row is not None and row.kind is Kind.PASS and not (node.input and node.input[0] in constants)
    read = [n for n in (node.input[:1] if passes else node.input) if n]
    known = [(n, found.get(n)) for n in read]
    if row is not None and row.kind is Kind.INDEX and node.op_type == "Shape":
        return None
    if (reason := next((place for _, place in known if isinstance(place, str)), None)) is not None:
        return reason
    shape, larger = single.get(name, ()), doubled.get(name, ())
    sources = [(n, place) for n, place in known if isinstance(place, Place)]
    if not sources and shape == larger:
        return None
    if len(shape) != len(larger) or not all(shape):
        return f"{name}: its shape depends on more than the batch size"
    grown = [axis for axis, (n, m) in enumerate(zip(shape, larger, strict=True)) if n != m]
    if len(grown) != 1 or larger[grown[0]] != 2 * shape[grown[0]]:
        return f"{title(node)}: its result is not one of each sample (shapes {shape} and {larger})"
    made = {_moved(node, place, single[source], shape, grown[0]) for source, place in sources} or {Place(grown[0])}
    acted = any(place.axis in _acting(node, len(single[source]), constants) for source, place in sources)
    if acted or len(made) > 1 or None in made:
        return f"{title(node)}: mixes the {of}"
    return made.pop()


def _moved(
    node: onnx.NodeProto, place: Place, before: tuple[int, ...], after: tuple[int, ...], grown: int
) -> Place | None:
    """A place behind a node; None where samples are torn apart. grown: the dimension that counts samples."""
    axis, inner = place.axis + len(after) - len(before), place.inner
    if node.op_type in RESHAPING:
        apart, behind = inner * math.prod(before[place.axis + 1 :]), math.prod(after[grown + 1 :])
        axis, inner = grown, apart // behind
        if apart % behind or not inner or after[grown] % inner:
            return None
    elif node.op_type == "Transpose":
        axis = list(attribute(node, "perm", list(reversed(range(len(before)))))).index(place.axis)
    elif len(before) > len(after) or node.op_type == "Gather":  # dimensions were reduced or added
        axis = grown
    elif node.op_type != "Tile" and before[place.axis] != after[axis]:
        return None
    return Place(axis, inner) if axis == grown else None


def _acting(node: onnx.NodeProto, rank: int, constants: Mapping[str, NDArray[Any]]) -> set[int]:
    """The dimensions along which a node's results depend on several values, or on their place."""

    def integers(index: int) -> list[int]:
        name = node.input[index] if len(node.input) > index else ""
        return [int(v) for v in np.ravel(constants.get(name, []))]

    if node.op_type in WINDOWED:
        return set(range(2, rank))
    if node.op_type == "LayerNormalization":
        return set(range(int(attribute(node, "axis", -1)) % rank, rank))
    if node.op_type == "CumSum":
        return {axis % rank for axis in integers(1)}
    if node.op_type == "Slice":
        steps = integers(4) or [1] * len(integers(1))
        axes = integers(3) or list(range(len(steps)))
        cuts = zip(axes, integers(1), integers(2), steps, strict=False)
        return {axis % rank for axis, start, end, step in cuts if start or end < 2**31 - 1 or step != 1}
    defaults = {"Concat": 0, "Gather": 0, "LogSoftmax": -1, "Softmax": -1, "Split": 0, "TopK": -1}
    if node.op_type not in defaults or (node.op_type == "Gather" and node.input[0] in constants):
        return set()
    return {int(attribute(node, "axis", defaults[node.op_type])) % rank}
