"""Operations without a row, replaced by those that PyTorch defines them with, where all of these have one."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from torch import fx
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind

from pow2quant.frontends.captured import operation
from pow2quant.frontends.export import ONE_AT_A_TIME, quiet

DEPTH = 4
"""So often a definition is replaced by the definitions of what it consists of."""


def decomposed(program: ExportedProgram, known: Container[str]) -> ExportedProgram:
    """The program, or itself with PyTorch's definitions in the place of operations on data that are not known.

    known: the names of operations. Unchanged where something unknown would be left: errors then name what the user
    wrote.
    """
    found = program
    for _ in range(DEPTH):
        unknown = _unknown(found, known)
        if not unknown:
            return found
        definitions = {op: _definition(op) for op in unknown}
        if None in definitions.values():
            return program
        try:
            with ONE_AT_A_TIME, quiet():
                found = found.run_decompositions(definitions)
        except Exception:  # PyTorch's definitions raise anything
            return program
    return program


def _unknown(program: ExportedProgram, known: Container[str]) -> set[Any]:
    """Operations that compute on what depends on the inputs."""
    inputs = {s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    data: set[fx.Node] = {node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs}
    unknown = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or data.isdisjoint(node.all_input_nodes):
            continue
        data.add(node)
        name = operation(node)
        if isinstance(node.target, OpOverload) and name not in known and not name.startswith("_assert"):
            unknown.add(node.target)
    return unknown


def _definition(op: Any) -> Callable[..., Any] | None:
    """How PyTorch writes an operation in others; None where it does not."""
    for table in (decomposition_table, default_decompositions()):
        if op in table:
            return table[op]
    return None
