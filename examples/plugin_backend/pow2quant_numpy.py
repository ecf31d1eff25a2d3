"""A backend in a package of its own: the graph is interpreted, `Encoding.fake_quantize` quantizes.

`pip install examples/plugin_backend`, then `pow2quant ptq --backend numpy`. Its whole test suite is test_it.py.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
from torch import fx, nn

from pow2quant.backends.base import ALL
from pow2quant.backends.calibration import calibrate
from pow2quant.backends.export import to_artifact
from pow2quant.backends.placement import place
from pow2quant.errors import EncodingError


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, encoding):
        return torch.from_numpy(encoding.fake_quantize(x.detach().cpu().numpy())).to(x.device)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Run(fx.Interpreter):
    """One forward pass, with quantizers where the placement has them."""

    def run_node(self, n):
        site = self.module.simulation.placement.quantized.get(n.name)
        value = super().run_node(n)
        return value if site is None else self.module.simulation.quantize(site, value)

    def call_module(self, target, args, kwargs):
        sim = self.module.simulation
        sites = [s for s in sim.sites if s.module == target and s.role in ("weight", "bias")]
        quantized = {s.role: sim.quantize(s, sim.parameter(s.name)) for s in sites}
        return torch.func.functional_call(self.fetch_attr(target), quantized, args, kwargs)


class Network(nn.Module):
    """The prepared network's modules under their own names."""

    def __init__(self, network, simulation):
        super().__init__()
        self.graph, self.simulation = network.graph, simulation
        for name, module in network.named_children():
            self.add_module(name, module)

    def forward(self, *tensors):
        return Run(self, graph=self.graph).run(*tensors)


class NumpySimulation:
    def __init__(self, network, example, plan):
        self.network, self.placement = network, place(network, plan)
        self.sites, self.table, self.tap = self.placement.sites, {}, None
        self.model = Network(copy.deepcopy(network), self)

    def quantize(self, site, x):
        quantized = StraightThrough.apply(x, self.table[site.name]) if site.name in self.table else x
        return quantized if self.tap is None else self.tap(site, x, quantized)

    def parameter(self, name):
        return self.model.get_parameter(name)

    def calibrate(self, batches, roles=ALL):
        return calibrate(self, batches, roles)

    def encodings(self):
        return dict(self.table)

    def load(self, table):
        unknown = sorted(set(table) - {s.name for s in self.sites})
        if unknown:
            raise EncodingError(f"{unknown[0]}: the network has no such site")
        self.table = dict(table)

    @contextmanager
    def intercept(self, tap):
        before, self.tap = self.tap, tap
        try:
            yield
        finally:
            self.tap = before

    def export(self, example):
        return to_artifact(self.network, self.placement, self.encodings(), self.parameter)
