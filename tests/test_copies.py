"""Copies of a network share its memory until one of them is written; no write is ever seen by the other."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pow2quant import prepare, simulate
from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.frontends.copies import address, array, copied, is_shared, share


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 8), nn.Linear(8, 8)
    return nn.Sequential(*layers).eval()


def memory(*tensors: Tensor) -> int:
    """Bytes that tensors take together."""
    return sum({address(t): t.numel() * t.element_size() for t in tensors}.values())


WRITES = {
    "in place": lambda p: p.detach().add_(1),
    "data": lambda p: p.data.add_(1),
    "a view": lambda p: p.detach().view(-1)[::2].add_(1),
    "numpy": lambda p: np.add(p.detach().numpy(), 1, out=p.detach().numpy()),
    "an optimizer": lambda p: (setattr(p, "grad", torch.ones_like(p)), torch.optim.SGD([p], 1.0).step()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize("first", [True, False], ids=["the network", "the copy"])
def test_a_write_is_seen_by_one_of_the_two(write, first):
    own = network()
    twin, before = copied(own), copy.deepcopy(own)
    assert all(address(a) == address(b) for a, b in zip(own.parameters(), twin.parameters(), strict=True))
    changed, other = (own, twin) if first else (twin, own)
    for p in changed.parameters():
        write(p)
    for a, b, expected in zip(changed.parameters(), other.parameters(), before.parameters(), strict=True):
        assert torch.equal(b, expected)
        assert not torch.equal(a, expected)


def test_a_copy_is_a_copy_where_memory_cannot_be_shared():
    own = network()
    own[3].weight = nn.Parameter(torch.from_numpy(np.ones((8, 288), np.float32)))
    rows = torch.ones(9, 8)
    own[4].weight, own[4].bias = nn.Parameter(rows[:8]), nn.Parameter(rows[8])
    twin = copied(own)
    assert [is_shared(p) for p in twin.parameters()] == [True, True, False, True, False, False]
    with torch.no_grad():
        own[3].weight.zero_()
        own[4].bias.zero_()
    assert twin[3].weight.eq(1).all()
    assert twin[4].bias.eq(1).all()


def test_shared_parameters_stay_shared():
    own = network()
    own[4].bias = own[3].bias
    own[4].requires_grad_(False)
    twin = copied(own)
    assert twin[4].bias is twin[3].bias
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in own.parameters()]


def test_reading_values_parts_no_copies():
    x = torch.randn(4)
    y = share(x)
    assert np.array_equal(array(y), array(x))
    assert is_shared(x)
    assert address(x) == address(y)
    part = torch.arange(4.0)[1:]
    assert address(part) == part.data_ptr()


def test_a_calibrated_simulation_holds_weights_twice():
    """As they are, in the memory of the user's network, and quantized."""
    own, batch = network(), torch.randn(4, 3, 8, 8)
    sim = simulate(own, batch)
    sim.calibrate([batch])
    with torch.no_grad():
        sim(batch)
    sim.export()
    kept = [t for q in sim.model.modules() if isinstance(q, FakeQuantize) for t in q._kept or ()]
    held = [*own.parameters(), *sim.network.parameters(), *sim.model.parameters(), *kept]
    assert memory(*held) == 2 * memory(*own.parameters())


def through_a_view(weight: Tensor) -> Callable[[Tensor], object]:
    """A write through numpy's view of a weight, which is made before the simulation runs."""
    values = weight.detach().numpy()
    return lambda _: np.add(values, 1, out=values)


@pytest.mark.parametrize("write", [*WRITES.values(), through_a_view], ids=[*WRITES, "an older view"])
def test_a_quantized_weight_follows_every_write(write):
    batch = torch.randn(4, 3, 8, 8)
    sim = simulate(prepare(network(), batch), batch)
    sim.calibrate([batch])
    weight = sim.parameter("3.weight")
    write = write(weight) if write is through_a_view else write
    with torch.no_grad():
        before = sim(batch)
        write(weight)
        after = sim(batch)
        sim.load(sim.encodings())  # forgets what was kept
        assert torch.equal(sim(batch), after)
    assert not torch.equal(before, after)
