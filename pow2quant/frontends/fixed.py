"""Networks whose code holds a batch size (`x.view(1, -1)`): captured for it, opened for any, called part by part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from pow2quant.frontends.batches import regrown
from pow2quant.frontends.captured import operation

RESHAPED = frozenset({"view", "reshape", "_unsafe_view"})
EXPANDED = frozenset({"expand"})
JOINED = frozenset({"cat", "concat", "concatenate", "stack"})


def opened(program: ExportedProgram, batch: tuple[Tensor, ...]) -> ExportedProgram:
    """The captured operations for another batch: the sizes that the code writes out follow from the operands.

    batch: a multiple of the samples that were captured, whose shapes alone count. Node for node the graph is the same.
    Raises whatever an operation raises that does not take another batch.
    """
    graph = copy.deepcopy(program.graph)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    users = {s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    given = iter(batch)
    with torch.no_grad(), mode:
        held: dict[fx.Node, Any] = {}
        before: dict[fx.Node, Any] = {node: node.meta.get("val") for node in graph.nodes}
        for node in graph.nodes:
            if node.op == "call_function":
                _rewrite(node, before, held)
                held[node] = _evaluated(node, held)
            elif node.name in users and isinstance(before[node], Tensor):
                held[node] = mode.from_tensor(next(given))
            elif node.op == "get_attr":
                held[node] = getattr(program.graph_module, str(node.target))
            else:
                held[node] = pytree.tree_map(_empty, before[node])
            node.meta["val"] = held[node]
    other = copy.copy(program)
    other._graph_module = fx.GraphModule(program.graph_module, graph)
    return other


def _empty(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _rewrite(node: fx.Node, before: dict[fx.Node, Any], held: dict[fx.Node, Any]) -> None:
    """Changes the sizes that an operation is given, where its operand has another shape than when it was captured."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or not isinstance(before[first], Tensor):
        return
    old, new = tuple(before[first].shape), tuple(held[first].shape)
    if old == new:
        return
    result = tuple(before[node].shape)
    if operation(node) in RESHAPED:
        node.args = (first, regrown(old, result, new))
    elif operation(node) in EXPANDED:
        front = len(result) - len(old)
        kept = [d if a == b else -1 for d, a, b in zip(result[front:], old, new, strict=True)]
        node.args = (first, [*result[:front], *kept])


def _evaluated(node: fx.Node, held: dict[fx.Node, Any]) -> Any:
    """The result without values; what is joined to a larger batch is repeated, as the row of the operation does it."""
    assert callable(node.target)
    given: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: held[n])
    args, kwargs = given
    if operation(node) in JOINED:
        most = max(len(x) for x in args[0] if x.ndim)
        args = ([x.expand(most, *x.shape[1:]) if x.ndim > 1 and len(x) == 1 else x for x in args[0]], *args[1:])
    return node.target(*args, **kwargs)


def in_parts(call: Callable[[Any], Any], batch: Any, size: int) -> Any:
    """What `call` gives for a batch of any size, which takes `size` samples at a time: the last part is filled up."""
    count = next(len(x) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.ndim)

    def part(start: int) -> Any:
        rows = torch.arange(start, start + size) % count
        return pytree.tree_map(lambda x: x[rows] if isinstance(x, Tensor) and x.ndim else x, batch)

    def joined(*values: Any) -> Any:
        return torch.cat(values)[:count] if isinstance(values[0], Tensor) and values[0].ndim else values[0]

    return pytree.tree_map(joined, *(call(part(start)) for start in range(0, count, size)))


class InParts(nn.Module):
    """A network that takes `size` samples at a time, called with tensors of any number of samples."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, *tensors: Tensor) -> Any:
        """(N, …) each -> what the network gives, (N, …) each."""
        return in_parts(lambda part: self.model(*part), tensors, self.size)
