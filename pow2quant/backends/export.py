"""From a calibrated simulation to an artifact: float ONNX with on-grid weights, and encodings by ONNX tensor name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from torch import Tensor, fx, nn

from pow2quant import targets
from pow2quant.artifact import Artifact, Table, note_recurrent
from pow2quant.backends.placement import Placement, tensor_name, value_type
from pow2quant.errors import EncodingError, UnsupportedModelError
from pow2quant.frontends.copies import array
from pow2quant.frontends.operators import operator
from pow2quant.frontends.unrolled import recurrent
from pow2quant.frontends.writing import OPSET, Node, OnnxGraph
from pow2quant.functions import accepts, mark
from pow2quant.operators import Kind
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN

IR_VERSION = 10
"""The first that knows opset 21."""


def to_artifact(
    network: fx.GraphModule,
    placement: Placement,
    table: Table,
    parameter: Callable[[str], Tensor],
) -> Artifact:
    """Writes a prepared network as ONNX; site names become ONNX names here, and only here (they are equal).

    parameter: the float tensor of a weight or bias, by `<module>.weight` or `<module>.bias`. The target is noted.
    Raises EncodingError when a site has no encoding, or a bias is off the lattice s_in * s_w.
    """
    _check_complete(placement, table)
    graph = OnnxGraph()
    encodings: Table = {}
    for node in network.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "call_module":
            _emit(network, node, graph, table, parameter, encodings)
            if node.name in placement.exact:
                source, result = (table[site.name] for site in placement.exact[node.name])
                module: Any = _current(network.get_submodule(str(node.target)), node, parameter)
                module.rounding = placement.roundings.get(placement.exact[node.name][1].name, HALF_EVEN)
                shape = tuple(int(d) for d in node.args[0].meta["shape"])
                defined = module.definition(shape, source, result) if accepts(source) else None
                if defined is not None:
                    mark(graph.nodes[-1], defined)
        site = placement.carried[node.name]
        if site is not None:
            encodings[tensor_name(node)] = table[site.name]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes, "pow2quant", _inputs(network), _outputs(network), initializer=graph.initializers
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="pow2quant",
    )
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker's errors share no base
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"the network cannot be written as ONNX: {reason}") from error
    targets.note(model, placement.target)
    note_recurrent(model, recurrent(network, tensor_name))
    return Artifact(model, encodings)


def _check_complete(placement: Placement, table: Table) -> None:
    missing = [s.name for s in placement.sites if s.name not in table]
    if missing:
        raise EncodingError(f"{missing[0]}: no encoding yet ({len(missing)} sites have none); calibrate first")
    for layer in placement.layers:
        if layer.bias is None or layer.input is None or layer.weight is None:
            continue
        lattice = table[layer.input.name].scale * table[layer.weight.name].per_channel.scale
        if not (table[layer.bias.name].scale == lattice).all():
            raise EncodingError(f"{layer.bias.name}: its scale is not s_in * s_w; calibrate the role bias again")


def _emit(
    network: fx.GraphModule,
    node: fx.Node,
    graph: OnnxGraph,
    table: Table,
    parameter: Callable[[str], Tensor],
    encodings: Table,
) -> None:
    module = network.get_submodule(str(node.target))
    row = operator(module)
    assert row is not None
    if row.kind is not Kind.WEIGHTED:
        module = _current(module, node, parameter)
    parameters: dict[str, str] = {}
    for kind in ("weight", "bias") if row.kind is Kind.WEIGHTED else filter(None, [row.stored]):
        if getattr(module, kind) is None:
            continue
        name = site = f"{node.target}.{kind}"
        value = array(parameter(name)).astype(np.float32, copy=False)
        if row.stored:
            site = tensor_name(node)
            name = name if node.args else site
        if site in table:
            encodings[name] = table[site]
            value = table[site].fake_quantize(value)
        parameters[kind] = graph.constant(name, value)
    sources = [a for a in node.args if isinstance(a, fx.Node)]
    inputs = tuple(tensor_name(a) for a in sources)
    shapes = tuple(a.meta["shape"] for a in sources)
    row.emit(module, Node(str(node.target), inputs, tensor_name(node), shapes, parameters), graph)


def _current(module: nn.Module, node: fx.Node, parameter: Callable[[str], Tensor]) -> nn.Module:
    """The module with its parameters as they are now."""
    if not module._parameters:
        return module
    module = copy.copy(module)
    own = {n: None if p is None else parameter(f"{node.target}.{n}") for n, p in module._parameters.items()}
    module._parameters = own  # type: ignore[assignment]
    return module


def _value_info(node: fx.Node) -> onnx.ValueInfoProto:
    shape = ["batch" if free else int(d) for d, free in zip(node.meta["shape"], node.meta["free"], strict=True)]
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(str(value_type(node)).removeprefix("torch.")))
    return onnx.helper.make_tensor_value_info(tensor_name(node), kind, shape)


def _inputs(network: fx.GraphModule) -> list[onnx.ValueInfoProto]:
    return [_value_info(n) for n in network.graph.nodes if n.op == "placeholder"]


def _outputs(network: fx.GraphModule) -> list[onnx.ValueInfoProto]:
    (end,) = [n for n in network.graph.nodes if n.op == "output"]
    results = end.args[0] if isinstance(end.args[0], (tuple, list)) else [end.args[0]]
    if any(n.op == "placeholder" for n in results) or len(set(results)) != len(results):
        raise UnsupportedModelError(
            "the network returns one of its inputs, or one result twice; return computed tensors"
        )
    return [_value_info(n) for n in results]
