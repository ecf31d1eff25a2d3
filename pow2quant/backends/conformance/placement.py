"""Where quantizers stand, and what tensors and modules are called."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import torch

from pow2quant.backends.base import Backend
from pow2quant.backends.conformance.network import (
    LOW_BITS,
    PLAN,
    assert_tables,
    batch,
    names_of,
    outputs_of,
    prepared,
    same,
    simulation,
)
from pow2quant.backends.custom import CustomSimulation
from pow2quant.backends.placement import place


def sites_are_those_of_the_placement(backend: Backend) -> None:
    """One site per quantized tensor, in order of computation, for several plans."""
    no_stem = replace(PLAN, overrides=(("stem.0", None), ("shared*", {"weight": None})))
    for plan in (PLAN, replace(PLAN, output=None), replace(PLAN, weight=None, input=None), no_stem):
        sim = simulation(backend, plan)
        assert tuple(sim.sites) == place(prepared(), plan).sites
        assert set(sim.encodings()) == {s.name for s in sim.sites}
        assert same(outputs_of(sim.model), outputs_of(simulation(CustomSimulation, plan).model))


def submodules_keep_their_names_and_float_parameters(backend: Backend) -> None:
    """`model` has the network's submodules; `.weight` and `.bias` are its floats, trainable, and copies."""
    network, model = prepared(), simulation(backend).model
    missing = {name for name, _ in network.named_modules()} - {name for name, _ in model.named_modules()}
    assert not missing, f"the model has no {sorted(missing)[0]}"
    for name, parameter in network.named_parameters(remove_duplicate=False):
        own = model.get_parameter(name)
        assert (own.dtype, own.requires_grad, own.is_leaf) == (torch.float32, True, True), name
        assert torch.equal(own, parameter), name
        assert own.data_ptr() != parameter.data_ptr(), f"{name} is the network's own"
    assert model.get_parameter("shared.weight") is model.get_parameter("shared_1.weight"), "a shared weight was copied"


def the_network_is_left_as_it_is(backend: Backend) -> None:
    """Neither a simulation nor its training changes what it was made of."""
    network = copy.deepcopy(prepared())
    state, code = copy.deepcopy(network.state_dict()), network.code
    sim = backend(network, batch(), PLAN)
    sim.calibrate([batch()])
    with torch.no_grad():
        sim.model.get_parameter("fc.weight").add_(1)
    assert network.code == code
    assert list(network.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def methods_find_what_they_look_for(backend: Backend) -> None:
    """The float network, the placement, and the parameters by name, shared ones too."""
    network = prepared()
    sim = backend(network, batch(), LOW_BITS)
    assert sim.network is network
    assert sim.placement == place(network, LOW_BITS)
    for name, _ in network.named_parameters(remove_duplicate=False):
        assert sim.parameter(name) is sim.model.get_parameter(name), name


def onnx_names_are_the_users(backend: Backend) -> None:
    """Nodes are called as modules, initializers as parameters; parameters lie on their grids; no site gets lost."""
    sim = simulation(backend)
    artifact, table = sim.export(batch()), sim.encodings()
    modules = {name for name, m in prepared().named_modules() if not list(m.children()) and name}
    assert modules <= {n.name for n in artifact.model.graph.node}
    assert [i.name for i in artifact.model.graph.input] == ["x"]
    assert_tables({name: artifact.encodings[name] for name in table}, table)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in artifact.model.graph.initializer}
    for name in names_of(sim, "weight", "bias"):
        expected = table[name].fake_quantize(sim.model.get_parameter(name).detach().numpy())
        assert np.array_equal(values[name], expected), name
