"""What `calibrate`, `load` and `encodings` do."""

from __future__ import annotations

import numpy as np
import torch

from pow2quant.backends.base import Backend, Tap
from pow2quant.backends.conformance.network import (
    BLOCKS,
    FREE,
    LOW_BITS,
    PER_TENSOR,
    PLAN,
    WIDE,
    assert_tables,
    batch,
    names_of,
    outputs_of,
    prepared,
    raises,
    same,
    simulation,
    some_table,
    tapped,
)
from pow2quant.backends.custom import CustomSimulation
from pow2quant.backends.placement import place
from pow2quant.errors import ConfigError, DataError, EncodingError
from pow2quant.pow2_constraints import Encoding, IntGrid


def equal_data_give_equal_encodings(backend: Backend) -> None:
    """The tables and outputs are those of `custom`, for every kind of plan, and `calibrate` returns `encodings()`."""
    for plan in (PLAN, LOW_BITS, PER_TENSOR, WIDE, FREE):
        sim, reference = simulation(backend, plan, calibrated=False), simulation(CustomSimulation, plan)
        assert_tables(sim.calibrate([batch(), batch(4, 2)]), reference.encodings())
        assert_tables(sim.encodings(), reference.encodings())
        assert same(outputs_of(sim.model, batch(3, 5)), outputs_of(reference.model, batch(3, 5)))


def scales_are_powers_of_two(backend: Backend) -> None:
    """Exactly, with even zero points; without the constraint they are not."""
    for plan in (PLAN, LOW_BITS, PER_TENSOR, WIDE):
        for name, encoding in simulation(backend, plan).encodings().items():
            assert encoding.is_power_of_two, f"{name}: {encoding.scale}"
            assert not (encoding.zero_point % 2).any(), f"{name}: {encoding.zero_point}"
    free = simulation(backend, FREE).encodings().values()
    assert sum(encoding.is_power_of_two for encoding in free) < len(free) / 2


def biases_lie_on_the_lattice(backend: Backend) -> None:
    """The scale of a bias is s_in * s_w, and the simulation computes with the quantized bias."""
    for plan in (PLAN, PER_TENSOR, FREE):
        sim = simulation(backend, plan)
        table, seen = sim.encodings(), tapped(sim)
        for layer in place(prepared(), plan).layers:
            assert layer.bias is not None
            assert layer.weight is not None
            assert layer.input is not None
            scale = table[layer.input.name].scale * table[layer.weight.name].scale
            assert (table[layer.bias.name].scale == scale).all(), layer.bias.name
            _, quantized = seen[layer.bias.name]
            assert np.array_equal(quantized.numpy(), table[layer.bias.name].fake_quantize(quantized.numpy()))
    tap: Tap = lambda s, x, xq: xq + (s.name == "shared.bias")  # noqa: E731
    before = outputs_of(sim.model)
    with sim.intercept(tap):
        assert not same(outputs_of(sim.model), before), "the bias that the tap returned is not used"


def blocks_are_those_of_custom_or_refused(backend: Backend) -> None:
    """Weights with a scale for each block of inputs: the tables, outputs and files of `custom`; or a clear refusal."""
    reference, refusal = simulation(CustomSimulation, BLOCKS), ""
    try:
        sim = simulation(backend, BLOCKS)
    except ConfigError as error:
        refusal = str(error)
    if refusal:
        assert "block" in refusal, refusal
        return
    assert_tables(sim.encodings(), reference.encodings())
    weights = names_of(sim, "weight")
    assert {name for name in weights if sim.encodings()[name].block is None} == {"depthwise.weight"}
    table = some_table(sim, BLOCKS)
    for each in (sim, reference):
        each.load(table)
    assert_tables(sim.encodings(), table)
    assert same(outputs_of(sim.model), outputs_of(reference.model))
    for name, (before, after) in tapped(sim).items():
        assert np.array_equal(after.numpy(), table[name].fake_quantize(before.numpy())), name


