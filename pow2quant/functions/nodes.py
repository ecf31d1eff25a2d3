"""Which definition an ONNX node bears, and which nodes it stands for."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pow2quant.functions.divisions import quotient, resampling
from pow2quant.functions.log_softmax import LogSoftmax
from pow2quant.functions.lookup import Lookup
from pow2quant.functions.norm import Norm
from pow2quant.functions.softmax import Softmax

if TYPE_CHECKING:
    import onnx

    from pow2quant.graphs import GraphIndex
    from pow2quant.pow2_constraints import Encoding

KEY = "pow2quant.function"
"""The key in a node's metadata under which its definition stands."""

Definition = Softmax | LogSoftmax | Norm | Lookup

KINDS: dict[str, type[Softmax] | type[LogSoftmax] | type[Norm] | type[Lookup]] = {
    "softmax": Softmax,
    "log_softmax": LogSoftmax,
    "norm": Norm,
    "lookup": Lookup,
}
"""The definitions by the name that they have in a file."""


def mark(node: onnx.NodeProto, definition: Definition) -> None:
    """Writes a definition into a node's metadata."""
    kind = next(name for name, cls in KINDS.items() if cls is type(definition))
    node.metadata_props.add(key=KEY, value=json.dumps({"function": kind} | asdict(definition)))


def definition(node: onnx.NodeProto) -> Definition | None:
    """A node's definition; None where it has none, or one that is not known."""
    text = next((entry.value for entry in node.metadata_props if entry.key == KEY), None)
    if text is None:
        return None
    try:
        values = json.loads(text)
        return KINDS[values.pop("function")](**{key: _tuples(value) for key, value in values.items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def region(
    index: GraphIndex, table: dict[str, Encoding], node: onnx.NodeProto
) -> tuple[list[onnx.NodeProto], tuple[str, ...]]:
    """The nodes that a node's definition stands for, in order, and the encoded tensors that they read, in theirs.

    No tensors where these are not as many as the definition has operands.
    """
    found = {node.output[0]: node}
    sources: dict[str, None] = {}
    pending = list(reversed(node.input))
    while pending:
        name = pending.pop()
        if not name or name in index.constants or name in found:
            continue
        if name in table:
            sources[name] = None
        elif name in index.producers:
            found[name] = index.producers[name]
            pending += reversed(found[name].input)
        else:
            return [], ()
    ordered = [index.graph.node[i] for i in sorted({index.order[name] for name in found})]
    operands = 1 + getattr(definition(node), "masked", False)
    return (ordered, tuple(sources)) if len(sources) == operands else ([], ())


def inside_definitions(index: GraphIndex, table: dict[str, Encoding]) -> set[str]:
    """What is computed inside of definitions, resamplings and quotients: all but their results."""
    found = set[str]()
    for node in index.graph.node:
        for known in (resampling(index, table, node), quotient(index, table, node)):
            found |= set() if known is None else known.inner
        if definition(node) is not None:
            found |= {n.output[0] for n in region(index, table, node)[0]} - set(node.output)
    return found


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
