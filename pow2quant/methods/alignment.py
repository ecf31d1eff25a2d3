"""Range alignment: factors between layers, which ReLU networks do not notice, move ranges to where 2^k fits them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, fx

from pow2quant.backends.base import SILENT, Batch, Progress
from pow2quant.backends.placement import place
from pow2quant.backends.sums import separate
from pow2quant.config import QuantPlan, finite, integer
from pow2quant.methods.equalization import Group, bias_magnitudes, bounds, groups, peaks, scale
from pow2quant.methods.noise import LayerNoise, TensorNoise, matrix, measure


@dataclass
class Aligned:
    """A group of channels, C of them, and the noise of all that their factors change.

    writers, readers: of the layers whose rows are divided by the factors, and whose columns are multiplied.
    """

    network: fx.GraphModule
    group: Group
    writers: dict[fx.Node, LayerNoise]
    readers: dict[fx.Node, LayerNoise]
    tensors: list[TensorNoise]

    def shared(self, factor: Tensor) -> Tensor:
        """The expected error after division of all channels by one factor, when every scale is chosen anew."""
        rows = [(matrix(self.network, n) / factor, y, factor**2) for n, y in self.writers.items()]
        columns = [(matrix(self.network, n) * factor, y, factor**-2) for n, y in self.readers.items()]
        weights = [y.least(weight, expected=True)[1].sum() * unit for weight, y, unit in (*rows, *columns)]
        return torch.stack([*weights, *(x.errors(factor).sum() for x in self.tensors)]).sum()

    def separate(self, factors: Tensor, octave: int) -> Tensor:
        """The expected error of every channel, (n, C), after its division by each of n factors.

        What channels share keeps its scale: the tensor, and a row that reads many. Then the sum over the channels is
        the whole, and can be minimised channel by channel. factors: in geometric order, `octave` of them to a doubling.
        """
        found = torch.zeros(len(factors), self.channels)
        for node, y in self.writers.items():
            found += self._written(matrix(self.network, node), y, factors, octave)
        for node, y in self.readers.items():
            found += self._read(matrix(self.network, node), y, factors)
        for x in self.tensors:
            encoding = x.encoding()
            found += torch.stack([x.errors(t, encoding) for t in factors])
        return found

    @property
    def channels(self) -> int:
        """C."""
        return int(matrix(self.network, self.group.readers[0]).shape[::2].numel())

    @staticmethod
    def _written(weight: Tensor, y: LayerNoise, factors: Tensor, octave: int) -> Tensor:
        if not y.per_channel:
            s, _ = y.least(weight)
            return torch.stack([y.errors(weight / t, s).flatten() * t**2 for t in factors])
        distinct = factors[:octave] if y.spec.power_of_2 else factors[:1]  # a row of its own scale does not notice more
        found = torch.stack([y.least(weight / t)[1].flatten() * t**2 for t in distinct])
        return found.repeat(-(-len(factors) // len(distinct)), 1)[: len(factors)]

    @staticmethod
    def _read(weight: Tensor, y: LayerNoise, factors: Tensor) -> Tensor:
        if y.per_channel and weight.shape[2] == 1:
            return torch.stack([y.least(weight * t)[1].sum(1) / t**2 for t in factors])
        s, _ = y.least(weight)
        return torch.stack([y.errors_by_column(weight * t, s).sum(1).flatten() / t**2 for t in factors])

    def divide(self, factors: Tensor) -> None:
        """Divides the channels by factors (C,), in the network and in what is known about it."""
        scale(self.network, self.group, factors)
        for y in self.writers.values():
            y.gain *= factors**2
        for y in self.readers.values():
            y.divide_input(factors)
        for x in self.tensors:
            x.divide(factors)


@dataclass(frozen=True)
class Align:
    """Range alignment under 2^k: channels are scaled to where rounding costs least (ours; after Nagel et al. 2019).

    By factors of 2^(i / `steps`) for every channel of the groups of `equalize`. They minimise an estimate of the
    squared error of the results: of the weights that write a channel, of those that read it, and of the activations
    between, each by its own rounding at the widths and scales of the plan, weighed by how far it moves the results.
    First one factor for all channels of a group, then one for each; `rounds` times over all groups.

    exact: a channel that reaches its ReLU6 keeps its factor, so that the float network computes what it did. Otherwise
    it is scaled too, and what is clipped elsewhere than before counts as an error.

    headroom: errors of activations are those of values so many times as large as in calibration. Without it, factors
    fill every range up to the largest value that was seen, and what is larger saturates.
    """

    deterministic: ClassVar[bool] = True

    steps: Annotated[int, integer(1)] = 16
    rounds: Annotated[int, integer(1)] = 2
    exact: bool = False
    headroom: Annotated[float, finite("a number from 1 up", lambda v: v >= 1)] = 1.0

    def rewrite(
        self, network: fx.GraphModule, batches: Iterable[Batch], plan: QuantPlan, progress: Progress = SILENT
    ) -> fx.GraphModule:
        """Rewrites in place, and returns the network. Raises DataError for no batches.

        With `plan.sums`, layers read wide sums through clips of their own from here on: they are placed in the network
        as they will be in its simulation, and weighed at the width that layers read.
        """
        if plan.sums is not None:
            separate(network)
        found = groups(network)
        layers, tensors = measure(network, place(network, plan), [n for g in found for n in g.tensors], batches)
        for x in tensors.values():
            x.headroom = self.headroom
        work = [
            Aligned(
                network,
                group,
                {n: layers[n] for n in group.writers if n in layers},
                {n: layers[n] for n in group.readers if n in layers},
                [tensors[n] for n in group.tensors if n in tensors],
            )
            for group in found
        ]
        peak = peaks(network, found, batches)
        for i in progress.track(range(self.rounds), "align", self.rounds):
            for j, part in enumerate(work):
                for choose in (self._shared, self._separate):
                    factors = choose(part, peak[j])
                    part.divide(factors)
                    peak[j] = peak[j] / factors
            error = sum(float(x.errors(torch.ones(())).sum()) for x in tensors.values())
            error += sum(float(y.least(matrix(network, n))[1].sum()) for n, y in layers.items())
            progress.note(f"align, round {i + 1}: expected error {error:.3g}")
        return network

    def _candidates(self) -> Tensor:
        """An octave down and one up; in the middle is 1."""
        return torch.exp2(torch.arange(-self.steps, self.steps + 1) / self.steps)

    def _shared(self, part: Aligned, peak: Tensor) -> Tensor:
        if part.group.clips:
            return torch.ones_like(peak)
        octave = self._candidates()[: self.steps]  # errors are the same an octave further, and that of 1/2 is that of 1
        errors = torch.stack([part.shared(t) for t in octave])
        chosen = int(errors.argmin())
        return torch.full_like(peak, float(octave[chosen]) if errors[chosen] < errors[0] else 1.0)

    def _separate(self, part: Aligned, peak: Tensor) -> Tensor:
        candidates = self._candidates()
        low, high = bounds(peak, bias_magnitudes(part.network, part.group), bool(part.group.clips) and self.exact)
        errors = part.separate(candidates, self.steps)
        illegal = (candidates[:, None] < low) | (candidates[:, None] > high)
        illegal[self.steps] = False
        return _least(candidates, errors.masked_fill(illegal, torch.inf))


def _least(candidates: Tensor, errors: Tensor) -> Tensor:
    """Per column of (n, C) the candidate of least error, (C,); 1, in the middle, where none is better."""
    one = len(candidates) // 2
    error, chosen = errors.min(0)
    return candidates[torch.where(error < errors[one], chosen, one)]
