"""What `intercept` shows and changes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pow2quant.artifact import Site
from pow2quant.backends.base import Backend
from pow2quant.backends.conformance.network import (
    batch,
    float_tap,
    outputs_of,
    prepared,
    same,
    simulation,
    tapped,
)


def a_float_tap_gives_the_float_network(backend: Backend) -> None:
    """`lambda site, x, xq: x` is the prepared network, bit for bit, before and after calibration."""
    for calibrated in (False, True):
        sim = simulation(backend, calibrated=calibrated)
        with sim.intercept(float_tap):
            assert same(outputs_of(sim.model), outputs_of(prepared()))
            assert same(outputs_of(sim.model, batch(3, 4)), outputs_of(prepared(), batch(3, 4)))


def every_site_is_tapped_once(backend: Backend) -> None:
    """In the order of `sites`, with an encoding or without; parameters in their own shape, data with the batch."""
    for calibrated in (False, True):
        sim = simulation(backend, calibrated=calibrated)
        seen = tapped(sim, batch(3))
        assert list(seen) == [s.name for s in sim.sites]
        for site in sim.sites:
            before, after = seen[site.name]
            assert before.shape == after.shape, site
            assert before.dtype == after.dtype == torch.float32, site
            if site.role in ("weight", "bias"):
                assert torch.equal(before, sim.model.get_parameter(site.name)), site
            else:
                assert len(before) == 3, site


def what_is_tapped_stays(backend: Backend) -> None:
    """Tensors that a tap kept are not written afterwards."""
    sim = simulation(backend)
    kept: list[tuple[Tensor, Tensor]] = []

    def tap(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
        kept.extend((t, t.clone()) for t in (x, quantized))
        return quantized

    with sim.intercept(tap):
        outputs_of(sim.model)
    assert len(kept) == 2 * len(sim.sites)
    assert all(torch.equal(t, copied) for t, copied in kept)


def what_a_tap_returns_flows_on(backend: Backend) -> None:
    """At inputs, weights, biases and outputs."""
    sim = simulation(backend)
    doubled = copy.deepcopy(prepared())
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    with sim.intercept(lambda s, x, xq: x * 2 if s.role in ("weight", "bias") else x):
        assert same(outputs_of(sim.model), outputs_of(doubled))
    with sim.intercept(lambda s, x, xq: batch(8, 7) if s.role == "input" else x):
        assert same(outputs_of(sim.model), outputs_of(prepared(), batch(8, 7)))
    with sim.intercept(lambda s, x, xq: torch.full_like(x, 7) if s.name == "fc.output" else xq):
        assert (outputs_of(sim.model)[0] == 7).all()
    target = sim.sites[-1].name
    before = outputs_of(sim.model)
    with sim.intercept(lambda s, x, xq: xq if s.name != target else xq + 1):
        assert not same(outputs_of(sim.model), before)


def taps_end_with_their_context(backend: Backend) -> None:
    """Also after an exception; an inner tap replaces the outer one until it ends."""
    sim = simulation(backend)
    before = outputs_of(sim.model)
    with sim.intercept(float_tap):
        with sim.intercept(lambda s, x, xq: xq):
            assert same(outputs_of(sim.model), before)
        assert same(outputs_of(sim.model), outputs_of(prepared()))
    try:
        with sim.intercept(float_tap):
            raise KeyError
    except KeyError:
        pass
    assert same(outputs_of(sim.model), before)
