"""The losses of a training's steps: their sum, and whether they say that it has diverged.

On a CPU every loss is read at once. Elsewhere reading waits for the device, so that it happens once in `EVERY` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EVERY = 16
"""Steps between two reads from a device that is no CPU: a divergence is noticed so many steps late at most."""

EXPLODED = 4.0
"""Training has diverged when its smoothed loss is so many times what it was at first, and what guessing gives."""

SMOOTHING = 0.05
"""Share of the newest loss in the smoothed one."""


class Losses:
    """total, samples: of this epoch. smoothed, first: the smoothed loss now, and at first."""

    def __init__(self, guessing: float, diverged: Callable[[str, int], Exception], device: torch.device) -> None:
        """guessing: the loss of guessing. diverged: (what, how many steps ago) -> what is raised then."""
        self.total, self.samples = 0.0, 0
        self.smoothed: float | None = None
        self.first: float | None = None
        self._guessing, self._diverged = guessing, diverged
        self._every = 1 if device.type == "cpu" else EVERY
        self._waiting: list[tuple[Tensor, int]] = []

    def add(self, loss: Tensor, learned: Sequence[Tensor], count: int) -> None:
        """A step's loss, (), over `count` samples, and the exponents' parameters behind it."""
        finite = torch.stack([torch.isfinite(values).all() for values in learned]).all()
        self._waiting.append((torch.stack([loss.double(), finite.double()]), count))
        if len(self._waiting) >= self._every:
            self.read()

    def read(self) -> None:
        """Reads all that was added. Raises what `diverged` gives where a loss or a parameter is not as it should be."""
        waiting, self._waiting = self._waiting, []
        values = torch.stack([pair for pair, _ in waiting]).tolist() if waiting else []
        for ago, (loss, finite), (_, count) in zip(range(len(values))[::-1], values, waiting, strict=True):
            self._check(loss, ago)
            if not finite:
                raise self._diverged("a gradient is not finite", ago)
            self.total, self.samples = self.total + loss * count, self.samples + count

    def _check(self, loss: float, ago: int) -> None:
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}", ago)
        self.smoothed = loss if self.smoothed is None else self.smoothed + SMOOTHING * (loss - self.smoothed)
        self.first = self.smoothed if self.first is None else self.first
        if self.smoothed > EXPLODED * max(self.first, self._guessing):
            raise self._diverged(f"the loss has grown from {self.first:.3g} to {self.smoothed:.3g}", ago)
