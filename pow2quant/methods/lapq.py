"""LAPQ: steps of least L_p error, the p of least loss, then all steps together by the loss of the whole network.

Nahshan et al. 2019, "Loss aware post-training quantization".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, fx
from torch.nn import functional as F

from pow2quant.artifact import Site, Table
from pow2quant.backends.base import SILENT, Batch, Progress, Simulation, device_of, inputs
from pow2quant.backends.calibration import observe, settled
from pow2quant.config import TensorSpec, integer, one_of
from pow2quant.errors import ConfigError, EncodingError
from pow2quant.frontends.copies import array, copied
from pow2quant.methods.aciq import with_moments
from pow2quant.methods.output_mse import least_error
from pow2quant.methods.reconstruction import Part, Step, calls, is_rounded, quantizing, walk
from pow2quant.pow2_constraints import Encoding, Format, Observed, choose

NORMS = (2.0, 2.5, 3.0, 3.5, 4.0)
"""The p whose loss is sampled (section 4)."""

HALVINGS = 2.0 ** -np.arange(12)
FRACTIONS = np.linspace(1, 0.1, 46)
ENDS = np.linspace(1, 0.1, 10)
"""Shares of the range that are candidates: for powers of two, for free scales, for each end of an asymmetric range."""

SAMPLE = 1 << 16
"""Values of an activation that the L_p errors are taken of."""

REACH = 1.5
"""Powell's method looks for free scales within so many octaves of where it starts."""

XTOL, FTOL = 0.02, 1e-4
"""The precision of its line searches in octaves, and the share of the loss that a round must win to go on."""


def lp_errors(x: NDArray[np.float32], encodings: Sequence[Encoding], p: float) -> NDArray[np.float64]:
    """sum of |x - Q(x)|^p per candidate and channel, (candidates, C), of rows x (C, n); section 4."""
    errors = (np.power(np.abs(x - encoding.fake_quantize(x)), p) for encoding in encodings)
    return np.stack([error.sum(1, dtype=np.float64) for error in errors])


def interpolated(norms: Sequence[float], losses: Sequence[float]) -> float:
    """The p within the sampled ones where the parabola through the losses (least squares) is least; section 4."""
    a, b, _ = np.polyfit(norms, losses, 2)
    if a > 0:
        return float(np.clip(-b / (2 * a), min(norms), max(norms)))
    return float(norms[int(np.argmin(losses))])


def divergence(result: Tensor, target: Tensor) -> Tensor:
    """The sum of KL(softmax(target) || softmax(result)) over all but dimension 1: cross-entropy with soft labels.

    Of indices how many differ.
    """
    if not result.is_floating_point():
        return (result != target).sum().double()
    return F.kl_div(result.log_softmax(1), target.log_softmax(1), reduction="sum", log_target=True).double()


def squared_error(result: Tensor, target: Tensor) -> Tensor:
    """The sum of (result - target)^2, for networks whose results are no logits."""
    return (result - target).square().sum(dtype=torch.float64)


Comparison = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Comparison] = {"divergence": divergence, "mse": squared_error}
LOSS = one_of(lambda: LOSSES)


def descend(start: Table, names: Sequence[str], loss: Callable[[Table], float], now: float) -> tuple[Table, float]:
    """The table with the exponents of `names` moved together, one by one as long as the loss falls, up or else down.

    now: the loss of `start`; of equal losses, where it started.
    """
    best, least = start, now
    for factor in (2.0, 0.5):
        while (found := loss(moved := scaled(best, names, factor))) < least:
            best, least = moved, found
        if least < now:
            break
    return best, least


def scaled(table: Table, names: Iterable[str], factor: float) -> Table:
    """The table with the scales of the named sites times a factor, in float32; their codes stay where they are."""
    changed = {n: table[n] for n in names}
    return table | {n: replace(e, scale=e.scale * np.float32(factor)) for n, e in changed.items()}


