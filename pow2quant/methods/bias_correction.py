"""Bias correction: what quantization adds to the mean of a layer's output is taken off its bias."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, fx, nn

from pow2quant.backends.base import SILENT, Batch, Progress, Simulation
from pow2quant.backends.fake_quant import fused
from pow2quant.config import one_of
from pow2quant.frontends.operators import called
from pow2quant.methods.reconstruction import (
    Step,
    activation,
    error_moments,
    power,
    quantizing,
    sqnr_db,
    walk,
    write_bias,
)

ITERATIONS = 8
"""Newton steps behind an activation function: on CIFAR-10 nothing moves by more than 1 % of the shift after five."""

SAMPLE = 1 << 13
"""Values per channel and batch that a mean is taken over, evenly spaced by an odd step."""

STATISTICS = ("data", "batch_norm")
STATISTIC = one_of(lambda: STATISTICS)

LEAST_ACTIVE = 0.01
"""A channel's share of values that count as unclipped at least, so that a nearly dead one moves in small steps."""


def shift(result: Tensor, target: Tensor, ends: tuple[float, float] | None = None) -> Tensor:
    """The c, float64 (C,), with E[f(y~ - c)] = E[f(y)] per channel; without f, E[y~ - y] (Nagel et al. 2019, eq. 1).

    result, target: y~ and y, (C, n). ends: where f clips. Newton's method: the derivative of the mean is the share of
    values that f leaves as they are.
    """
    plain = ends is None or result.device.type != "cpu" or not result.dtype == target.dtype == torch.float32
    if not plain and (kernels := fused(result)) is not None:
        found: Tensor = kernels.shifts(result.contiguous(), target.contiguous(), ends, ITERATIONS, LEAST_ACTIVE)
        return found
    c = (result - target).mean(1, dtype=torch.float64)
    if ends is None:
        return c
    wanted = target.clamp(*ends)
    for _ in range(ITERATIONS):
        moved = result - c.to(result).unsqueeze(1)
        kept = moved.clamp(*ends)
        inside = 1 - moved.ne_(kept).mean(1, dtype=torch.float64)
        c = c + (kept - wanted).mean(1, dtype=torch.float64) / inside.clamp_min(LEAST_ACTIVE)
    return c


def ends_of(clip: nn.Module) -> tuple[float, float]:
    """Between which values a ReLU, ReLU6 or Hardtanh leaves values as they are."""
    return (float(clip.min_val), float(clip.max_val)) if isinstance(clip, nn.Hardtanh) else (0.0, math.inf)


def clipped_normal_mean(mean: Tensor, deviation: Tensor, low: float, high: float) -> Tensor:
    """E[min(max(x, low), high)] of normal x, (C,) (Nagel et al. 2019, section 4.2.1 and appendix C).

    Behind a ReLU, from 0 to infinity: deviation * N(-mean / deviation) + mean * (1 - Phi(-mean / deviation)).
    """
    ends = [(end - mean) / deviation.clamp_min(1e-12) for end in (low, high)]
    below, upto = (torch.special.ndtr(z) for z in ends)
    heights = [torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in ends]
    outside = torch.zeros_like(mean)
    for end, share in ((low, below), (high, 1 - upto)):
        outside = outside + end * share if math.isfinite(end) else outside
    inside: Tensor = mean * (upto - below) + deviation * (heights[0] - heights[1])
    return outside + inside


