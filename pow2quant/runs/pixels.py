"""`--input pixels`: data as the camera's bytes, and the float network that normalizes them itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pow2quant import datasets
from pow2quant.backends.base import Simulation
from pow2quant.backends.pixels import carriers
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError, DataError
from pow2quant.pow2_constraints import Encoding, IntGrid
from pow2quant.reading import Checked

BYTE = Encoding(np.array(1, np.float32), np.array(0), IntGrid(8, signed=False))
"""The encoding of a byte: its code is its value."""

OFF = 0.02
"""So far from a whole number may a pixel be that was normalized in float32."""


@dataclass(frozen=True)
class Pixels:
    """How pixels become a network's input: (p / white - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: int

    @classmethod
    def of(cls, config: RunConfig) -> Pixels:
        """Of a configuration whose data are known. Raises ConfigError where it does not say what is to be folded."""
        data, entering = config.data, config.quantization.input
        if entering is None or entering.bits != 8 or entering.symmetric or not entering.power_of_2:
            raise ConfigError(
                "data.input: pixels needs quantization.input as a byte: bitwidth 8, symmetric false, power_of_2 true"
            )
        if data.mean is None or data.std is None:
            raise ConfigError(f"data.input: pixels needs data.mean and data.std, with which {data.dataset} normalizes")
        return cls(data.mean, data.std, datasets.white_of(data))

    def normalized(self, pixels: Tensor) -> Tensor:
        """(N, C, …) as the float network takes it."""
        mean, std = self._shaped(pixels)
        return (pixels / self.white - mean) / std

    def pixels(self, images: Any, where: str) -> Any:
        """Normalized images (N, C, …) as whole numbers from 0 to 255. Raises DataError where they are none."""
        if not isinstance(images, Tensor) or images.ndim < 3 or not images.is_floating_point():
            raise DataError(f"{where}: --input pixels is for one image per sample, float32 (N, C, H, W)")
        mean, std = self._shaped(images)
        values = (images * std + mean) * self.white
        found = values.round()
        off = float((values - found).abs().max())
        if off > OFF or float(found.min()) < 0 or float(found.max()) > BYTE.grid.qmax:
            raise DataError(
                f"{where}: --input pixels, but (x * std + mean) * {self.white} gives no bytes (off by {off:.2g}, "
                f"{float(values.min()):g} to {float(values.max()):g}); data.mean and data.std have to be those of the "
                "normalization, and images resized before they become floats"
            )
        return found

    def _shaped(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (images.ndim - 2))
        parts = (torch.tensor(values, device=images.device).reshape(shape) for values in (self.mean, self.std))
        mean, std = parts
        return mean, std

    def data(self, data: datasets.Data) -> datasets.Data:
        """The same data with pixels in place of normalized images."""
        return data.with_parts(lambda part: replace(part, batches=InPixels(part, self), check=None))


@dataclass(frozen=True)
class InPixels:
    """Batches of pixels, of batches of normalized images."""

    checked: Checked
    how: Pixels

    def __len__(self) -> int:
        return len(self.checked)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for index, (images, targets) in enumerate(self.checked):
            yield self.how.pixels(images, f"{self.checked.name}, batch {index}"), targets


class Normalizing(nn.Module):
    """A float network that is given pixels."""

    def __init__(self, model: nn.Module, how: Pixels) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, pixels: Tensor) -> Any:
        """(N, C, H, W), 0 to 255."""
        return self.model(self.how.normalized(pixels))


def take_bytes(sim: Simulation, network: fx.GraphModule) -> None:
    """Gives the network's input, and what only moves it, the encoding of a byte; biases follow."""
    names, table = carriers(network), dict(sim.encodings())
    held = {site.name for site in sim.sites if site.role in ("input", "output") and site.name in names}
    if any(table[name] != BYTE for name in held):
        sim.load(table | dict.fromkeys(held, BYTE))
        sim.calibrate((), roles={"bias"})