@dataclass(frozen=True)
class Lapq:
    """LAPQ: least L_p error, quadratic interpolation over p, then steps by the network's loss (Nahshan et al. 2019).

    The loss compares with the float network's results on the calibration data, which have no labels. loss:
    `divergence` (cross-entropy with the float network's probabilities as labels) or `mse`. What moves together: a
    weight's scales, and an activation's. Powers of two: coordinate descent over the exponents, front to back, at most
    `passes` times. Free scales: Powell's method with at most `evaluations` losses. bias_correction: rounded weights get
    the mean and the variance of the float ones, as in `aciq`. The network's inputs keep their encodings; layers whose
    weights lie on their grid already keep that.
    """

    deterministic: ClassVar[bool] = True

    loss: Annotated[str, LOSS] = "divergence"
    passes: Annotated[int, integer(0)] = 2
    evaluations: Annotated[int, integer(0)] = 500
    bias_correction: bool = True

    @torch.no_grad()
    def apply(self, sim: Simulation, batches: Iterable[Batch], progress: Progress = SILENT) -> None:
        """Loads the chosen encodings, and writes the corrected weights, float."""
        data = list(batches)
        loss = _Loss(sim, data, LOSSES[self.loss], corrects=self.bias_correction)
        table = _interpolated(sim, data, loss, progress)
        loss.load(table)
        table = self._descend(sim, data, loss, table, progress)
        loss.load(self._powell(sim, data, loss, table, progress))

    def _descend(self, sim: Simulation, data: Sequence[Batch], loss: _Loss, table: Table, progress: Progress) -> Table:
        """Every loss is computed from the first part on that a change touches."""
        coordinates = _coordinates(sim, loss.moving, power_of_2=True)
        for turn in range(self.passes if any(coordinates.values()) else 0):
            start = table
            for step in progress.track(walk(sim, data, list(coordinates)), f"lapq, pass {turn + 1}", len(coordinates)):
                behind = partial(loss, step=step)
                before = now = behind(table)
                for names in coordinates[step.nodes]:
                    table, now = descend(table, names, behind, now)
                loss.load(table)
                progress.note(f"{step.nodes[0].target}: loss {before:.5f} -> {now:.5f}")
            if table is start:
                break
        return table

    def _powell(self, sim: Simulation, data: Sequence[Batch], loss: _Loss, table: Table, progress: Progress) -> Table:
        coordinates = [names for found in _coordinates(sim, loss.moving, power_of_2=False).values() for names in found]
        if not (coordinates and self.evaluations):
            return table
        first = _from_first(sim, data)

        def at(octaves: NDArray[np.float64]) -> Table:
            moved = table
            for names, octave in zip(coordinates, octaves, strict=True):
                moved = scaled(moved, names, 2**octave)
            return moved

        ticks = progress.track(range(self.evaluations), "lapq, Powell", self.evaluations)
        still = np.zeros(len(coordinates))
        before = least = loss(table, first)
        best = still

        def counted(octaves: NDArray[np.float64]) -> float:
            nonlocal best, least
            next(ticks, None)
            found = loss(at(octaves), first)
            if found < least:
                best, least = octaves.copy(), found
            return found

        options = {"maxfev": self.evaluations, "xtol": XTOL, "ftol": FTOL}
        bounds = [(-REACH, REACH)] * len(coordinates)
        minimize(counted, still, method="Powell", bounds=bounds, options=options)
        progress.note(f"lapq: loss {before:.5f} -> {least:.5f}")
        return at(best)


