"""What every candidate of every tensor costs in accuracy, one tensor at a time in an otherwise float network."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant.artifact import Site
from pow2quant.backends.base import SILENT, Progress, Simulation, Tap
from pow2quant.study.candidates import CANDIDATES, Group
from pow2quant.study.program import Quantity
from pow2quant.training.schedule import Criterion, loss_of

Labelled = Sequence[tuple[tuple[Tensor, ...], Any]]
"""Inputs and targets, batch by batch."""

Table = dict[str, dict[str, float]]
"""By group, then by candidate."""


def expected_loss(table: Table) -> Quantity:
    """What candidates lose, from the narrowest up: none less than a wider one, and none less than 0; that is noise."""
    falling = {name: np.maximum.accumulate(np.maximum([*row.values()], 0)[::-1])[::-1] for name, row in table.items()}
    return Quantity(falling, {})


def csv_of(table: Table, metric: str) -> str:
    """A line for every candidate of every tensor."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["tensor", "candidate", "bits", metric])
    for name, row in table.items():
        writer.writerows([name, candidate, CANDIDATES[candidate].bits, f"{v:.6g}"] for candidate, v in row.items())
    return text.getvalue()


def kl_divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """KL(float || quantized) of the softmax, summed over all rows, in nats. logits, expected: (…, classes)."""
    p, q = (F.log_softmax(y.double(), -1) for y in (expected, logits))
    return (p.exp() * (p - q)).sum()


def traces(loss: Tensor, tensors: Sequence[Tensor], probes: Sequence[Sequence[Tensor]]) -> list[float]:
    """The trace of every tensor's own block of the Hessian: the mean of z^T H z (Hutchinson 1990).

    probes: for every tensor its z, of independent +1 and -1. One tensor after the other: a z for all at once would cost
    less, but what the blocks beside the diagonal add to z^T H z then has mean zero and a far greater variance.
    """
    grads = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)

    def form(grad: Tensor, x: Tensor, z: Tensor) -> float:
        (hz,) = torch.autograd.grad(grad, x, z, retain_graph=True, materialize_grads=True)
        return float((z.double() * hz.double()).sum())

    each = zip(grads, tensors, probes, strict=True)
    return [sum(form(grad, x, z) for z in own) / len(own) if grad.requires_grad else 0.0 for grad, x, own in each]


