"""Writes the module-only graph from a traced one, node by node; what is special about a node is in `conversions`."""

from __future__ import annotations

import copy
import operator as py
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pow2quant.backends.tracing import source_line
from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends import modules as m
from pow2quant.frontends import operators

IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


OVERWRITING = (py.iadd, py.isub, py.imul, py.itruediv, torch.relu_, F.relu_)
"""Functions that write into their first argument, besides those that are asked to by `inplace`."""


Handler = Callable[["Builder", fx.Node], fx.Node]


@dataclass(frozen=True)
class Conversions:
    """What is written differently from how it was traced, by function, method and module type."""

    functions: Mapping[Any, Handler]
    methods: Mapping[str, Handler]
    modules: Mapping[type[nn.Module], Handler]


class Builder:
    """Writes the module-only graph, node by node.

    first, second: every node's value for two batch sizes; what is no tensor is a constant, or depends on the batch.
    """

    def __init__(
        self, traced: fx.GraphModule, first: dict[str, Any], second: dict[str, Any], conversions: Conversions
    ) -> None:
        self.traced, self.first, self.second, self.conversions = traced, first, second, conversions
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.new: dict[fx.Node, fx.Node] = {}
        self.taken = {name for name, _ in traced.named_modules()}
        self.overwriting = {name for name, m in traced.named_modules() if getattr(m, "inplace", False) is True}
        self.converted: list[tuple[fx.Node, fx.Node]] = []

    def build(self) -> fx.GraphModule:
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                if isinstance(self.first[node.name], Tensor):
                    self.new[node] = self.graph.placeholder(node.target)
            elif node.op == "output":
                self.graph.output(self._output(node))
            elif self._is_tensor(node):
                self.new[node] = result = self._convert(node)
                self.converted.append((node, result))
                if self._overwrites(node):
                    self.new[self._overwritten(node)] = result
        network = fx.GraphModule(self.modules, self.graph).eval()
        network.graph.eliminate_dead_code()
        network.delete_all_unused_submodules()
        network.recompile()
        return network

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self.first[node.name], Tensor) and node.op != "get_attr"

    def _overwrites(self, node: fx.Node) -> bool:
        """Whether the operation writes into its first argument: who reads that later reads the result."""
        if node.op == "call_module":
            return str(node.target) in self.overwriting
        if node.op == "call_method":
            return _method_name(node) != node.target
        return node.kwargs.get("inplace") is True or node.target in OVERWRITING

    def _overwritten(self, node: fx.Node) -> fx.Node:
        target = node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(target, fx.Node)
        return target

    def _output(self, node: fx.Node) -> Any:
        result = node.args[0]
        items: Sequence[Any] = result if isinstance(result, (tuple, list)) else [result]
        if not all(isinstance(i, fx.Node) and i in self.new for i in items):
            raise UnsupportedModelError(
                "the network must return a tensor or a tuple of tensors (computed from its inputs)"
            )
        mapped = tuple(self.new[i] for i in items)
        return mapped if isinstance(result, (tuple, list)) else mapped[0]

    def _convert(self, node: fx.Node) -> fx.Node:
        if node.op == "call_module":
            return self._module(node)
        name: Any = _method_name(node) if node.op == "call_method" else node.target
        handler = (
            self.conversions.methods.get(name) if node.op == "call_method" else self.conversions.functions.get(name)
        )
        if handler is None and getattr(node.target, "__name__", "") == "stochastic_depth":
            handler = self.conversions.methods["clone"]
        if handler is None:
            label = name if isinstance(name, str) else getattr(name, "__name__", str(name))
            raise self.unsupported(node, f"{label}() is not supported")
        try:
            return handler(self, node)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise self.unsupported(node, f"not understood as it is written ({error})") from error

    def _module(self, node: fx.Node) -> fx.Node:
        module, name = self.traced.get_submodule(str(node.target)), str(node.target)
        if isinstance(module, IDENTITIES):
            return self.tensor(node, 0)
        rewrite = self.conversions.modules.get(type(module))
        if rewrite is not None:
            return rewrite(self, node)
        if isinstance(module, nn.Linear) and self.rank(node.args[0]) != 2:
            return self._linear_on_tokens(node, module)
        return self.call(node, module, *[self.mapped(node, a) for a in node.args], name=name)

    def _linear_on_tokens(self, node: fx.Node, module: nn.Linear) -> fx.Node:
        """A linear layer on (N, …, C) is one on (N·…, C) between two reshapes."""
        rows = self.call(node, m.Reshape((-1, module.in_features)), self.tensor(node, 0), kind="rows")
        result = self.call(node, module, rows, name=str(node.target))
        return self.call(node, m.Reshape(self.shape_with_batch(node)), result, kind="unrows")

    # -- what handlers use ---------------------------------------------------------------------------------------------

    def call(
        self, node: fx.Node, module: nn.Module, *args: fx.Node, name: str | None = None, kind: str | None = None
    ) -> fx.Node:
        """Adds a call of `module`, under the module's own name or one made of the scope and `kind`."""
        module.__class__ = m.EXACT.get(type(module), type(module))
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
        if name is None:
            target = self._fresh(node, kind or type(module).__name__.lower())
        else:
            target, module = self._named(name, module)
        if not isinstance(module, m.BATCH_NORMS):
            operators.check(module, f"{target}{source_line(node)}")
        self.modules[target] = module
        return self.graph.call_module(target, args)

    def _named(self, name: str, module: nn.Module) -> tuple[str, nn.Module]:
        if name not in self.modules:
            return name, module
        count = 1
        while f"{name}_{count}" in self.taken:
            count += 1
        self.taken.add(f"{name}_{count}")
        return f"{name}_{count}", _sharing_copy(module)

    def _fresh(self, node: fx.Node, kind: str) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        scope = next(reversed(stack.values()), ("",))[0] if stack else ""
        if node.op == "call_module":
            scope = str(node.target).rpartition(".")[0]
        base = f"{scope}.{kind}" if scope else kind
        name, count = base, 0
        while name in self.taken or name in self.modules:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name

    def argument(self, node: fx.Node, position: int, name: str, default: Any = None) -> Any:
        """A non-tensor argument of the original call, constants resolved."""
        value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
        return fx.node.map_arg(value, lambda n: self.constant(node, n))

    def constant(self, user: fx.Node, node: fx.Node) -> Any:
        first, second = self.first[node.name], self.second[node.name]
        if isinstance(first, Tensor):
            raise self.unsupported(user, "an argument is computed from data")
        if first != second:
            raise self.unsupported(user, "an argument depends on the batch size")
        return first

    def tensor(self, node: fx.Node, position: int, name: str = "input") -> fx.Node:
        """A tensor argument of the original call, in the new graph."""
        value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
        return self.mapped(node, value)

    def mapped(self, node: fx.Node, value: Any) -> fx.Node:
        if isinstance(value, fx.Node) and value in self.new:
            return self.new[value]
        raise self.unsupported(node, "an operand is not computed from the network's inputs")

    def rank(self, node: Any) -> int:
        return len(self.first[node.name].shape)

    def shape(self, node: Any) -> tuple[int, ...]:
        return tuple(self.first[node.name].shape)

    def shape_with_batch(self, node: fx.Node) -> tuple[int, ...]:
        """The node's shape with -1 for the one dimension that grows with the batch."""
        first, second = self.first[node.name].shape, self.second[node.name].shape
        shape = [int(a) if a == b else -1 for a, b in zip(first, second, strict=True)]
        if shape.count(-1) != 1:
            raise self.unsupported(
                node, f"exactly one dimension must hold the batch, the result has shape {tuple(first)}"
            )
        return tuple(shape)

    def unsupported(self, node: fx.Node, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{node.name}{source_line(node)}: {why}. Write it with supported operations "
            f"({', '.join(sorted({t.__name__ for t in operators.OPERATORS}))}) or keep this part outside the network."
        )


def _sharing_copy(module: nn.Module) -> nn.Module:
    """A second module with the same parameters."""
    twin = copy.copy(module)
    for store in ("_parameters", "_buffers", "_modules"):
        setattr(twin, store, dict(getattr(module, store)))
    return twin


def _method_name(node: fx.Node) -> str:
    """`relu_` and `relu` are the same here: a prepared graph has no in-place operations."""
    name = str(node.target)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name
