"""The network, plans and tables that backends are held to, and what the checks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pow2quant.artifact import Site, Table
from pow2quant.backends.base import Backend, Simulation, Tap
from pow2quant.backends.custom import CustomSimulation
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.config import QuantPlan, TensorSpec
from pow2quant.errors import Pow2QuantError
from pow2quant.frontends.prepare import prepare
from pow2quant.pow2_constraints import Encoding, power_of_two

PLAN = QuantPlan(
    weight=TensorSpec(8, symmetric=True, per_channel=True),
    input=TensorSpec(8, symmetric=False),
    output=TensorSpec(8, symmetric=False),
    bias=TensorSpec(32, symmetric=True),
)
LOW_BITS = replace(PLAN, weight=TensorSpec(3, symmetric=True, per_channel=True), output=TensorSpec(4, symmetric=False))
BLOCKS = replace(PLAN, weight=TensorSpec(4, symmetric=True, per_channel=True, block=16))
PER_TENSOR = replace(PLAN, weight=TensorSpec(8, symmetric=True), output=TensorSpec(8, symmetric=True))
WIDE = replace(PLAN, weight=TensorSpec(16, symmetric=True, per_channel=True), output=TensorSpec(16, symmetric=False))
FREE = QuantPlan(
    weight=TensorSpec(8, symmetric=True, per_channel=True, power_of_2=False),
    input=TensorSpec(8, symmetric=False, power_of_2=False),
    output=TensorSpec(8, symmetric=False, power_of_2=False),
    bias=TensorSpec(32, symmetric=True, power_of_2=False),
)


class Network(nn.Module):
    """(N, 3, 8, 8) -> logits (N, 5) and (N, 8): every way in which placement treats a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.side = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.shared = nn.Conv2d(8, 8, 1)
        self.tied = nn.Conv2d(8, 8, 1)
        self.gate = nn.Conv2d(8, 16, 1)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input is read twice, a module is called twice, a concatenation ties the one input that it alone reads."""
        a = self.stem(x) + F.relu6(self.side(x))
        b = F.hardswish(self.depthwise(F.max_pool2d(a, 2)))
        b = self.shared(F.relu(self.shared(b)))
        c = torch.cat([F.max_pool2d(self.tied(a), 2), b], 1)
        c = c * torch.sigmoid(self.gate(F.silu(b).mean((2, 3), keepdim=True)))
        logits: Tensor = self.fc(self.up(c).mean((2, 3)))
        return logits, b.mean((2, 3))


@cache
def prepared() -> fx.GraphModule:
    """The network, prepared, its batch norm folded; made once, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean, module.running_var = torch.randn(8) / 4, torch.rand(8) + 0.5
        return fold_batch_norm(prepare(model, batch()))


def batch(n: int = 8, seed: int = 1) -> Tensor:
    """Inputs of the network, (n, 3, 8, 8)."""
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def simulation(backend: Backend, plan: QuantPlan = PLAN, calibrated: bool = True) -> Simulation:
    """The backend's simulation of the network."""
    sim = backend(prepared(), batch(), plan)
    if calibrated:
        sim.calibrate([batch(), batch(4, 2)])
    return sim


def outputs_of(model: nn.Module, x: Tensor | None = None) -> tuple[Tensor, ...]:
    """Copies of what the model gives for `x`, or for `batch()`."""
    with torch.no_grad():
        result = model(batch() if x is None else x)
    return tuple(y.clone() for y in result)


def same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    """Whether all tensors are equal, element by element."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_tables(got: Table, expected: Table) -> None:
    """Raises AssertionError, with the first site, where two tables differ."""
    assert set(got) == set(expected), f"sites {sorted(set(got) ^ set(expected))} are in one table only"
    wrong = [name for name in expected if got[name] != expected[name]]
    assert not wrong, f"{wrong[0]}: {got[wrong[0]]} instead of {expected[wrong[0]]} ({len(wrong)} sites differ)"


@contextmanager
def raises(error: type[Pow2QuantError], *words: str) -> Iterator[None]:
    """Asserts that the error is raised, with these words in its message."""
    message = None
    try:
        yield
    except error as raised:
        message = str(raised)
    assert message is not None, f"{error.__name__} was not raised"
    missing = [word for word in words if word not in message]
    assert not missing, f"the message {message!r} does not name {missing}"


def float_tap(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
    """The tap that leaves out quantization."""
    return x


def names_of(sim: Simulation, *roles: str) -> set[str]:
    """The sites with these roles."""
    return {s.name for s in sim.sites if s.role in roles}


def some_table(sim: Simulation, plan: QuantPlan, seed: int = 0) -> Table:
    """An encoding for every site: other exponents than calibration's, odd zero points, a narrow grid."""
    rng = np.random.default_rng(seed)
    table = simulation(CustomSimulation, plan).encodings()
    for site in sim.sites:
        old = table[site.name]
        if site.role == "bias":
            continue
        scale = old.scale * power_of_two(rng.integers(-2, 3, old.scale.shape))
        zero_point = old.zero_point if old.grid.signed else np.array(rng.integers(int(old.grid.qmax) + 1))
        narrow = old.grid.signed and bool(rng.integers(2))
        table[site.name] = Encoding(scale, zero_point, replace(old.grid, narrow=narrow), old.axis, old.block)
    return table


def tapped(
    sim: Simulation, x: Tensor | None = None, graded: bool = False, flow: Tap = lambda s, x, xq: xq
) -> dict[str, tuple[Tensor, Tensor]]:
    """Every site's value before and behind quantization, in one forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def tap(site: Site, value: Tensor, quantized: Tensor) -> Tensor:
        assert site.name not in seen, f"{site.name} is tapped twice"
        seen[site.name] = value.detach().clone(), quantized.detach().clone()
        return flow(site, value, quantized)

    with sim.intercept(tap), torch.set_grad_enabled(graded):
        sim.model(batch() if x is None else x)
    return seen
