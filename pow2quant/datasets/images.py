"""Images in memory as bytes, which become normalized floats a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from pow2quant.config import DataConfig
from pow2quant.datasets.resizing import sized
from pow2quant.datasets.settings import normalization
from pow2quant.errors import ConfigError, DataError
from pow2quant.reading import check_labels

Batch = tuple[Tensor, Tensor]
"""Images, float32 (N, C, H, W), and their classes, int64 (N,)."""


@dataclass(frozen=True, eq=False)
class Images(Dataset[Batch]):
    """Images in memory as bytes; they become floats a batch at a time, as torchvision's ToTensor and Normalize do.

    pixels: uint8 (N, C, H, W); labels: int64 (N,); white: the byte that becomes 1.0. augmented: a random crop of the
    image padded by four pixels, and a random flip.
    Raises DataError when a label is no class or the numbers differ, ConfigError when `config` normalizes another number
    of channels.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    config: DataConfig
    white: int = 255
    augmented: bool = False

    def __post_init__(self) -> None:
        where = self.config.path or self.config.dataset
        if len(self.pixels) != len(self.labels):
            raise DataError(f"{where}: {len(self.pixels)} images but {len(self.labels)} labels")
        check_labels(self.labels, len(self.classes), where)
        normalization(self.config, self.pixels.shape[1])
        side = min(self.pixels.shape[2:])
        if self.config.crop and not self.config.resize and self.config.crop > side:
            raise ConfigError(f"data.crop: {self.config.crop} is larger than the images, {side}; give data.resize too")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def targets(self) -> Tensor:
        """The labels, as torchvision's data sets call them."""
        return self.labels

    def identity(self, chosen: Sequence[int]) -> str:
        """What tells these images from others, whatever is done to them."""
        own = list(chosen)
        return blake2b(self.pixels[own].numpy().tobytes() + self.labels[own].numpy().tobytes()).hexdigest()[:16]

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once, which DataLoader prefers where it exists."""
        pixels = self.pixels[indices]
        images = (_jittered(pixels) if self.augmented else pixels).float().div_(self.white)
        if self.config.resize or self.config.crop:
            images = sized(images, self.config.resize, self.config.crop)
        mean, std = normalization(self.config, images.shape[1])
        return images.sub_(mean).div_(std), self.labels[indices]


def _jittered(pixels: Tensor, margin: int = 4) -> Tensor:
    """Each image (N, C, H, W) cropped at a random place of its zero-padded self, and flipped half of the time."""
    n, _, height, width = pixels.shape
    rows = torch.randint(2 * margin + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * margin + 1, (n, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    padded = F.pad(pixels, (margin,) * 4).permute(0, 2, 3, 1)
    cropped = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()
