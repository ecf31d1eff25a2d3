"""Whether a prepared network computes what the user's does: operation by operation, on the user's own values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pow2quant.errors import ModelError, UnsupportedModelError
from pow2quant.frontends.builder import Builder
from pow2quant.frontends.captured import operation, scope
from pow2quant.frontends.copies import address
from pow2quant.frontends.export import first_line, source_line


def close(value: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by rounding only, as far as that can be told from their size."""
    if value.shape != expected.shape:
        return False
    value, expected = value.float(), expected.float()
    if torch.equal(value, expected):
        return True
    size = float(torch.linalg.vector_norm(expected, math.inf))
    if not math.isfinite(size):  # NaN and infinity have to be the same; the rest says how large values are
        size = float(torch.linalg.vector_norm(expected.masked_fill(~torch.isfinite(expected), 0), math.inf))
    bound = 0.1 * tolerance * size + 1e-12
    rows = [(value, expected)] if not value.ndim else zip(value, expected, strict=True)  # one by one: they may be large
    return all(_near(a, b, tolerance, bound) for a, b in rows)


def _near(value: Tensor, expected: Tensor, tolerance: float, bound: float) -> bool:
    if float(torch.linalg.vector_norm(value - expected, math.inf)) <= bound:  # one pass each; almost always enough
        return True
    return torch.allclose(value, expected, rtol=tolerance, atol=bound, equal_nan=True)


class Once(TorchDispatchMode):
    """Within it, what PyTorch calls on tensors that it was called on before is not computed again.

    The tensors that something writes into count as new.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self._known: dict[Any, tuple[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`, or looks up what it gave. A result is kept with its operands: their memory is not used anew."""
        if func._schema.is_mutable:
            self._known.clear()
        if func._schema.is_mutable or func.is_view:  # a view costs nothing, and must be new
            return func(*args, **(kwargs or {}))
        call = func, _identity(args), _identity(kwargs or {})
        if call not in self._known:
            self._known[call] = func(*args, **(kwargs or {})), args
        return self._known[call][0]


def _identity(value: Any) -> Any:
    """What two arguments of an operation have in common only if they are the same."""
    if isinstance(value, Tensor):
        return address(value), value.shape, value.stride(), value.dtype
    if isinstance(value, dict):
        return tuple((name, _identity(x)) for name, x in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_identity, value))
    return type(value), value


HALVES = (torch.float16, torch.bfloat16)


def is_mask(value: Tensor) -> bool:
    """Whether all that is not finite in a table is minus infinity: attention adds such masks."""
    return value.ndim > 1 and not bool((torch.isnan(value) | (value == math.inf)).any())


class Lockstep:
    """Runs the captured network, and beside each of its operations the prepared nodes that stand for it.

    These get the user's values, so rounding differences do not add up through a deep network; and nothing is kept
    longer than something reads it. Where both call the same operation of PyTorch's on the same tensors, it runs once.
    """

    def __init__(self, builder: Builder, network: fx.GraphModule, which: int = 0) -> None:
        """which: of the two captures."""
        self.builder, self.network = builder, network
        self.captured = builder.programs[which].graph
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self.prepared: dict[fx.Node, Any] = {}
        self.users: dict[fx.Node, Any] = {}
        self._kept = set(network.graph.nodes)

    def run(self, batch: list[Tensor]) -> list[Tensor]:
        """Compares on one batch of the capture's size, which is used up; returns what the captured network returns.

        Raises UnsupportedModelError, naming the operation.
        """
        returned: list[Tensor] = []
        last, last_prepared = self._last_uses()
        for node, twin in zip(self.builder.programs[0].graph.nodes, self.captured.nodes, strict=True):
            if node.op == "placeholder" and node in self.builder.results:
                self.users[twin] = value = batch.pop(0)
                self._set(self.builder.results[node], value)
                del value
                self._run([n for n in self.builder.made.get(node, ()) if n in self._kept])
            elif node in self.builder.made:
                with Once():
                    self._step(node, twin)
            elif node.op == "output":
                leaves = pytree.tree_leaves(twin.args[0])
                returned = [self.users[n] for n in leaves if isinstance(n, fx.Node)]
            for gone in last.get(twin, ()):
                self.users.pop(gone, None)
            for gone in last_prepared.get(node, ()):
                self.prepared.pop(gone, None)
        self.users.clear()
        self.prepared.clear()
        return returned

    def _set(self, prepared: fx.Node, value: Any) -> None:
        self.prepared[prepared] = value
        if isinstance(value, Tensor):
            self.shapes[prepared.name] = (value.shape, value.dtype)

    def _step(self, node: fx.Node, twin: fx.Node) -> None:
        if operation(node).startswith("_assert"):
            return
        made = [n for n in self.builder.made[node] if n in self._kept]
        try:
            self._run(made)
        except Exception as error:  # whatever a module raises for a shape that its row did not expect
            raise _unlike(node, first_line(error)) from error
        result = self.builder.results.get(node)
        if result is None or result not in made:
            self.users[twin] = self._captured(node, twin)
            return
        value = self.prepared.pop(result)
        self.users[twin] = expected = self._captured(node, twin)
        tolerance = 3e-2 if expected.dtype in HALVES else 1e-3  # the prepared network computes in float32 everywhere
        if value is not expected and not close(value, expected, tolerance):
            raise _unlike(node, "its values differ.")
        self._set(result, expected.to(value.dtype))

    def _run(self, made: Sequence[fx.Node]) -> None:
        for step in made:
            module = self.network.get_submodule(str(step.target))
            self._set(step, module(*fx.node.map_arg(step.args, lambda n: self.prepared[n])))

    def _captured(self, node: fx.Node, twin: fx.Node) -> Any:
        """What the user's operation gives. Raises ModelError, naming it, where it fails."""
        assert callable(twin.target)

        def value(n: fx.Node) -> Any:
            return self.builder.constants[n] if n in self.builder.constants else self.users[n]

        args, kwargs = fx.node.map_arg((twin.args, twin.kwargs), value)
        try:
            return twin.target(*args, **kwargs)
        except Exception as error:
            raise ModelError(f"{scope(node)}: {node.name}{source_line(node)} fails: {first_line(error)}") from error

    def _last_uses(self) -> tuple[dict[fx.Node, list[fx.Node]], dict[fx.Node, list[fx.Node]]]:
        """For every captured node what nothing reads behind it: captured values, and prepared ones."""
        last: dict[fx.Node, fx.Node] = {}
        last_prepared: dict[fx.Node, fx.Node] = {}
        for node, twin in zip(self.builder.programs[0].graph.nodes, self.captured.nodes, strict=True):
            for read in twin.all_input_nodes:
                last[read] = twin
            for step in self.builder.made.get(node, ()):
                for read in step.all_input_nodes:
                    last_prepared[read] = node
        return _inverted(last), _inverted(last_prepared)


def _unlike(node: fx.Node, why: str) -> UnsupportedModelError:
    """The error for an operation whose prepared modules do not compute what it does."""
    where = f"{scope(node)}: " if scope(node) else ""
    return UnsupportedModelError(
        f"{where}{node.name}{source_line(node)}: {operation(node)} is not prepared as it is written (an argument "
        f"that is not supported): {why} Please write it in another way."
    )


def _inverted(last: dict[fx.Node, fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    found: dict[fx.Node, list[fx.Node]] = {}
    for read, node in last.items():
        found.setdefault(node, []).append(read)
    return found
