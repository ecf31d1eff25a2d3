"""What a node of a captured graph says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import fx

from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.export import source_line


def operation(node: fx.Node) -> str:
    """The name of an operation without namespace, overload and the mark of writing in place."""
    packet = getattr(node.target, "overloadpacket", None)
    name = str(packet).rpartition(".")[2] if packet is not None else getattr(node.target, "__name__", str(node.target))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def arguments(node: fx.Node) -> SimpleNamespace:
    """All arguments of an operation by the names of its schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return SimpleNamespace(args=node.args, **node.kwargs)
    names = [a.name for a in schema.arguments]
    values: dict[str, Any] = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return SimpleNamespace(**values)


def scope(node: fx.Node) -> str:
    """The user's module in whose forward the node stands."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    paths: Sequence[str] = [path for path, _ in stack.values()]
    return str(paths[-1]).partition("@")[0] if paths else ""


def unsupported(node: fx.Node, why: str) -> UnsupportedModelError:
    """The error for a node, with the user's module and line."""
    where = scope(node)
    return UnsupportedModelError(
        f"{f'{where}: ' if where else ''}{node.name}{source_line(node)}: {why}. Write it with supported operations "
        "(`pow2quant list --operators`) or keep this part outside the network."
    )