@dataclass(frozen=True)
class Measurement:
    """What is needed to measure: quantized simulations, and data.

    groups: the open ones are measured. simulations: by role and candidate, calibrated and behind their methods: every
    open group of that role is quantized so. batches: calibration images and labels, on the device. seed: of the probes.
    known: a number by name that may have been measured before, or is measured now.
    """

    groups: Sequence[Group]
    simulations: Mapping[tuple[str, str], Simulation]
    batches: Labelled
    criterion: Criterion
    seed: int
    progress: Progress = SILENT
    known: Callable[[str, Callable[[], float]], float] = lambda name, measure: measure()

    def table(self, metric: str) -> Table:
        """The sensitivities by one of `config.SENSITIVITIES`; 0 for what stays float.

        kl: mean KL divergence of the logits from the float network's, in nats. loss: increase of the mean loss. sqnr:
        power of the logits' noise by that of the logits, 10^(-dB / 10). hessian: HAWQ-V2's Omega.
        """
        return self._by_hessian() if metric == "hessian" else self._by_logits(metric)

    def _open(self) -> list[tuple[Group, str]]:
        return [(g, name) for g in self.groups if g.is_open for name in g.candidates]

    @torch.no_grad()
    def _by_logits(self, metric: str) -> Table:
        found: Table = {group.name: {} for group in self.groups if group.is_open}
        first = next(iter(self.simulations.values()))
        with first.intercept(only((), first)):
            expected = [_logits(first.model, x) for x, _ in self.batches]
        zero = sum(self._distance(metric, y, y, labels) for y, (_, labels) in zip(expected, self.batches, strict=True))
        count, power = sum(_rows(y) for y in expected), sum(float(y.double().square().sum()) for y in expected)
        wanted = self._open()
        for group, name in self.progress.track(wanted, f"sensitivity ({metric})", len(wanted)):
            if CANDIDATES[name].spec is None:
                found[group.name][name] = 0.0
                continue
            total = self.known(f"{metric} {group.name} {name}", partial(self._total, metric, group, name, expected))
            found[group.name][name] = (total - zero) / (power if metric == "sqnr" else count)
        return found

    def _total(self, metric: str, group: Group, name: str, expected: Sequence[Tensor]) -> float:
        """The distance of all batches where a group alone is quantized."""
        sim, total = self.simulations[group.role, name], 0.0
        with sim.intercept(only(group.sites, sim)):
            for y, (x, labels) in zip(expected, self.batches, strict=True):
                total += self._distance(metric, _logits(sim.model, x), y, labels)
        return total

    def _distance(self, metric: str, logits: Tensor, expected: Tensor, labels: Tensor) -> float:
        """Summed over a batch."""
        if metric == "kl":
            return float(kl_divergence(logits, expected))
        if metric == "sqnr":
            return float((logits.double() - expected.double()).square().sum())
        return float(loss_of(self.criterion, logits, labels)) * _rows(logits)

    def _by_hessian(self) -> Table:
        """Omega = mean eigenvalue x squared error: trace(H) / n x |Q(x) - x|^2 (Dong et al. 2020, eq. 10 and 14).

        An activation's are those of one image, averaged.
        """
        mean = self._mean_traces()
        found: Table = {name: {} for name in mean}
        wanted = self._open()
        for group, name in self.progress.track(wanted, "squared errors", len(wanted)):
            if CANDIDATES[name].spec is None:
                found[group.name][name] = 0.0
                continue
            errors = self._squared_errors(group, self.simulations[group.role, name])
            found[group.name][name] = sum(mean[group.name][s] * errors[s] for s in group.sites)
        return found

    def _mean_traces(self) -> Table:
        """trace(H) / n of every site of the open groups, by group."""
        sim = next(iter(self.simulations.values()))
        generator = torch.Generator().manual_seed(self.seed)
        sites = [s for g in self.groups if g.is_open for s in g.sites]
        sums = dict.fromkeys(sites, 0.0)
        for images, labels in self.progress.track(self.batches, "traces of the Hessian", len(self.batches)):
            tensors: dict[str, Tensor] = {}
            with sim.intercept(_recording(sim, tensors)):
                loss = loss_of(self.criterion, _logits(sim.model, images), labels)
            chosen = [tensors[s] for s in sites]
            probes = [[_rademacher(t, generator) for _ in range(PROBES)] for t in chosen]
            for s, x, trace in zip(sites, chosen, traces(loss, chosen, probes), strict=True):
                sums[s] += trace / (x.numel() if s.endswith(".weight") else x[0].numel()) / len(self.batches)
        return {g.name: {s: sums[s] for s in g.sites} for g in self.groups if g.is_open}

    @torch.no_grad()
    def _squared_errors(self, group: Group, sim: Simulation) -> dict[str, float]:
        """|Q(x) - x|^2 of every site of a group; of activations for one image, in the float network."""
        sums = dict.fromkeys(group.sites, 0.0)
        float_network = only((), sim)

        def measure(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
            exact = float_network(site, x, quantized)
            if site.name in sums:
                sums[site.name] += float((quantized.double() - exact.double()).square().sum())
            return exact

        batches = self.batches[:1] if group.role == "weight" else self.batches
        with sim.intercept(measure):
            for x, _ in batches:
                sim.model(*x)
        images = 1 if group.role == "weight" else sum(len(x[0]) for x, _ in batches)
        return {name: value / images for name, value in sums.items()}


PROBES = 2
"""Probes of every tensor's Hessian for every batch."""


def only(sites: Sequence[str], sim: Simulation) -> Tap:
    """A tap that quantizes these sites alone; parameters elsewhere are the float network's, whatever methods wrote."""
    exact: dict[str, Tensor] = {}

    def tap(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
        if site.name in sites:
            return quantized
        if site.role in ("weight", "bias"):
            if site.name not in exact:
                exact[site.name] = sim.network.get_parameter(site.name).detach().to(x.device)
            return exact[site.name]
        return x

    return tap


def _recording(sim: Simulation, tensors: dict[str, Tensor]) -> Tap:
    """A tap that keeps the float network's tensors, as those that the loss depends on."""
    exact = only((), sim)

    def tap(site: Site, x: Tensor, quantized: Tensor) -> Tensor:
        value = exact(site, x, quantized)
        if site.role == "bias":
            return value
        if not value.requires_grad:
            value = value.detach().clone().requires_grad_()
        tensors[site.name] = value
        return value

    return tap


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)


def _logits(model: nn.Module, arguments: Sequence[Tensor]) -> Tensor:
    result = model(*(x.clone() for x in arguments))
    logits: Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return logits


def _rows(logits: Tensor) -> int:
    return logits.numel() // logits.shape[-1]
