"""Masks that are computed from the inputs, such as those of padding, as truth values: which scores a softmax keeps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, fx, nn

from pow2quant.frontends import modules as m
from pow2quant.frontends.modules.normalization import ENOUGH
from pow2quant.frontends.operators import called

TRUTH = "pow2quant_truth"
"""Stands in a node's `meta` whose values are 0 and 1."""

ENDS = "pow2quant_ends"
"""Where a node's `meta` has its least and its largest finite value, on the example."""

HIDES = -50.0
"""A mask that takes values out of a softmax adds this or less, and less than makes up for the spread of the scores."""

MOVES = (m.Permute, m.Reshape, m.Slice, m.Take, m.Expand, nn.Flatten)
"""Modules that move the values of their first operand."""


class Kept:
    """Writes truth values into a network: for masks that are added to scores, or that choose between them.

    before: the node, a softmax, in front of which they are written. margin: how far below another score a score counts
    for nothing there. What is asked for twice is written once.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.before: fx.Node | None = None
        self.margin: float = ENOUGH
        self._written: dict[tuple[Any, str], fx.Node] = {}

    def taken_out(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """(the scores, what is kept of them) of a node that takes values out as a computed mask says; else None."""
        module, operands = called(self.network, node), node.all_input_nodes
        if isinstance(module, m.Select) and len(operands) == 3:
            condition, first, second = operands
            for scores, fill, holds in ((first, second, True), (second, first, False)):
                number = self._number(fill)
                chosen = number is not None and number <= self.chosen_bound(scores)
                if chosen and _broadcasts(condition, scores, node):
                    return scores, condition if holds else self._not(condition)
        if isinstance(module, (m.Add, m.Sub)) and len(operands) == 2:
            sign = 1 if isinstance(module, m.Add) else -1
            for scores, mask in (operands, operands[::-1])[: 1 if sign < 0 else 2]:
                bound = self.added_bound(scores)
                kept = self._of_mask(mask, bound, sign) if _broadcasts(mask, scores, node) else None
                if kept is not None:
                    return scores, kept
        return None

    def chosen_bound(self, scores: fx.Node) -> float:
        """A number that stands in a score's place takes it out where it is not above this."""
        low, high = ends(self.network, scores)
        return min(HIDES, low - max(high - low, self.margin))

    def added_bound(self, scores: fx.Node) -> float:
        """A number that is added to a score takes it out where it is not above this."""
        low, high = ends(self.network, scores)
        return min(HIDES, low - high - max(high - low, self.margin))

    def both(self, first: fx.Node, second: fx.Node) -> fx.Node:
        """What both keep."""
        pairs = list(zip(_padded(first, second), _padded(second, first), strict=True))
        shape, free = [max(a[0], b[0]) for a, b in pairs], [a[1] or b[1] for a, b in pairs]
        return self._write((first, second), "kept", m.Minimum(), (first, second), shape, free)

    def constant(self, beside: fx.Node, mask: Tensor, bound: float) -> fx.Node | None:
        """What an added constant keeps; None where it does more than to take values out. bound: see `added_bound`."""
        if not bool(((mask == 0) | (mask <= bound)).all()):
            return None
        return self._write(beside, "kept", m.Constant(mask == 0), (), mask.shape, [False] * mask.ndim)

    def repeated(self, kept: fx.Node, scores: fx.Node) -> fx.Node:
        """What is kept, with single dimensions in front alone: so it repeats in memory beside the scores."""
        for dim in range(2, len(scores.meta["shape"])):
            own, size = list(kept.meta["shape"]), scores.meta["shape"][dim]
            if own[dim] != size and any(other != 1 for other in own[1:dim]):
                own[dim] = size
                kept = self._write((kept, dim), "repeated", m.Take(dim, [0] * size), (kept,), own, kept.meta["free"])
        return kept

    def _of_mask(self, node: fx.Node, bound: float, sign: int = 1) -> fx.Node | None:
        """What a computed mask keeps that is added to scores, or subtracted; None where it is no mask."""
        found = self._values(node)
        if found is not None:
            truth, low, high = found
            if sign * low <= bound and high == 0:
                return truth
            return self._not(truth) if sign * high <= bound and low == 0 else None
        operands = node.all_input_nodes
        if isinstance(called(self.network, node), MOVES):
            inner = self._of_mask(operands[0], bound, sign)
            return None if inner is None else self._moved(node, inner)
        if not isinstance(called(self.network, node), m.Add) or len(operands) != 2:
            return None
        parts = [self._part(operand, bound, sign) for operand in operands]
        return None if parts[0] is None or parts[1] is None else self.both(parts[0], parts[1])

    def _part(self, node: fx.Node, bound: float, sign: int) -> fx.Node | None:
        """What one summand of a mask keeps."""
        module = called(self.network, node)
        if isinstance(module, m.Constant):
            return self.constant(node, sign * module.value.detach(), bound)
        return self._of_mask(node, bound, sign)

    def _values(self, node: fx.Node) -> tuple[fx.Node, float, float] | None:
        """Truth values that decide a node's, and what it is where they are 0, and where they are 1; or None."""
        module, operands = called(self.network, node), node.all_input_nodes
        shape, free = node.meta["shape"], node.meta["free"]
        if TRUTH in node.meta:
            return node, 0.0, 1.0
        if isinstance(module, m.Real):  # integers in a mask are 0 or 1
            positive = m.CompareIntegers("Greater", torch.tensor(0))
            return self._write(node, "kept", positive, operands, shape, free), 0.0, 1.0
        if isinstance(module, m.Select) and len(operands) == 3:
            high, low = (self._number(side) for side in operands[1:])
            return None if high is None or low is None else (operands[0], low, high)
        found = self._values(operands[0]) if isinstance(module, (m.Scale, *MOVES)) else None
        if found is None:
            return None
        truth, low, high = found
        if isinstance(module, m.Scale):
            factor, offset = float(module.factor), float(module.offset)
            return truth, low * factor + offset, high * factor + offset
        return self._moved(node, truth), low, high

    def _moved(self, node: fx.Node, truth: fx.Node) -> fx.Node:
        """Truth values, moved as a node moves its operand."""
        module = copy.deepcopy(self.network.get_submodule(str(node.target)))
        operands = truth, *node.all_input_nodes[1:]
        return self._write(node, "kept", module, operands, node.meta["shape"], node.meta["free"])

    def _not(self, truth: fx.Node) -> fx.Node:
        """The contrary; of a contrary what it was made of."""
        module = called(self.network, truth)
        if isinstance(module, m.Scale) and float(module.factor) == -1 and TRUTH in truth.all_input_nodes[0].meta:
            return truth.all_input_nodes[0]
        return self._write(truth, "not", m.Scale(-1.0, 1.0), (truth,), truth.meta["shape"], truth.meta["free"])

    def _number(self, node: fx.Node) -> float | None:
        """A constant's value, if it has but one."""
        module = called(self.network, node)
        values = module.value.detach().unique().tolist() if isinstance(module, m.Constant) else []
        return float(values[0]) if len(values) == 1 else None

    def _write(
        self,
        origin: Any,
        kind: str,
        module: nn.Module,
        operands: Sequence[fx.Node],
        shape: Sequence[int],
        free: Sequence[bool],
    ) -> fx.Node:
        """A call of a module that gives truth values. origin: what it is written for, a node or several."""
        if (origin, kind) not in self._written:
            assert self.before is not None
            base = f"{(origin[0] if isinstance(origin, tuple) else origin).target}_{kind}"
            taken = {str(node.target) for node in self.network.graph.nodes}
            target = next(t for t in chain([base], (f"{base}_{i}" for i in count(1))) if t not in taken)
            self.network.add_submodule(target, module.eval())
            with self.network.graph.inserting_before(self.before):
                made = self.network.graph.call_module(target, tuple(operands))
            made.meta = {TRUTH: True, "dtype": torch.float32, "shape": tuple(shape), "free": tuple(free)}
            self._written[origin, kind] = made
        return self._written[origin, kind]