def _interpolated(sim: Simulation, data: Sequence[Batch], loss: _Loss, progress: Progress) -> Table:
    """The encodings of least L_p error for the p of least loss: the interpolated one, or one of those sampled."""
    placement, before = sim.placement, sim.encodings()
    candidates: dict[str, tuple[NDArray[np.float32], list[Encoding]]] = {}
    axes: dict[str, int | None] = {}
    for name, weight in loss.moving.items():
        axes[name] = before[name].axis
        seen = Observed.of(weight, axes[name])
        candidates[name] = (seen.sample, _candidates(seen, placement.specs[name], axes[name]))
    sim.load({})
    outputs = [s.name for s in placement.sites if s.role == "output"]
    leaders = dict.fromkeys(placement.leader(n) for n in outputs)
    for name, seen in observe(sim, data, leaders).items() if leaders else ():
        x = seen.sample[:, :: -(-seen.sample.shape[1] // SAMPLE)]
        candidates[name] = (x, _candidates(seen, placement.specs[name], None))
    sim.load(before)

    def at(p: float) -> Table:
        best = {name: least_error(encodings, lp_errors(x, encodings, p)) for name, (x, encodings) in candidates.items()}
        own = {n: replace(best[n], axis=axis) for n, axis in axes.items()}
        return before | own | {n: best[placement.leader(n)] for n in outputs}

    first = _from_first(sim, data)
    tables = [at(p) for p in NORMS]
    losses = [loss(table, first) for table in tables]
    if all(map(math.isfinite, losses)):
        p = interpolated(NORMS, losses)
        tables.append(at(p))
        losses.append(loss(tables[-1], first))
        progress.note(f"lapq: p = {p:.2f}, loss {losses[-1]:.5f}; sampled {min(losses[:-1]):.5f}")
    return tables[int(np.argmin(losses))]


def _from_first(sim: Simulation, data: Sequence[Batch]) -> Step:
    """The turn of the first weighted layer in the graph: its loss is computed from there on, so in every step."""
    weighted = {y.module for y in sim.placement.layers}
    return next(walk(sim, data, [(next(n for n in sim.network.graph.nodes if calls(n, weighted)),)]))


def _candidates(seen: Observed, spec: TensorSpec, axis: int | None) -> list[Encoding]:
    """The encodings that cover shares of the range, per row of `seen`."""
    form = Format(spec.bits, spec.symmetric, spec.power_of_2, None if axis is None else 0)
    shares = HALVINGS if spec.power_of_2 else FRACTIONS
    shifted = not spec.symmetric and bool((seen.low < 0).any())
    ends = product(ENDS, ENDS) if shifted else zip(shares, shares, strict=True)
    ranges = (Observed(seen.low * np.float32(a), seen.high * np.float32(b), seen.sample) for a, b in ends)
    return list(dict.fromkeys(choose("minmax", r, form) for r in ranges))


def _coordinates(sim: Simulation, weights: Collection[str], *, power_of_2: bool) -> dict[Part, list[tuple[str, ...]]]:
    """The network cut in front of every weighted layer, and of each part the sites whose scales move together.

    weights: those that may move. power_of_2: only sites with that constraint, or only those without. Tensors that share
    an encoding belong to the part of the first of them. What lies before the first layer does not move.
    """
    placement, modules = sim.placement, {y.module for y in sim.placement.layers}
    parts: list[list[fx.Node]] = [[]]
    for node in sim.network.graph.nodes:
        if node.op == "call_module":
            if node.target in modules:
                parts.append([])
            parts[-1].append(node)
    outputs = [[placement.quantized[n.name].name for n in p if n.name in placement.quantized] for p in parts]
    fixed = {placement.leader(name) for name in outputs[0]}
    found: dict[Part, list[tuple[str, ...]]] = {}
    for part, names in zip(parts[1:], outputs[1:], strict=True):
        moving: list[list[str]] = []
        own = [name for name in (f"{part[0].target}.weight",) if name in weights]
        for leader in dict.fromkeys(map(placement.leader, [*own, *names])):
            if leader not in fixed:
                fixed.add(leader)
                moving.append([s.name for s in placement.sites if placement.leader(s.name) == leader])
        found[tuple(part)] = [tuple(m) for m in moving if placement.specs[m[0]].power_of_2 == power_of_2]
    return found


class _Loss:
    """The mean loss over all images against the float network's results; infinite where a bias has no encoding.

    moving: the float weights (those that are on no grid yet) by site name. corrects: whether they get the moments that
    they lose by rounding, which is done for every encoding anew.
    """

    def __init__(self, sim: Simulation, data: Sequence[Batch], compare: Comparison, *, corrects: bool) -> None:
        self.sim, self.compare, self.corrects = sim, compare, corrects
        weights = [y.weight for y in sim.placement.layers if y.weight is not None and not is_rounded(sim, y)]
        self.moving = {site.name: array(sim.parameter(site.name)) for site in weights}
        self._made: dict[str, tuple[Encoding, Tensor]] = {}
        self.device = device_of(sim.model)
        network = copied(sim.network).to(self.device)
        (end,) = (node for node in network.graph.nodes if node.op == "output")
        end.args = (tuple(end.all_input_nodes),)  # the order in which `Step.finish` gives the results
        network.recompile()
        self.targets: list[tuple[Tensor, ...]] = [network(*(x.to(self.device) for x in inputs(b))) for b in data]
        shapes = [tuple(t.shape) for t in self.targets[0]] if data else []
        if compare is divergence and any(len(shape) < 2 or shape[1] < 2 for shape in shapes):
            raise ConfigError(f"lapq.loss: divergence compares results (N, classes, …), not {shapes}; legal here: mse")
        self.images = sum(len(inputs(batch)[0]) for batch in data)

    def __call__(self, table: Table, step: Step) -> float:
        """What the table gives from `step` on."""
        try:
            full = settled(self.sim, table)
        except EncodingError:
            return math.inf
        by_table = quantizing(full)

        def quantize(site: Site, x: Tensor) -> Tensor:
            return by_table(site, self._weight(site.name, full[site.name]) if site.name in self.moving else x)

        pairs = zip(step.finish(quantize), self.targets, strict=True)
        found = [self.compare(r, t) for rs, ts in pairs for r, t in zip(rs, ts, strict=True)]
        losses: list[float] = torch.stack(found).tolist()  # the one time that the host waits for the device
        return sum(losses) / self.images

    def load(self, table: Table) -> None:
        """Loads a table and the lattices of biases into the simulation, and writes the weights that belong to it."""
        full = settled(self.sim, table)
        self.sim.load(full)
        for name in self.moving:
            self.sim.parameter(name).copy_(self._weight(name, full[name]))

    def _weight(self, name: str, encoding: Encoding) -> Tensor:
        """The float weight for an encoding; that of the last one is kept."""
        kept, weight = self._made.get(name, (None, torch.empty(0)))
        if kept != encoding:
            values = self.moving[name]
            weight = torch.from_numpy(with_moments(values, encoding) if self.corrects else values).to(self.device)
            self._made[name] = encoding, weight
        return weight
