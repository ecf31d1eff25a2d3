"""What quantizers compute."""

from __future__ import annotations

import torch
from torch import Tensor

from pow2quant.artifact import Site
from pow2quant.backends.base import Backend
from pow2quant.backends.conformance.network import (
    FREE,
    LOW_BITS,
    PER_TENSOR,
    PLAN,
    assert_tables,
    batch,
    names_of,
    outputs_of,
    same,
    simulation,
    some_table,
    tapped,
)


def values_are_fake_quantized(backend: Backend) -> None:
    """At every site as `Encoding.fake_quantize` does it, with and without gradients: ties, saturation, signs."""
    for plan in (PLAN, LOW_BITS, PER_TENSOR, FREE):
        sim = simulation(backend, plan)
        table = some_table(sim, plan)
        sim.load(table)
        spread = torch.linspace(-300, 300, 1201).repeat(2)  # whole and half codes, far beyond both ends
        huge = torch.tensor([0.0, -0.0, 1e-30, 1e9, -1e9, 3e19, -3e19, 1e30, -1e30])
        values = torch.cat([huge, spread])
        with torch.no_grad():
            for name in names_of(sim, "weight", "bias"):
                parameter = sim.model.get_parameter(name)
                unit = torch.from_numpy(table[name].along(table[name].scale, parameter.shape).copy())
                parameter.copy_(values[torch.arange(parameter.numel()) * 7 % len(values)].view_as(parameter) * unit)
        x = values[torch.arange(8 * 192) % len(values)].view(8, 3, 8, 8) * float(table["x"].scale)
        for graded in (False, True):
            for name, (before, after) in tapped(sim, x, graded, flow=_tame).items():
                expected = table[name].fake_quantize(before.numpy())
                wrong = int((after.numpy() != expected).sum())
                assert not wrong, f"{name}: {wrong} of {after.numel()} values differ ({plan})"


def _tame(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
    """Keeps what flows on finite, and halves of codes frequent."""
    return quantized.clamp(-1, 1) if site.role in ("weight", "bias") else quantized


def batches_have_any_size_and_stay_unharmed(backend: Backend) -> None:
    """The result of a sample does not depend on its batch, and inputs are not written."""
    sim = simulation(backend)
    x = batch(6)
    together = outputs_of(sim.model, x)
    for i in (0, 5):
        assert same(outputs_of(sim.model, x[i : i + 1]), tuple(y[i : i + 1] for y in together))
    assert torch.equal(x, batch(6)), "the simulation wrote over its input"


def results_stay_on_the_device(backend: Backend) -> None:
    """Of the network; also on a GPU, where there is one."""
    sim = simulation(backend)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        sim.model.to(device)
        table = sim.encodings()
        assert all(y.device.type == device for y in outputs_of(sim.model, batch().to(device)))
        sim.calibrate([batch(4, 9)])
        sim.load(table)
        assert all(p.device.type == device for p in sim.model.parameters())
        assert_tables(sim.encodings(), table)
