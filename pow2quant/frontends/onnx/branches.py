"""The branch that an If takes, as part of the graph around it."""

from __future__ import annotations

from onnx import GraphProto, NodeProto, helper

from pow2quant.bounds import inner_graphs
from pow2quant.frontends.onnx.file import OnnxFile, array_of, attribute, ordered


def take_branches(file: OnnxFile) -> None:
    """Replaces every If whose condition is a constant by the nodes of the branch that it takes.

    Names of the branch stay where they are free. Raises UnsupportedModelError for a node without that branch.
    """
    taken = {t for node in file.nodes for t in (*node.input, *node.output)} | {name for name, _ in file.inputs}
    taken |= {*file.constants, *file.outputs}
    nodes: list[NodeProto] = []
    for node in file.nodes:
        condition = file.constants.get(node.input[0]) if node.op_type == "If" else None
        nodes += [node] if condition is None else _branch(file, node, bool(condition.reshape(()).item()), taken)
    file.nodes = ordered(file, nodes)
    file.forget()


def _branch(file: OnnxFile, node: NodeProto, condition: bool, taken: set[str]) -> list[NodeProto]:
    graph = attribute(node, "then_branch" if condition else "else_branch")
    if not isinstance(graph, GraphProto) or len(graph.output) != len(node.output):
        raise file.error(node, "the branch that it takes is missing, or has other results than the node")
    made = [t.name for t in graph.initializer] + [t for n in graph.node for t in n.output if t]
    names = {}
    for name in made:
        names[name] = _free(name, taken)
        taken.add(names[name])
    for tensor in graph.initializer:
        file.constants[names[tensor.name]] = array_of(tensor, file.name)
    _rename(graph, names)
    pairs = zip(graph.output, node.output, strict=True)
    ends = [helper.make_node("Identity", [names.get(v.name, v.name)], [name]) for v, name in pairs if name]
    return [*graph.node, *ends]


def _free(name: str, taken: set[str]) -> str:
    free, count = name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


def _rename(graph: GraphProto, names: dict[str, str]) -> None:
    """Gives tensors other names, in the graph and where those in its nodes read them."""
    for node in graph.node:
        node.input[:] = [names.get(t, t) for t in node.input]
        node.output[:] = [names.get(t, t) for t in node.output]
        for inner in inner_graphs(node):
            made = {t.name for t in inner.initializer} | {t for n in inner.node for t in n.output}
            outer = {old: new for old, new in names.items() if old not in made}
            _rename(inner, outer)
            for value in inner.output:
                value.name = outer.get(value.name, value.name)
