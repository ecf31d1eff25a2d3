"""What a prepared network knows of its recurrent layers: which node is what in which step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from pow2quant.artifact import EVERY, SEQUENCE, Recurrent

STEP, UNROLLED = "pow2quant_step", "pow2quant_unrolled"
"""Where a node's `meta` says of which step it is, and a network's over how many steps each layer is written out."""

BACKWARD = "backward"


@dataclass(frozen=True)
class Step:
    """A node's place in a recurrent layer.

    role: what it is in every step alike; `SEQUENCE` for the part of the sequence that the step reads, `EVERY` for the
    results of all steps in one tensor. time: of the step, from 0; -1 for a state before the first one.
    """

    layer: str
    role: str
    time: int


def same_in_every_step(network: fx.GraphModule) -> list[list[fx.Node]]:
    """The nodes that are the same in every step, those of the last one at the end."""
    found: dict[tuple[str, str], list[tuple[int, fx.Node]]] = defaultdict(list)
    for node in network.graph.nodes:
        step = node.meta.get(STEP)
        if step is not None and step.role not in (SEQUENCE, EVERY):
            found[step.layer, step.role].append((step.time, node))
    return [[node for _, node in sorted(nodes, key=lambda item: item[0])] for nodes in found.values()]


def recurrent(network: fx.GraphModule, tensor: Callable[[fx.Node], str]) -> tuple[Recurrent, ...]:
    """The recurrent layers, in order. tensor: a node's name in the file."""
    steps: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for node in network.graph.nodes:
        step = node.meta.get(STEP)
        if step is not None:
            steps[step.layer][step.role][step.time] = tensor(node)
    counts: dict[str, int] = network.meta.get(UNROLLED, {})
    return tuple(
        Recurrent(layer, counts[layer], _reason(layer, roles, counts[layer]), {r: dict(t) for r, t in roles.items()})
        for layer, roles in steps.items()
    )


def _reason(layer: str, roles: dict[str, dict[int, str]], count: int) -> str | None:
    """Why a layer cannot go step by step."""
    if any(BACKWARD in role for role in roles):
        return f"{layer}: is bidirectional; its first result needs the last step of the sequence"
    if not any(-1 in times for times in roles.values()):
        return f"{layer}: its first state is computed, or an input of the network"
    last = max(time for times in roles.values() for time in times)
    return None if last == count - 1 else f"{layer}: no result needs its steps behind number {last + 1} of {count}"
