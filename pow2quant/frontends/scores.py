"""What stands in front of a softmax becomes part of it: positive factors, and masks that take values out.

Attention is softmax(q k^T / sqrt(C) + mask) v. The factor stands on q, on the product, or half of it on q and half on
k, as the code or the exporter of a file has it; as part of the softmax nothing is rounded there, and the codes are the
same in each case. Minus infinity has no code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from pow2quant.frontends import modules as m
from pow2quant.frontends.dropouts import DROPOUT, bypass
from pow2quant.frontends.kept import MOVES, Kept
from pow2quant.frontends.modules.normalization import ENOUGH, LOWEST
from pow2quant.frontends.operators import called

NOTHING = -(2.0**50)
"""What a mask of this, or less, is added to is taken out, whatever the scores are."""

ROUNDING = 2**-20
"""How far products of rounded factors are from the factor that was meant, relative to it."""


def gather_scores(network: fx.GraphModule) -> list[str]:
    """Changes the network in place, every node with its `shape` in `meta`; gives the names of the modules that go."""
    gone: list[str] = []
    kept = Kept(network)
    for node in list(network.graph.nodes):
        module = called(network, node)
        if isinstance(module, m.MatMul):
            _join_factors(network, node, gone)
        elif isinstance(module, (m.Softmax, m.MaskedSoftmax)):
            factor, mask = getattr(module, "factor", 1.0), getattr(module, "mask", None)
            softmax = _gathered(network, node, kept, int(module.dim or 0), factor, mask, gone)
            if softmax.factor != factor or softmax.mask is not None or softmax.asks:
                network.set_submodule(str(node.target), softmax.eval())
    return gone


def _gathered(
    network: fx.GraphModule,
    node: fx.Node,
    kept: Kept,
    dim: int,
    factor: float,
    mask: Tensor | None,
    gone: list[str],
) -> m.MaskedSoftmax:
    """softmax(factor * x + mask) of what is kept, with what is in front of x."""
    kept.before, keep = node, None
    while True:
        source, kept.margin = node.all_input_nodes[0], ENOUGH / factor
        added = _added(network, source, kept, dim)
        if added is not None and _leaves_something(torch.isfinite(added[1]), len(source.meta["shape"]), dim):
            scaled = factor * added[1]
            mask = scaled if mask is None else mask + scaled
            _drop(network, source, added[0], gone)
        elif len(source.users) == 1 and (computed := kept.taken_out(source)) is not None:
            keep = computed[1] if keep is None else kept.both(keep, computed[1])
            _drop(network, source, computed[0], gone)
        elif (number := _factor(network, source)) is not None:
            factor *= number
            _drop(network, source, source.all_input_nodes[0], gone)
        else:
            factor = _meant(network, source, factor * _pulled(network, source, gone))
            break
    if keep is not None:
        hidden = None if mask is None else kept.constant(node, mask, NOTHING)
        if hidden is not None:
            keep, mask = kept.both(hidden, keep), None
        node.args = (source, kept.repeated(keep, source))
    return m.MaskedSoftmax(dim, factor, mask, keep is not None)


def _added(network: fx.GraphModule, node: fx.Node, kept: Kept, dim: int) -> tuple[fx.Node, Tensor] | None:
    """(the operand, the mask) of a node that adds a mask that takes values out, and that nothing else reads."""
    module = called(network, node)
    if len(node.users) != 1:
        return None
    if isinstance(module, m.Masked):
        source = node.all_input_nodes[0]
        fill = -math.inf if module.value == -math.inf else LOWEST
        hidden, mask = module.mask, torch.zeros(module.mask.shape).masked_fill(module.mask, fill)
        return (source, mask) if module.value <= kept.chosen_bound(source) and bool(hidden.any()) else None
    if not isinstance(module, (m.Add, m.Sub)):
        return None
    constants = [x for x in node.all_input_nodes if isinstance(called(network, x), m.Constant)]
    if len(constants) != 1 or (isinstance(module, m.Sub) and node.args[0] in constants):
        return None
    source = next(x for x in node.all_input_nodes if x not in constants)
    held: Any = called(network, constants[0])
    mask = held.value.detach() if isinstance(module, m.Add) else -held.value.detach()
    hidden = mask <= kept.added_bound(source)
    if not bool(hidden.any()) or source.meta["shape"] != node.meta["shape"]:
        return None
    if bool(((mask == 0) | hidden).all()) and _leaves_something(~hidden, len(node.meta["shape"]), dim):
        mask = torch.where(hidden & torch.isfinite(mask), LOWEST, mask)
    return source, mask


def _leaves_something(kept: Tensor, rank: int, dim: int) -> bool:
    """Whether truth values keep something of every row; the softmax of minus infinity alone is not a number."""
    return bool(kept[(None,) * (rank - kept.ndim)].any(dim).all())


def _factor(network: fx.GraphModule, node: fx.Node) -> float | None:
    """The positive number that a node multiplies its operand by, if nothing else reads it."""
    module = called(network, node)
    if len(node.users) != 1 or not isinstance(module, m.Scale) or float(module.offset):
        return None
    return float(module.factor) if 0 < float(module.factor) < math.inf else None


def _pulled(network: fx.GraphModule, node: fx.Node, gone: list[str]) -> float:
    """The product of the factors behind moves and matrix products; these go."""
    number = _factor(network, node)
    if number is not None:
        source = node.all_input_nodes[0]
        _drop(network, node, source, gone)
        return number * _pulled(network, source, gone)
    module, operands = called(network, node), node.all_input_nodes
    if isinstance(module, MOVES):
        operands = operands[:1]  # of a second one the shape alone counts
    elif not isinstance(module, m.MatMul) or len(operands) != 2:
        return 1.0
    return math.prod(_pulled(network, x, gone) for x in operands) if len(node.users) == 1 else 1.0


def _join_factors(network: fx.GraphModule, node: fx.Node, gone: list[str]) -> None:
    """x * a @ y * b, as attention is exported, becomes one factor behind the product."""
    operands = node.all_input_nodes
    if len(operands) != 2 or any(_factor(network, x) is None for x in operands):
        return
    scale = m.Scale(_meant(network, node, math.prod(_pulled(network, x, gone) for x in operands)))
    target = gone.pop()
    network.set_submodule(target, scale.eval())
    with network.graph.inserting_after(node):
        behind = network.graph.call_module(target, (node,))
    behind.meta = {key: value for key, value in node.meta.items() if key != DROPOUT}
    node.replace_all_uses_with(behind, lambda user: user is not behind)


def _meant(network: fx.GraphModule, scores: fx.Node, factor: float) -> float:
    """1 / sqrt(C) where the factor of a product over C values is that up to rounding; else the factor."""
    if not isinstance(called(network, scores), m.MatMul):
        return factor
    root = 1 / math.sqrt(scores.all_input_nodes[0].meta["shape"][-1])
    return root if abs(factor - root) <= ROUNDING * root else factor


def _drop(network: fx.GraphModule, node: fx.Node, source: fx.Node, gone: list[str]) -> None:
    bypass(network.graph, node, source)
    gone.append(str(node.target))
