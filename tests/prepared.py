"""Prepared networks built module by module, and how a quantized one is checked on every executor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from pow2quant import QuantPlan, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.prepare import PREPARED
from pow2quant.integer.certificate import certify
from pow2quant.integer.lower import lower
from pow2quant.runs.executors import simulation_executor
from pow2quant.validation import c99, engine, ort
from pow2quant.validation.agreement import compare


class Sketch:
    """A network under construction: `sketch("name", module, *arguments)` adds a call."""

    def __init__(self, *inputs: str) -> None:
        self.graph, self.modules = fx.Graph(), dict[str, nn.Module]()
        self.inputs = [self.graph.placeholder(name) for name in inputs]

    def __call__(self, name: str, module: nn.Module, *arguments: fx.Node) -> fx.Node:
        self.modules[name] = module
        return self.graph.call_module(name, arguments)

    def network(self, result: Any, *example: Tensor) -> fx.GraphModule:
        """The prepared network; example: a batch of two."""
        self.graph.output(result)
        network = fx.GraphModule(self.modules, self.graph).eval()
        larger = tuple(torch.cat([x, x[:1]]) for x in example)
        first, second = _Values(network), _Values(network)
        with torch.no_grad():
            first.run(*example)
            second.run(*larger)
        for node in network.graph.nodes:
            a, b = first.values.get(node.name), second.values.get(node.name)
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                free = tuple(p != q for p, q in zip(a.shape, b.shape, strict=True))
                node.meta.update(shape=tuple(a.shape), free=free, dtype=a.dtype)
        network.meta[PREPARED] = True
        return network


class _Values(fx.Interpreter):
    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def outcome(network: fx.GraphModule, batches: list[tuple[Tensor, ...]], folder: Any, bits: int = 8) -> dict[str, Any]:
    """Quantizes and compares with the simulation: differing elements by executor, or why it refuses.

    batches: the last one is compared, the others calibrate. proved: what the certificate says of the whole.
    """
    sim = simulate(network, batches[0], QuantPlan.default(activation_bits=bits))
    sim.calibrate(batches[:-1])
    artifact = sim.export(batches[0])
    path = onnx_qdq.export_qdq(artifact, folder)
    found: dict[str, Any] = {"proved": certify(artifact).proved}
    reference = simulation_executor(sim, "custom", torch.device("cpu"))
    data = [[x.numpy() for x in batches[-1]]]
    others = ort.executors(path)
    try:
        program = lower(onnx_qdq.from_qdq(onnx_qdq.load(path)))
        others += [engine.executor(program), c99.executor(program)]
    except UnsupportedModelError as error:
        found["integers"] = str(error)
    for agreement in compare(reference, others, data, artifact):
        found[agreement.executor] = agreement.differing
    return found
