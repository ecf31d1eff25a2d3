"""Mixed images: batches in which every image is made of two, so that a teacher says more than it does on known ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pow2quant.config import TrainingConfig
from pow2quant.errors import ConfigError


class Mixing:
    """Mixes the inputs of a share of the steps, as `training.mixing` and `training.mixed_steps` say.

    Every sample is mixed with its neighbour in the batch, which training shuffles. The share l of the sample itself is
    drawn uniformly, once for a batch, which is Beta(1, 1) of both papers. Labels are not mixed: what is learned is what
    the teacher says about the mixed images (as Beyer et al. 2022, "Knowledge distillation: A good teacher is patient
    and consistent", do with mixup).
    """

    def __init__(self, config: TrainingConfig) -> None:
        """config: its `mixing`, `mixed_steps` and `distillation` are read."""
        self.rule, self.share, self.distillation = config.mixing, config.mixed_steps, config.distillation

    def check(self, example: Sequence[Tensor]) -> None:
        """Raises ConfigError where labels or inputs cannot be mixed. example: the inputs of one call, (N, …) each."""
        if self.rule is None:
            return
        if self.distillation < 1:
            raise ConfigError(
                f"training.mixing: {self.rule} mixes no labels; it needs training.distillation: 1, "
                f"not {self.distillation:g}"
            )
        for index, x in enumerate(example):
            if self.rule == "cutmix" and x.ndim != 4:
                shape = tuple(x.shape)
                raise ConfigError(f"training.mixing: cutmix mixes images (N, C, H, W); input {index} is {shape}")
            if not x.is_floating_point():
                raise ConfigError(f"training.mixing: {self.rule} mixes floats; input {index} is {x.dtype}")

    def of(self, batch: Sequence[Tensor]) -> Sequence[Tensor]:
        """The inputs of one step, (N, …) each: new tensors where they are mixed."""
        if self.rule is None or float(torch.rand(())) >= self.share:
            return batch
        own = float(torch.rand(()))
        if self.rule == "mixup":
            return [mixup(x, own) for x in batch]
        place = torch.rand(2)
        return [cutmix(x, own, place) for x in batch]


def mixup(x: Tensor, own: float) -> Tensor:
    """l x + (1 - l) x', x' the sample in front (Zhang et al. 2018, "mixup", eq. 1). x: (N, …). own: l."""
    return torch.lerp(x.roll(1, 0), x, own)


def cutmix(x: Tensor, own: float, place: Tensor) -> Tensor:
    """Images with a rectangle of the image in front (Yun et al. 2019, "CutMix", eq. 1 and 2). x: (N, C, H, W).

    The rectangle's sides are sqrt(1 - l) of the image's; what lies outside of the image is cut off. own: l. place: its
    middle (2,), from 0 to 1, down and across.
    """
    mixed = x.clone()
    middles = [int(p * side) for p, side in zip(place.tolist(), x.shape[2:], strict=True)]
    halves = [int((1 - own) ** 0.5 * side / 2) for side in x.shape[2:]]
    rows, columns = (slice(max(0, m - h), m + h) for m, h in zip(middles, halves, strict=True))
    mixed[:, :, rows, columns] = x.roll(1, 0)[:, :, rows, columns]
    return mixed