def ends(network: fx.GraphModule, node: fx.Node) -> tuple[float, float]:
    """The least and the largest value of scores on the example, masks in front left out; (0, 0) where not known."""
    found: tuple[float, float] = node.meta.get(ENDS, (0.0, 0.0))
    module = called(network, node)
    inner = [x for x in node.all_input_nodes if not isinstance(called(network, x), m.Constant)]
    if found[0] > HIDES or not isinstance(module, (m.Masked, m.Select, m.Add, m.Sub)):
        return found
    if isinstance(module, m.Select):  # the condition is 0 and 1
        inner = [x for x in inner if x is not node.args[0]]
    # beside a mask, scores are those that are closer to one another
    spreads = [(high - low, x) for x in inner for low, high in (x.meta.get(ENDS, (0.0, 0.0)),)]
    return ends(network, min(spreads, key=lambda pair: pair[0])[1]) if spreads else found


def _broadcasts(mask: fx.Node, scores: fx.Node, result: fx.Node) -> bool:
    """Whether a mask broadcasts against scores, and not they against it."""
    same = scores.meta["shape"] == result.meta["shape"] and scores.meta["free"] == result.meta["free"]
    return bool(same and len(mask.meta["shape"]) == len(scores.meta["shape"]))


def _padded(node: fx.Node, other: fx.Node) -> list[tuple[int, bool]]:
    """(size, whether it grows with the batch) of every dimension, single ones in front up to the other's rank."""
    own = list(zip(node.meta["shape"], node.meta["free"], strict=True))
    return [(1, False)] * (len(other.meta["shape"]) - len(own)) + own
