"""What the tensors of a file are here: by the modules' names, or by walking another exporter's graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pow2quant.artifact import Site
from pow2quant.backends.placement import Placement, tensor_name
from pow2quant.frontends.operators import operator, weight_axis
from pow2quant.frontends.writing import Node, OnnxGraph
from pow2quant.operators import Kind

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import fx


def onnx_types(network: fx.GraphModule) -> dict[str, str]:
    """What ONNX calls the modules of a prepared network, by name."""
    types = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            module, graph = network.get_submodule(str(node.target)), OnnxGraph()
            row = operator(module)
            assert row is not None
            sources = [a for a in node.args if hasattr(a, "meta")]
            names, shapes = (tuple(a.name for a in sources), tuple(a.meta["shape"] for a in sources))
            row.emit(module, Node(str(node.target), names, node.name, shapes, {"weight": "w", "bias": "b"}), graph)
            types[str(node.target)] = graph.nodes[-1].op_type if graph.nodes else row.onnx
    return types


def readers(network: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """By module the modules that read its result; an empty name is the network's own result."""
    modules = [node for node in network.graph.nodes if node.op == "call_module"]
    return {
        str(node.target): tuple("" if user.op == "output" else str(user.target) for user in node.users)
        for node in modules
    }


def channel_axis(network: fx.GraphModule, module: str) -> int:
    """The axis of a weight's channels."""
    return weight_axis(network.get_submodule(module)) or 0


Places = dict[str, "tuple[Site | None, int]"]
"""By a tensor's name in a file: the site whose encoding it has, and 0 for its own, 1 for one that is passed on."""


def _place_of(node: fx.Node, placement: Placement) -> tuple[Site | None, int]:
    own = placement.quantized.get(node.name)
    return (own, 0) if own is not None else (placement.carried[node.name], 1)


def torch_places(network: fx.GraphModule, placement: Placement) -> Places:
    """The names of AIMET's files that are named after torch modules, and of our own ONNX files."""
    places: Places = {s.name: (s, 0) for s in placement.sites if s.role == "weight"}
    for node in network.graph.nodes:
        if node.op == "output":
            continue
        places[tensor_name(node)] = _place_of(node, placement)
        for index, source in enumerate(node.args):
            name = f"{node.target}.input" + (f".{index}" if index else "")
            places[name] = (_place_of(source, placement)[0], 1)
    return places


ALIKE = (
    {"ReduceMean", "GlobalAveragePool", "AveragePool"},
    {"Flatten", "Reshape", "Squeeze", "Unsqueeze"},
    {"Relu", "Clip"},
    {"Gemm", "MatMul"},
    {"Add", "Sub", "Mul", "Div"},
)
"""Operations that different exporters write for the same module."""


def onnx_places(network: fx.GraphModule, placement: Placement, model: ModelProto) -> Places:
    """The tensor names of somebody else's ONNX file of the same network, found by walking both graphs side by side.

    A weighted node is known by the name of its weight, every other by what it reads and what it does.
    """
    same = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type in ("Identity", "Cast", "Dropout")}

    def source(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    initializers = {t.name for t in model.graph.initializer}
    arguments = iter([i.name for i in model.graph.input if i.name not in initializers])
    types = onnx_types(network)
    taken: set[int] = set()
    tensors: dict[fx.Node, str] = {}
    places: Places = {}
    for node in network.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            tensors[node] = next(arguments, "")
        else:
            kinds = next((k for k in ALIKE if types[str(node.target)] in k), {types[str(node.target)]})
            reads = {tensors.get(a, "") for a in node.args if hasattr(a, "op")}
            weighted = _kind(network, node) is Kind.WEIGHTED
            for number, other in enumerate(model.graph.node):
                inputs = {source(i) for i in other.input}
                named = weighted and f"{node.target}.weight" in inputs
                if number not in taken and (named or (other.op_type in kinds and reads <= inputs)):
                    taken.add(number)
                    tensors[node] = other.output[0]
                    break
        places[tensors.get(node, "")] = _place_of(node, placement)
    places |= {name: (places[source(name)][0], 1) for name in same if source(name) in places}
    places.pop("", None)
    return places


def _kind(network: fx.GraphModule, node: fx.Node) -> Kind | None:
    row = operator(network.get_submodule(str(node.target)))
    return row.kind if row is not None else None
