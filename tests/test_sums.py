"""Sums with a width of their own: where it holds, that nothing else changes, and that every executor agrees."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pow2quant import prepare, simulate, validate
from pow2quant.backends.sums import separate
from pow2quant.config import QuantPlan, RunConfig, plan_of, with_values
from pow2quant.errors import ConfigError
from pow2quant.integer.certificate import certify


class Residual(nn.Module):
    """Two blocks: a sum with a ReLU behind it, one without, and a layer behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.first, self.inner, self.second = nn.Conv2d(8, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1)
        self.clip = nn.ReLU6()
        self.bottleneck, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.clip(self.second(self.inner(self.first(x))) + x)
        return self.head(self.bottleneck(x) + x)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def batch() -> Tensor:
    return torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plan(**values: object) -> QuantPlan:
    widths = {"quantization.weight.bitwidth": 4, "quantization.output.bitwidth": 4}
    return plan_of(with_values(RunConfig(), widths | {f"quantization.{key}": value for key, value in values.items()}))


def test_sums_and_what_they_add_are_wide_and_layers_read_them_narrow(network, batch):
    sim = simulate(network, batch[:1], plan(sums=8))
    bits = {s.name: sim.placement.specs[s.name].bits for s in sim.sites if s.role == "output"}
    wide = {name for name, width in bits.items() if width == 8}
    assert wide == {"relu.output", "second.output", "clip.output", "bottleneck.output", "add_1.output"}
    assert {"relu_narrow.output", "inner.output", "clip_narrow.output", "head.output"} <= {
        n for n in bits if bits[n] == 4
    }
    sources = {layer.module: layer.input.name for layer in sim.placement.layers}
    assert sources["first"] == "relu_narrow.output"
    assert sources["bottleneck"] == "clip_narrow.output"
    assert sources["head"] == "add_1.output"  # nothing clips that sum
    assert sim.placement.specs["stem.weight"].bits == 4


def test_the_float_network_computes_the_same_bits(network, batch):
    prepared = prepare(network, batch[:1])
    changed = copy.deepcopy(prepared)
    separate(changed)
    assert len(list(changed.graph.nodes)) == len(list(prepared.graph.nodes)) + 2
    once = changed.code
    separate(changed)
    assert changed.code == once
    assert torch.equal(changed(batch), prepared(batch))


def test_overrides_come_first_and_wider_outputs_stay(network, batch):
    own = plan(sums=8, overrides={"clip": {"output": {"bitwidth": 5}}})
    specs = simulate(network, batch[:1], own).placement.specs
    assert (specs["clip.output"].bits, specs["second.output"].bits) == (5, 8)
    specs = simulate(network, batch[:1], plan(sums=8, output={"bitwidth": 10})).placement.specs
    assert specs["clip.output"].bits == 10


@pytest.mark.parametrize("backend", ["custom", "aimet"])
def test_every_executor_computes_the_same(network, batch, backend):
    if backend == "aimet":
        pytest.importorskip("aimet_torch")
    sim = simulate(network, batch[:1], plan(sums=8), backend)
    sim.calibrate([batch])
    found = validate(sim, data=[batch])
    assert {a.differing for a in found.agreements} == {0}
    assert all(layer.proved for layer in certify(sim.export()).layers)


def test_wide_sums_are_closer_to_float(network, batch):
    def noise(**values: object) -> float:
        sim = simulate(network, batch[:1], plan(**values))
        sim.calibrate([batch])
        with torch.no_grad():
            return float((sim(batch) - network(batch)).square().mean())

    others = {"weight": {"bitwidth": 8}, "overrides": {"head": {"output": {"bitwidth": 8}}}}
    assert noise(sums=8, **others) < 0.7 * noise(**others)


@pytest.mark.parametrize("bits", [1, 17, True])
def test_a_width_that_no_output_can_have_is_refused(bits):
    with pytest.raises(ConfigError, match=r"quantization\.sums"):
        plan(sums=bits)
    with pytest.raises(ConfigError, match=r"plan\.sums"):
        QuantPlan(sums=bits)
