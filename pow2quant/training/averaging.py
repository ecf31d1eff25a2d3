"""The exponential moving average of what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """a <- d * a + (1 - d) * w behind every step, for each of some tensors w; with d = 0 it is the tensors themselves.

    The average forgets where training began: in step n, d is at most (1 + n) / (10 + n).
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self.tensors, self.decay, self.steps = tensors, decay, 0
        self.values = [t.detach().clone() for t in tensors] if decay else []

    @torch.no_grad()
    def advance(self) -> None:
        """To be called behind every step of the optimizer."""
        if self.decay:
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.values, [t.detach() for t in self.tensors], 1 - decay)
            self.steps += 1

    @torch.no_grad()
    def exchange(self) -> None:
        """The tensors take the values of their averages, which take theirs."""
        for tensor, average in zip(self.tensors if self.decay else (), self.values, strict=True):
            kept = tensor.detach().clone()
            tensor.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def restore(self, steps: int, values: Sequence[Tensor]) -> None:
        """As it was after so many steps."""
        self.steps = steps
        for average, value in zip(self.values, values, strict=True):
            average.copy_(value)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within it the tensors have the values of their averages."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
