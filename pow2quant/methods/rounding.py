"""Learned rounding: every weight goes to the code below or above it, whichever lets the part compute what it should.

The equations of AdaRound (Nagel et al. 2020, "Up or Down?"), and the loop that `adaround` and `qdrop` share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pow2quant.artifact import Site
from pow2quant.backends.base import Simulation
from pow2quant.config import ABOVE_ZERO, FROM_ZERO, SHARE, finite, integer
from pow2quant.errors import UnsupportedModelError
from pow2quant.methods.reconstruction import Quantize, Step, is_rounded, quantizing
from pow2quant.pow2_constraints import Encoding

ZETA, GAMMA = 1.1, -0.1
"""Between them the sigmoid is stretched, so that h reaches 0 and 1 (below eq. 23)."""

FROM_ONE = finite("a number from 1 up", lambda v: v >= 1)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) in [0, 1], how far a weight is rounded up (eq. 23)."""
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse(h: Tensor) -> Tensor:
    """The V with h(V) = h, for h in [0, 1]: where learning starts, so that every weight is at first what it was."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def regularizer(h: Tensor, beta: float) -> Tensor:
    """f_reg = sum of 1 - |2h - 1|^beta: 0 where every h is 0 or 1 (eq. 24)."""
    return h.numel() - (2 * h - 1).abs().pow(beta).sum()


def annealed(share: float, start: float, end: float) -> float:
    """beta when `share` of the steps after the warm-up is done: half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def mixed(quantized: Tensor, exact: Tensor, share: float) -> Tensor:
    """Element by element, the quantized value with probability `share`, otherwise the exact one: QDrop.

    Integers, such as tokens, are never quantized.
    """
    if share == 1 or not exact.is_floating_point():
        return quantized
    return exact.lerp(quantized, torch.rand_like(exact).lt_(share))  # exact at both ends, and faster than `where`


class SoftWeight:
    """A weight on its way to the code below or above: s * clip(floor(W / s) + h(V), low, high) (eq. 22)."""

    def __init__(self, weight: Tensor, encoding: Encoding) -> None:
        def beside(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.array(encoding.along(values, weight.shape), np.float32)).to(weight.device)

        self.scale = beside(encoding.scale)
        self.low, self.high = (beside(q - encoding.zero_point) for q in (encoding.grid.qmin, encoding.grid.qmax))
        quotient = weight.detach() / self.scale
        self.floor = quotient.floor()
        self.v = nn.Parameter(inverse(quotient - self.floor))

    def at(self, h: Tensor) -> Tensor:
        """The weight when it is rounded up by h."""
        return (self.floor + h).clamp(self.low, self.high) * self.scale

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """The weight on its grid: up where h(V) >= 1/2."""
        return self.at((self.v >= 0).float())


@dataclass(frozen=True)
class LearnedRounding:
    """What `adaround` and `qdrop` have in common: eq. 21 by Adam on V, part by part.

    iterations: steps for each part. weight: lambda, of the regularizer. b_start, b_end: its beta at first and at last.
    warmup: share of the steps without it. lr: Adam's, of V. batch_size: images in a step. input_prob: share of the
    values entering a part that are the quantized network's; the others are the float network's.
    """

    builds_on_exponents: ClassVar[bool] = True
    rounds_weights: ClassVar[bool] = True
    takes_blocks: ClassVar[bool] = True

    iterations: Annotated[int, integer(1)] = 1000
    weight: Annotated[float, FROM_ZERO] = 0.01
    b_start: Annotated[float, FROM_ONE] = 20.0
    b_end: Annotated[float, FROM_ONE] = 2.0
    warmup: Annotated[float, SHARE] = 0.2
    lr: Annotated[float, ABOVE_ZERO] = 0.01
    batch_size: Annotated[int, integer(1)] = 8
    input_prob: Annotated[float, SHARE] = 1.0

    def learn(
        self,
        step: Step,
        weights: Mapping[str, SoftWeight],
        quantize: Quantize,
        others: Sequence[nn.Parameter] = (),
        lr_others: float = 0.0,
        half_way: Callable[[], None] = lambda: None,
    ) -> None:
        """Trains V of the weights, by site name, and other parameters at a learning rate of their own.

        quantize: what stands at the other sites. The other parameters hold still in the second half, when the weights
        settle; `half_way` is called in between. Raises UnsupportedModelError where a first dimension counts no images.
        """
        entering, exact = ([torch.cat(x) for x in zip(*batches, strict=True)] for batches in (step.inputs, step.exact))
        targets = torch.cat(list(step.targets))
        if any(len(x) != len(targets) for x in entering):
            raise UnsupportedModelError(f"{step.nodes[-1].target}: the first dimension of its result counts no images")
        own = list(dict.fromkeys(weights.values()))  # one that layers share is there once
        groups = [{"params": [w.v for w in own], "lr": self.lr}, {"params": [*others], "lr": lr_others}]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        warm = self.warmup * self.iterations
        half = self.iterations // 2
        for i in range(self.iterations):
            if i == half:
                half_way()
            h = {w: rectified_sigmoid(w.v) for w in own}
            soft = {name: w.at(h[w]) for name, w in weights.items()}

            def quantized(site: Site, x: Tensor, soft: Mapping[str, Tensor] = soft) -> Tensor:
                return soft[site.name] if site.name in soft else quantize(site, x)

            images = torch.randint(len(targets), (self.batch_size,), device=targets.device)
            batch = tuple(mixed(x[images], y[images], self.input_prob) for x, y in zip(entering, exact, strict=True))
            error = step.run(batch, quantized) - targets[images]
            loss = error.square().sum() * (error.shape[1:2].numel() / error.numel())
            if i >= warm:
                beta = annealed((i - warm) / (self.iterations - warm), self.b_start, self.b_end)
                loss = loss + self.weight * sum(regularizer(x, beta) for x in h.values())
            learning = [*(w.v for w in own), *(others if i < half else ())]
            if not learning:
                return
            optimizer.zero_grad()
            for parameter, gradient in zip(learning, torch.autograd.grad(loss, learning), strict=True):
                parameter.grad = gradient
            optimizer.step()


def soft_weights(sim: Simulation, step: Step) -> dict[str, SoftWeight]:
    """The part's weights by site name, but for those that are float, or rounded already.

    Layers that share a weight share its rounding, too.
    """
    table = sim.encodings()
    sites = [layer.weight for layer in step.layers if layer.weight is not None and not is_rounded(sim, layer)]
    leaders = {site.name: sim.placement.leader(site.name) for site in sites}
    made = {name: SoftWeight(sim.parameter(name), table[name]) for name in dict.fromkeys(leaders.values())}
    return {name: made[leader] for name, leader in leaders.items()}


@torch.no_grad()
def write_weights(sim: Simulation, step: Step, weights: Mapping[str, SoftWeight]) -> None:
    """Writes the rounded weights, on the grids that the simulation has now."""
    quantize = quantizing(sim.encodings())
    for layer in step.layers:
        if layer.weight is not None and layer.weight.name in weights:
            sim.parameter(layer.weight.name).copy_(quantize(layer.weight, weights[layer.weight.name].rounded()))