def ties_share_an_encoding(backend: Backend) -> None:
    """What a concatenation alone reads has the concatenation's encoding, and both uses of one weight have one."""
    leaders = place(prepared(), PLAN).leaders
    assert leaders == {"tied.output": "concat.output", "shared.weight": "shared_1.weight"}
    table = simulation(backend).encodings()
    assert all(table[follower] == table[leader] for follower, leader in leaders.items())


def a_table_survives_loading(backend: Backend) -> None:
    """`encodings() == table` after `load`, bit for bit, in another simulation too; and again."""
    for plan in (PLAN, LOW_BITS, PER_TENSOR, WIDE, FREE):
        sim = simulation(backend, plan, calibrated=False)
        assert sim.encodings() == {}
        for seed in (0, 1):
            table = some_table(sim, plan, seed)
            sim.load(table)
            assert_tables(sim.encodings(), table)
        reference = CustomSimulation(prepared(), batch(), plan)
        reference.load(table)
        assert same(outputs_of(sim.model), outputs_of(reference.model))


def a_part_of_a_table_can_be_loaded(backend: Backend) -> None:
    """The sites that it leaves out have no encoding afterwards and pass their values; an empty one: all of them."""
    sim = simulation(backend)
    table = {name: e for name, e in sim.encodings().items() if name in names_of(sim, "weight")}
    sim.load(table)
    assert_tables(sim.encodings(), table)
    seen = tapped(sim)
    assert all(torch.equal(*seen[name]) for name in names_of(sim, "input", "output", "bias"))
    assert not any(torch.equal(*seen[name]) for name in table)
    sim.load({})
    assert sim.encodings() == {}
    assert same(outputs_of(sim.model), outputs_of(prepared()))
    assert_tables(sim.encodings(), {})


def unknown_sites_are_refused(backend: Backend) -> None:
    """With an error that names one; nothing is loaded then."""
    sim = simulation(backend)
    before = sim.encodings()
    encoding = Encoding(np.array(1, np.float32), np.array(0), IntGrid(8, signed=False))
    with raises(EncodingError, "no.such.output"):
        sim.load({"fc.output": encoding, "no.such.output": encoding})
    assert_tables(sim.encodings(), before)


def roles_are_calibrated_on_their_own(backend: Backend) -> None:
    """The others stay as they are, to the last bit."""
    sim = simulation(backend)
    for roles in ({"weight"}, {"input", "output"}, {"output"}, {"bias"}, {"weight", "bias"}):
        table = some_table(sim, PLAN, len(roles))
        sim.load(table)
        sim.calibrate([batch(8, 3) * 3], roles)
        kept = {s.name for s in sim.sites} - names_of(sim, *roles)
        after = sim.encodings()
        assert_tables({name: after[name] for name in kept}, {name: table[name] for name in kept})
        assert any(after[name] != table[name] for name in names_of(sim, *roles))


def calibration_is_deterministic(backend: Backend) -> None:
    """Two simulations of one network agree; a second calibration with the same data changes nothing."""
    first, second = simulation(backend), simulation(backend)
    assert_tables(second.encodings(), first.encodings())
    assert same(outputs_of(first.model), outputs_of(second.model))
    assert same(outputs_of(first.model), outputs_of(first.model))
    assert_tables(second.calibrate([batch(), batch(4, 2)]), first.encodings())


def bad_calibration_data_are_refused(backend: Backend) -> None:
    """No data, and data that are not finite, with the tensor's name."""
    sim = simulation(backend, calibrated=False)
    with raises(DataError, "empty"):
        sim.calibrate([])
    poisoned = batch()
    poisoned[0, 0, 0, 0] = torch.nan
    with raises(DataError, "x", "batch 1"):
        sim.calibrate([batch(), poisoned])


def export_needs_every_encoding(backend: Backend) -> None:
    """A site without one is named."""
    sim = simulation(backend, calibrated=False)
    with raises(EncodingError, "x"):
        sim.export(batch())
    sim.calibrate([batch()])
    sim.load({name: e for name, e in sim.encodings().items() if name != "up.output"})
    with raises(EncodingError, "up.output"):
        sim.export(batch())
