"""What flows through a simulation, beside what its float network computes from the same inputs: a sample per tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pow2quant.artifact import Site
from pow2quant.backends.base import Batch, Simulation, device_of, inputs, sent

SAMPLES = 32
"""Inputs that are run."""

ELEMENTS = 1 << 15
"""Values that are kept of each tensor."""


@dataclass(frozen=True)
class Sampled:
    """Values of one quantized tensor, float32 (n,); of a weight all of it, in its own shape.

    exact: in the float network. entering: in front of the simulation's quantizer. quantized: behind it. dead: the
    channels of a result that have one and the same value on all inputs, though not in the float network.
    """

    role: str
    exact: NDArray[np.float32]
    entering: NDArray[np.float32]
    quantized: NDArray[np.float32]
    dead: tuple[int, ...] = ()


@torch.no_grad()
def sample(sim: Simulation, batches: Iterable[Batch], seed: int) -> tuple[dict[str, Sampled], int]:
    """Runs the float network and the simulation on the first `SAMPLES` inputs.

    Returns samples by site name, and how many inputs there were. Biases are left out: their grid follows from the
    others, and is fine.
    """
    weights: dict[str, Sampled] = {}
    found: dict[str, list[Sampled]] = {}
    ranges: dict[str, list[tuple[Tensor, Tensor]]] = {}
    count = 0
    generator = torch.Generator().manual_seed(seed)
    device = device_of(sim.model)
    for batch in _first(batches, SAMPLES):
        chosen: dict[str, Tensor] = {}
        count += len(inputs(batch)[0])
        exact, reached = _exact(sim, batch, generator, chosen)

        def record(
            site: Site, x: Tensor, quantized: Tensor, chosen: Any = chosen, exact: Any = exact, reached: Any = reached
        ) -> Tensor:
            if site.role == "weight" and site.name not in weights:
                reference = sim.network.get_parameter(site.name)
                weights[site.name] = Sampled(site.role, _numpy(reference), _numpy(x), _numpy(quantized))
            elif site.name in chosen:
                entering, leaving = (_numpy(t.flatten()[chosen[site.name].to(t.device)]) for t in (x, quantized))
                found.setdefault(site.name, []).append(Sampled(site.role, exact[site.name], entering, leaving))
                if site.name in reached:
                    ranges.setdefault(site.name, []).append((reached[site.name], _range(quantized)))
            return quantized

        with sim.intercept(record):
            sim.model(*(sent(x, device) for x in inputs(batch)))
    return weights | {name: _joined(parts, ranges.get(name, [])) for name, parts in found.items()}, count


def _first(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """The first so many inputs, in batches as they come."""
    for batch in batches:
        part = tuple(x[:samples] for x in inputs(batch))
        yield part
        samples -= len(part[0])
        if samples <= 0:
            return


def _exact(
    sim: Simulation, batch: Batch, generator: torch.Generator, chosen: dict[str, Tensor]
) -> tuple[dict[str, NDArray[np.float32]], dict[str, Tensor]]:
    """Values of the float network's tensors at random places, which are noted in `chosen`, and ranges of results."""
    found: dict[str, NDArray[np.float32]] = {}
    ranges: dict[str, Tensor] = {}
    places = max(1, ELEMENTS * len(inputs(batch)[0]) // SAMPLES)

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            site = sim.placement.quantized.get(n.name)
            if site is not None:
                size = result.numel()
                chosen[site.name] = (
                    torch.arange(size) if size <= places else torch.randint(size, (places,), generator=generator)
                )
                found[site.name] = _numpy(result.flatten()[chosen[site.name].to(result.device)])
                if site.role == "output" and result.ndim in (2, 4, 5):
                    ranges[site.name] = _range(result)
            return result

    Recorder(sim.network).run(*(x.to(device_of(sim.network)) for x in inputs(batch)))
    return found, ranges


def _range(x: Tensor) -> Tensor:
    """The least and the largest value of each channel, (2, C), of (N, C, …)."""
    rows = x.detach().transpose(0, 1).flatten(1)
    return torch.stack([rows.amin(1), rows.amax(1)]).cpu()


def _dead(ranges: list[tuple[Tensor, Tensor]]) -> tuple[int, ...]:
    """See `Sampled.dead`. ranges: of every batch in the float network, and quantized."""
    if not ranges:
        return ()
    exact, quantized = (torch.stack(parts) for parts in zip(*ranges, strict=True))
    varies, still = (part[:, 1].amax(0) > part[:, 0].amin(0) for part in (exact, quantized))
    return tuple((varies & ~still).nonzero().flatten().tolist())


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy().copy()


def _joined(parts: list[Sampled], ranges: list[tuple[Tensor, Tensor]]) -> Sampled:
    exact, entering, quantized = (np.concatenate([getattr(p, k) for p in parts]) for k in VALUES)
    return Sampled(parts[0].role, exact, entering, quantized, _dead(ranges))


VALUES = ("exact", "entering", "quantized")
