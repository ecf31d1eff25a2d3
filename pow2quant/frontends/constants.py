"""What a captured network computes that does not depend on data: evaluated at once, in both captures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from pow2quant.frontends.captured import operation, unsupported

EMPTY = frozenset({"empty", "empty_like", "new_empty", "empty_permuted", "empty_strided"})
"""Operations whose result has no values yet."""

BY_SHAPE = (
    frozenset({"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill", "zero"})
    | frozenset({"isnan", "isinf", "isposinf", "isneginf", "isfinite"})
    | EMPTY
)
"""Operations of which the first operand's shape counts, not its values: what is quantized is finite."""

LIKE_OTHER = frozenset({"type_as", "expand_as", "view_as", "reshape_as"})
"""Operations of which the second operand's shape and type count, not its values."""


class Constants(dict[fx.Node, Any]):
    """Values that do not depend on data, by node of either capture.

    model: the user's network. programs: it, captured for two batch sizes. twins: by node of the first capture that of
    the second. weighted: the nodes whose values follow from weights.
    """

    def __init__(self, model: nn.Module, programs: tuple[ExportedProgram, ExportedProgram]) -> None:
        super().__init__()
        self.model, self.programs = model, programs
        self.state = frozenset(model.state_dict())
        self.twins: dict[fx.Node, fx.Node] = {}
        self.weighted: set[fx.Node] = set()

    def take(self, node: fx.Node, twin: fx.Node, spec: InputSpec, other: InputSpec) -> None:
        """A parameter, a buffer, or a constant that forward makes: of a placeholder in both captures."""
        key = str(spec.target)
        if spec.kind is InputKind.PARAMETER:
            value: Any = self.model.get_parameter(key)
            self[node] = self[twin] = value
        else:
            first, second = (_held(p, str(s.target)) for p, s in zip(self.programs, (spec, other), strict=True))
            value = first.clone() if isinstance(first, Tensor) else first
            self[node] = value
            self[twin] = value if _same(first, second) else second
        if key in self.state:
            self.weighted.add(node)

    def evaluate(self, node: fx.Node, twin: fx.Node) -> None:
        """An operation on constants: run now, once where both captures have the same operands."""
        if any(a in self.weighted for a in node.all_input_nodes):
            self.weighted.add(node)
        pairs = zip(node.all_input_nodes, twin.all_input_nodes, strict=True)
        same = not differ(node, twin) and all(self[a] is self[b] for a, b in pairs)
        try:
            with torch.no_grad():
                self[node] = value = self._run(node)
                self[twin] = value if same else self._run(twin)
        except Exception as error:
            raise unsupported(node, f"fails on constants ({error})") from error

    def _run(self, node: fx.Node) -> Any:
        assert callable(node.target)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self[n])
        kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        result = node.target(*args, **kwargs)
        return result.zero_() if operation(node) in EMPTY else result

    def read_by_shape(self, node: fx.Node) -> int | None:
        """Which operand is the only one that is computed from data, and counts by its shape and type alone."""
        if operation(node) in BY_SHAPE:
            return 0
        return 1 if operation(node) in LIKE_OTHER and node.args[0] in self else None

    def by_shape(self, node: fx.Node, at: int) -> Any:
        """What an operation makes that reads the shape and type of operand `at` only."""
        data = node.args[at]
        assert isinstance(data, fx.Node)
        held = self.get(data)
        self[data] = torch.zeros(data.meta["val"].shape, dtype=data.meta["val"].dtype)
        try:
            return self._run(node)
        finally:
            del self[data]
            if held is not None:
                self[data] = held

    def tensor(self, node: fx.Node, value: Any) -> Tensor:
        """A constant tensor that has no row per image, or equal ones (then one row, that broadcasts)."""
        result: Tensor
        first, second = self[value], self[self.twins[value]]
        if first is second or (first.shape == second.shape and torch.equal(first, second)):
            result = torch.as_tensor(first)
            return result
        if first.ndim == second.ndim:
            free = [d for d in range(first.ndim) if first.shape[d] != second.shape[d]]
            if len(free) == 1:
                rows = [t.narrow(free[0], 0, 1) for t in (first, second)]
                if all(torch.equal(t, rows[0].expand_as(t)) for t in (first, second)):
                    result = rows[0].clone()
                    return result
        raise unsupported(node, "a constant depends on the batch size")

    def parameter(self, node: fx.Node, value: Any) -> nn.Parameter:
        """A weight: the user's own parameter, so that it stays shared, or one made of a constant."""
        if not isinstance(value, fx.Node) or value not in self:
            raise unsupported(node, "a weight is computed from the network's inputs")
        held = self[value]
        if isinstance(held, nn.Parameter):
            return held
        return nn.Parameter(self.tensor(node, value).detach().float())

    def is_written(self, value: Any) -> bool:
        """Whether a constant stands in the user's code: other weights do not change it."""
        return not isinstance(value, fx.Node) or (value in self and value not in self.weighted)

    def number(self, value: Any) -> float | None:
        """A constant with a single value, or None."""
        if isinstance(value, (bool, int, float)):
            return float(value)
        if isinstance(value, fx.Node) and value in self:
            held, twin = self[value], self[self.twins[value]]
            single = [
                float(torch.as_tensor(v).detach()) for v in (held, twin) if not isinstance(v, Tensor) or v.numel() == 1
            ]
            if len(single) == 2 and single[0] == single[1]:
                return single[0]
        return None


def differ(node: fx.Node, twin: fx.Node) -> bool:
    """Whether the two captures of an operation have different arguments, beside tensors."""
    plain = [fx.node.map_arg((n.args, n.kwargs), lambda _: None) for n in (node, twin)]
    return bool(plain[0] != plain[1])


def _held(program: ExportedProgram, key: str) -> Any:
    """A buffer, or a constant that forward makes."""
    return program.constants[key] if key in program.constants else program.state_dict[key]


def _same(first: Any, second: Any) -> bool:
    """Whether a constant is the same for both batch sizes."""
    if not isinstance(first, Tensor):
        return True
    return first is second or (first.shape == second.shape and torch.equal(first, second))