def expected_input(network: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """E[x] per channel of what a layer reads, (C,), from the batch norm in front of it; None where there is none."""
    (source,) = node.all_input_nodes
    low, high = -math.inf, math.inf
    clip = called(network, source)
    if isinstance(clip, (nn.ReLU, nn.Hardtanh)):  # ReLU6 is a Hardtanh
        low, high = ends_of(clip)
        (source,) = source.all_input_nodes
    normal = source.meta.get("normal")
    if normal is None:
        return None
    mean, deviation = normal
    return clipped_normal_mean(mean, deviation, low, high)


def expected_shift(error: Tensor, mean: Tensor, groups: int) -> Tensor:
    """E[y~ - y] = (W_q - W) E[x], summed over the kernel (Nagel et al. 2019, eq. 17 and appendix B), (C_out,).

    error: W_q - W, (C_out, C_in / groups, …). mean: E[x], (C_in,).
    """
    summed = error.double().flatten(2).sum(2) if error.ndim > 2 else error.double()
    return torch.einsum(
        "goi,gi->go", summed.view(groups, -1, summed.shape[1]), mean.double().view(groups, -1)
    ).flatten()


@dataclass(frozen=True)
class BiasCorrection:
    """Bias correction, layer by layer on the calibration data (Nagel et al. 2019, eq. 1 and appendix D).

    Every bias gives up E[y~ - y], the mean over images and pixels of what the layer computes with quantized weights and
    inputs, less what the float network computes there. behind_activation: where a ReLU, ReLU6 or Hardtanh alone reads
    the layer, the means behind it are made equal instead, E[f(y~ - c)] = E[f(y)]: noise that a ReLU clips on one side
    has a mean. Layers without a bias stay as they are.

    statistics: `data`; or `batch_norm`, the paper's analytic variant (section 4.2.1), which needs no data: E[x] behind
    batch norm and activation function is that of a clipped normal distribution. It knows the weights' rounding only,
    and convolutions and linear layers directly behind such a pair; the others stay as they are.
    """

    builds_on_exponents: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    takes_blocks: ClassVar[bool] = True

    behind_activation: bool = True
    statistics: Annotated[str, STATISTIC] = "data"

    @torch.no_grad()
    def apply(self, sim: Simulation, batches: Iterable[Batch], progress: Progress = SILENT) -> None:
        """Writes the corrected biases, float, and the encodings that follow."""
        if self.statistics == "batch_norm":
            _analytic(sim, progress)
            return
        for step in progress.track(walk(sim, batches), "bias_correction", len(sim.placement.layers)):
            correct_bias(sim, step, progress, self.behind_activation)


@torch.no_grad()
def correct_bias(sim: Simulation, step: Step, progress: Progress = SILENT, behind_activation: bool = True) -> None:
    """Writes a layer's corrected bias, as `BiasCorrection` says. A layer without one stays as it is."""
    name = f"{step.layer.module}.bias"
    if name not in step.parameters:
        return
    encodings = sim.encodings()
    quantize = quantizing({k: encodings[k] for k in step.parameters & encodings.keys() if k != name})
    result, target = (_sample(batches) for batches in ((step.run(x, quantize) for x in step.inputs), step.targets))
    clip = activation(sim, step.nodes[0]) if behind_activation else None
    c = shift(result, target, None if clip is None else ends_of(clip)).cpu()
    bias = sim.parameter(name)
    write_bias(sim, step.layer, bias - c.to(bias))
    mean, square = error_moments([result.T], [target.T])
    signal = power([target])
    before, after = (sqnr_db(signal, s) for s in (square, square - 2 * c * mean + c**2))
    progress.note(f"{step.layer.module}: output {before} -> {after}")


@torch.no_grad()
def _analytic(sim: Simulation, progress: Progress) -> None:
    nodes = {node.target: node for node in sim.network.graph.nodes if node.op == "call_module"}
    for layer in sim.placement.layers:
        module = sim.network.get_submodule(layer.module)
        mean = expected_input(sim.network, nodes[layer.module])
        fits = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) and module.bias is not None
        if layer.weight is None or mean is None or not fits:
            progress.note(f"{layer.module}: left as it is")
            continue
        weight, bias = sim.parameter(layer.weight.name), sim.parameter(f"{layer.module}.bias")
        error = quantizing(sim.encodings())(layer.weight, weight) - sim.network.get_parameter(layer.weight.name).to(
            weight
        )
        c = expected_shift(error, mean.to(error.device), getattr(module, "groups", 1))
        write_bias(sim, layer, bias - c.to(bias))
        progress.note(f"{layer.module}: shifted by up to {float(c.abs().max()):.3g}")


def _sample(batches: Iterable[Tensor]) -> Tensor:
    """(N, C, …) each -> (C, n)."""
    found = []
    for y in batches:
        pixels = y.unsqueeze(-1).flatten(2)
        step = -(-pixels.shape[0] * pixels.shape[2] // SAMPLE) | 1
        found.append(pixels[..., ::step].transpose(0, 1).flatten(1))
    return torch.cat(found, 1)
