"""Writes the prepared graph from a captured one, node by node; what is special about an operation is in `aten`."""

from __future__ import annotations

import operator as py
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec
from torch.utils import _pytree as pytree

from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends import modules as m
from pow2quant.frontends import operators
from pow2quant.frontends.captured import arguments, operation, scope, unsupported
from pow2quant.frontends.constants import Constants, differ
from pow2quant.frontends.dropouts import DROPOUT
from pow2quant.frontends.export import overwrites, source_line
from pow2quant.frontends.kept import MOVES, TRUTH
from pow2quant.frontends.loops import Call, mark_loops
from pow2quant.frontends.naming import Names
from pow2quant.frontends.returned import Returned

Parts = Callable[[fx.Node, int], fx.Node]
"""One of an operation's several results: (the node that asks for it, which) -> it in the prepared graph."""

Handler = Callable[["Builder", fx.Node, SimpleNamespace], "fx.Node | Parts"]
"""A row of `aten`: (builder, captured node, its arguments by the names of the schema) -> the result."""

SIZED = frozenset({"view", "reshape", "_unsafe_view", "expand", "unflatten", "repeat", "affine_grid_generator"})
"""Operations whose size arguments may hold the batch size: their rows look at the result's shape instead."""


class Builder:
    """Writes the prepared graph.

    model: the user's network (a copy). programs: it, captured for two batch sizes. rows: by operation, see `Handler`.
    made: for every captured node that computes on data the prepared nodes written for it. results: which of them has
    its value. new: what later readers of it read: another one, where something wrote into it.
    constants: what does not depend on data; tensor, parameter, number and is_written are its methods.
    outputs: which of the tensors that the user's network returns the prepared one returns: each once. returned: how
    these stand in what the user's network returns. unrolled: over how many steps each recurrent layer is written out.
    cells: what was made of the weights of recurrent cells, by these. calls: of such cells, in order.
    """

    def __init__(
        self, model: nn.Module, programs: tuple[ExportedProgram, ExportedProgram], rows: Mapping[str, Handler]
    ) -> None:
        self.model, self.programs, self.rows = model, programs, rows
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.new: dict[fx.Node, fx.Node] = {}
        self.parts: dict[fx.Node, Parts] = {}
        self.made: dict[fx.Node, list[fx.Node]] = {}
        self.results: dict[fx.Node, fx.Node] = {}
        self.constants = Constants(model, programs)
        self.twins = self.constants.twins
        self.tensor, self.parameter = self.constants.tensor, self.constants.parameter
        self.number, self.is_written = self.constants.number, self.constants.is_written
        self.names = Names(model, self.modules)
        self.outputs: list[int] = []
        self.returned: Returned | None = None
        self.unrolled: dict[str, int] = {}
        self.cells: dict[tuple[int, ...], Any] = {}
        self.calls: list[Call] = []
        self.dropouts: dict[fx.Node, tuple[str, nn.Module]] = {}
        self._current: list[fx.Node] = []
        self._held: dict[fx.Node, fx.Node] = {}

    def build(self) -> fx.GraphModule:
        """The prepared network, without shapes. Raises UnsupportedModelError, naming the user's line."""
        first, second = self.programs
        specs = {s.arg.name: s for s in first.graph_signature.input_specs}
        others = iter(second.graph_signature.input_specs)  # in the same order, perhaps under other names
        self.names.read(first.graph, specs)
        for node, twin in zip(first.graph.nodes, second.graph.nodes, strict=True):
            self.twins[node] = twin
            if node.op == "placeholder":
                self._placeholder(node, twin, specs[node.name], next(others))
            elif node.op == "output":
                self.graph.output(self._output(node))
            elif node.op == "get_attr":
                self.constants[node] = getattr(first.graph_module, str(node.target))
                self.constants[twin] = getattr(second.graph_module, str(twin.target))
            elif all(a in self.constants for a in node.all_input_nodes):
                self.constants.evaluate(node, twin)
            elif node.op == "call_function" and (at := self.constants.read_by_shape(node)) is not None:
                for one in (node, twin):
                    self.constants[one] = self.constants.by_shape(one, at)
            else:
                self._current = self.made[node] = []
                self._convert(node)
        self._mark_dropouts()
        self.unrolled |= mark_loops(self.calls, self.modules)
        network = fx.GraphModule(self.modules, self.graph).eval()
        network.graph.eliminate_dead_code()
        network.delete_all_unused_submodules()
        network.recompile()
        return network

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, twin: fx.Node, spec: InputSpec, other: InputSpec) -> None:
        if spec.kind is not InputKind.USER_INPUT:
            self.constants.take(node, twin, spec, other)
        elif isinstance(spec.arg, ConstantArgument):
            self.constants[node] = self.constants[twin] = spec.arg.value
        else:
            self.new[node] = self.results[node] = given = self.graph.placeholder(node.name)
            if node.meta["val"].dtype == torch.bool and node.users:
                self._current = self.made[node] = []
                self.new[node] = self.call(node, m.Real(), given)
                self.new[node].meta[TRUTH] = True

    def _convert(self, node: fx.Node) -> None:
        if node.target is py.getitem:
            self.new[node] = self.results[node] = self._part(node)
            return
        name = operation(node)
        if name.startswith("_assert"):
            return
        handler = self.rows.get(name)
        if handler is None:
            raise self.unsupported(node, f"{name}() is not supported")
        if name not in SIZED and differ(node, self.twins[node]):
            raise self.unsupported(node, "an argument depends on the batch size")
        try:
            result = handler(self, node, arguments(node))
        except UnsupportedModelError:
            raise
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            raise self.unsupported(node, f"not understood as it is written ({error})") from error
        if not isinstance(result, fx.Node):
            self.parts[node] = result
            return
        self.new[node] = self.results[node] = result
        if node.meta["val"].dtype == torch.bool or self._stays_truth(result):
            result.meta[TRUTH] = True
        if overwrites(node):
            written = node.args[0]
            assert isinstance(written, fx.Node)
            self.new[written] = result

    def _mark_dropouts(self) -> None:
        for node, dropout in self.dropouts.items():
            for reader in self._readers(node):
                for index, operand in enumerate(reader.all_input_nodes):
                    if operand is self.results[node]:
                        reader.meta.setdefault(DROPOUT, {}).setdefault(index, []).append(dropout)

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """The prepared nodes that were written for the readers of a captured one, also behind what does nothing."""
        for user in node.users:
            if user.op == "output":
                yield next(iter(reversed(self.graph.nodes)))
            elif self.made.get(user):
                yield from self.made[user]
            elif self.results.get(user) is self.results[node]:
                yield from self._readers(user)

    def _part(self, node: fx.Node) -> fx.Node:
        source, index = node.args[0], node.args[1]
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        if source not in self.parts:
            raise self.unsupported(node, "indexing of something that is no list of tensors")
        return self.parts[source](node, index)

    def _output(self, node: fx.Node) -> Any:
        self._current = []
        results: list[fx.Node] = []
        leaves = pytree.tree_leaves(node.args[0])
        for i, leaf in enumerate(x for x in leaves if isinstance(x, fx.Node)):
            if leaf not in self.new:
                raise UnsupportedModelError(
                    "the network must return tensors that are computed from its inputs; one of them is a constant"
                )
            if self.new[leaf] not in results:
                results.append(self.new[leaf])
                self.outputs.append(i)
        if not results:
            raise UnsupportedModelError("the network returns no tensor")
        spec = self.programs[0].call_spec.out_spec
        which = {leaf: results.index(self.new[leaf]) for leaf in leaves if isinstance(leaf, fx.Node)}
        self.returned = None if spec is None else Returned.of(spec, leaves, which)
        return results[0] if spec is not None and spec.is_leaf() else tuple(results)

    # -- what rows use -----------------------------------------------------------------------------------------------

    def call(
        self, node: fx.Node, module: nn.Module, *args: fx.Node, name: str | None = None, kind: str | None = None
    ) -> fx.Node:
        """Adds a call of `module`, under the name of the user's module, or one made of the scope and `kind`."""
        module.__class__ = m.EXACT.get(type(module), type(module))
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
        kind = kind or type(module).__name__.lower()
        target = self.names.of(node, kind) if name is None else self.names.free(name)
        if not isinstance(module, m.BATCH_NORMS):
            operators.check(module, f"{target}{source_line(node)}")
        self.modules[target] = module.eval()
        made = self.graph.call_module(target, args)
        self._current.append(made)
        return made

    def drop_out(self, node: fx.Node, module: nn.Module) -> None:
        """Notes a dropout, which a prepared network does not have: see `DROPOUT`."""
        self.dropouts[node] = self.names.of(node, "dropout"), module.eval()

    def is_data(self, value: Any) -> bool:
        """Whether an argument is computed from the network's inputs."""
        return isinstance(value, fx.Node) and value not in self.constants

    def counts(self, value: Any) -> bool:
        """Whether an argument is integers that count, such as tokens: they have no scale."""
        dtype = value.meta["val"].dtype
        whole = not dtype.is_floating_point and not dtype.is_complex and dtype.itemsize > 1
        return whole and self._is_counted(self.new[value])

    def _is_counted(self, node: fx.Node) -> bool:
        """Whether a prepared node's values are integers that follow from such alone."""
        module = self.modules.get(str(node.target))
        real = TRUTH in node.meta or isinstance(module, (m.Compare, m.CompareIntegers, m.Real))
        return isinstance(module, (m.ArgMax, m.Places, m.Whole)) or (
            not real and all(map(self._is_counted, node.all_input_nodes))
        )

    def _stays_truth(self, node: fx.Node) -> bool:
        """Whether a prepared node's values are 0 and 1, also where the user's are integers or reals."""
        module, operands = self.modules.get(str(node.target)), node.all_input_nodes
        moved = isinstance(module, MOVES) and TRUTH in operands[0].meta
        return moved or isinstance(module, m.CompareIntegers)

    def operand(self, node: fx.Node, value: Any) -> fx.Node:
        """A tensor argument in the prepared graph; a constant one becomes a module that holds it."""
        if isinstance(value, fx.Node) and value in self.new:
            return self.new[value]
        if isinstance(value, fx.Node) and value in self.constants:
            return self._hold(node, value)
        raise self.unsupported(node, "an operand is not a tensor")

    def real(self, node: fx.Node, value: Any) -> fx.Node:
        """A tensor argument; where the operation gives real numbers, integers that count become such."""
        x = self.operand(node, value)
        is_real = node.meta["val"].dtype.is_floating_point
        return self.call(node, m.Real(), x) if is_real and self.is_data(value) and self.counts(value) else x

    def tensor_or_number(self, node: fx.Node, value: Any) -> fx.Node:
        """An operand that may be a number."""
        number = self.number(value)
        return self.real(node, value) if number is None else self.hold(node, torch.tensor(number))

    def module(self, node: fx.Node) -> nn.Module | None:
        """The user's module in whose forward a captured node stands."""
        return self.names.users.get(scope(node))

    def _hold(self, node: fx.Node, value: fx.Node) -> fx.Node:
        if value not in self._held:
            name = self.names.keys.get(value)
            name = None if name is None or name in self.names.taken else name
            self._held[value] = self.hold(node, self.tensor(node, value), name)
        return self._held[value]

    def hold(self, node: fx.Node, tensor: Tensor, name: str | None = None) -> fx.Node:
        """A constant as a node of the prepared graph."""
        return self.call(node, m.Constant(tensor.detach().float()), name=name, kind="constant")

    def owner(self, node: fx.Node, weight: Any) -> str | None:
        """The name for a layer: the module that has `weight`, if that holds no other modules."""
        return self.names.owner(node, weight, self.constants.get(weight))

    @staticmethod
    def shape(node: Any) -> tuple[int, ...]:
        """The shape of a captured node, for the smaller batch."""
        return tuple(int(d) for d in node.meta["val"].shape)

    def rank(self, node: Any) -> int:
        """The number of dimensions of a captured node."""
        return len(self.shape(node))

    def free(self, node: Any) -> tuple[bool, ...]:
        """Which dimensions of a captured node grow with the batch."""
        return tuple(a != b for a, b in zip(self.shape(node), self.shape(self.twins[node]), strict=True))

    def open_shape(self, node: Any) -> list[int]:
        """The shape of a captured node with -1 for what grows with the batch."""
        return [-1 if free else d for d, free in zip(self.shape(node), self.free(node), strict=True)]

    def shape_with_batch(self, node: fx.Node) -> tuple[int, ...]:
        """The same where one dimension grows at most. Raises UnsupportedModelError for several."""
        shape = self.open_shape(node)
        if shape.count(-1) > 1:
            raise self.unsupported(node, f"more than one dimension grows with the batch: {self.shape(node)}")
        return tuple(shape)

    unsupported = staticmethod(unsupported)
    """See `captured.unsupported`."""
