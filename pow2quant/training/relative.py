"""Steps of the optimizer in proportion to what they change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

LEAST = 1e-3
"""Of the root mean square, so that weights that are zero can move; that of Adafactor's equations."""


class RelativeSteps:
    """Multiplies every step of an optimizer by the root mean square of the weights that it changes.

    Adafactor does so tensor by tensor (Shazeer, Stern 2018, section 8), here it is done channel by channel. Optimizers
    such as Adam move all weights by steps of about the same size. Batch norm that is folded into weights makes those of
    some channels many times larger than those of others, and so are their scales: the same step is a fraction of a code
    here and several codes there.

    units: for each tensor (C, …) of several dimensions the root mean squares (C, 1, …) at the beginning, along the
    first dimension (the output channels of a convolution), relative to the geometric mean of all, so that a learning
    rate keeps its meaning. Vectors, such as biases, take the optimizer's own steps.
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor], wanted: bool) -> None:
        self.tensors = [t.detach() for t in tensors if wanted and t.ndim > 1]
        sizes = [
            t.square().mean(dim=tuple(range(1, t.ndim)), keepdim=True).sqrt().clamp_min(LEAST) for t in self.tensors
        ]
        mean = torch.cat([size.flatten().log() for size in sizes]).mean().exp() if sizes else 1.0
        self.units = [size / mean for size in sizes]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Around a step of the optimizer."""
        before = [t.clone() for t in self.tensors]
        yield
        for tensor, old, unit in zip(self.tensors, before, self.units, strict=True):
            torch.lerp(old, tensor, unit.expand_as(tensor), out=tensor)
