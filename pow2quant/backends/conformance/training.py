"""Gradients, saved states and copies."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor, nn

from pow2quant.artifact import Site
from pow2quant.backends.base import Backend, Simulation
from pow2quant.backends.conformance.network import (
    LOW_BITS,
    PLAN,
    assert_tables,
    batch,
    float_tap,
    names_of,
    outputs_of,
    prepared,
    same,
    simulation,
    some_table,
)
from pow2quant.backends.custom import CustomSimulation


def _gradients(model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    sum((y * y).sum() for y in model(batch() if x is None else x)).backward()
    found = {name: model.get_parameter(name).grad for name, _ in prepared().named_parameters()}
    assert all(g is not None and g.any() for g in found.values()), "a parameter gets no gradient"
    return {name: g.clone() for name, g in found.items() if g is not None}


def gradients_reach_the_parameters(backend: Backend) -> None:
    """In the float tap they are the float network's; quantizers let them through unchanged inside the grid."""
    sim = simulation(backend)
    with sim.intercept(float_tap):
        floats, expected = _gradients(sim.model), _gradients(copy.deepcopy(prepared()))
    assert all(torch.equal(floats[name], expected[name]) for name in expected)
    _gradients(sim.model)
    table = sim.encodings()

    def tap(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(quantized.sum(), x, retain_graph=True)
        codes = table[site.name].quantize(x.detach().numpy())
        inside = torch.from_numpy((codes > table[site.name].grid.qmin) & (codes < table[site.name].grid.qmax))
        assert inside.any(), site
        assert (gradient[inside] == 1).all(), f"{site.name}: the gradient of the quantizer is not 1"
        return quantized

    with sim.intercept(tap):
        sim.model(batch().requires_grad_())


def gradients_reach_what_a_weight_tap_adds(backend: Backend) -> None:
    """As learned rounding needs it."""
    sim = simulation(backend)
    names = names_of(sim, "weight")
    added = {name: torch.zeros_like(sim.model.get_parameter(name), requires_grad=True) for name in names}
    with sim.intercept(lambda s, x, xq: xq + added[s.name] if s.name in added else xq):
        _gradients(sim.model)
    assert all(v.grad is not None and v.grad.any() for v in added.values())


def training_keeps_powers_of_two(backend: Backend) -> None:
    """Whatever the model declares trainable; and the trained state computes what `custom` makes of it."""
    for make in (lambda p: torch.optim.SGD(p, 0.05), lambda p: torch.optim.Adam(p, 0.01)):
        sim = simulation(backend)
        before = sim.model.get_parameter("fc.weight").detach().clone()
        optimizer = make(sim.model.parameters())
        for _ in range(10):
            _gradients(sim.model)
            optimizer.step()
        assert not torch.equal(sim.model.get_parameter("fc.weight"), before)
        assert all(encoding.is_power_of_two for encoding in sim.encodings().values())
        reference = CustomSimulation(prepared(), batch(), PLAN)
        _copy_parameters(sim, reference)
        reference.load(sim.encodings())
        assert same(outputs_of(sim.model), outputs_of(reference.model)), (
            "the scales in use are not those of encodings()"
        )


def _copy_parameters(source: Simulation, target: Simulation) -> None:
    with torch.no_grad():
        for name, _ in prepared().named_parameters():
            target.model.get_parameter(name).copy_(source.model.get_parameter(name))


def state_can_be_saved_and_restored(backend: Backend) -> None:
    """`state_dict()` and the table are all there is to save; files are read without running code."""
    sim = simulation(backend, LOW_BITS)
    with torch.no_grad():
        for parameter in sim.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.1)
    table = some_table(sim, LOW_BITS)
    sim.load(table)
    file = io.BytesIO()
    torch.save(sim.model.state_dict(), file)
    file.seek(0)
    restored = simulation(backend, LOW_BITS, calibrated=False)
    restored.model.load_state_dict(torch.load(file, weights_only=True))
    restored.load(table)
    assert_tables(restored.encodings(), table)
    assert same(outputs_of(restored.model), outputs_of(sim.model))


def writing_a_weight_takes_effect(backend: Backend) -> None:
    """At the next call, after a call without gradients too; a frozen weight counts."""
    sim, reference = simulation(backend), simulation(CustomSimulation)
    sim.model.requires_grad_(False)
    for step in range(3):
        with torch.no_grad():
            sim.model.get_parameter("stem.0.weight").mul_(0.5)
        reference = CustomSimulation(prepared(), batch(), PLAN)
        _copy_parameters(sim, reference)
        reference.load(sim.encodings())
        assert same(outputs_of(sim.model), outputs_of(reference.model)), f"write {step + 1} was not seen"


def copies_are_independent(backend: Backend) -> None:
    """`copy.deepcopy` of a simulation."""
    sim = simulation(backend)
    table, before = sim.encodings(), outputs_of(sim.model)
    twin = copy.deepcopy(sim)
    assert_tables(twin.encodings(), table)
    assert same(outputs_of(twin.model), before)
    twin.load({})
    with torch.no_grad():
        twin.model.get_parameter("fc.weight").add_(1)
    assert_tables(sim.encodings(), table)
    assert same(outputs_of(sim.model), before)
