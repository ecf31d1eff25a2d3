"""Image to image: denoising, super-resolution, autoencoders; PSNR and SSIM."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from torch import Tensor

from pow2quant.errors import DataError
from pow2quant.tasks.base import Array, Averaged, Metric, Outputs, Shapes, tensor_of, wrong

BORDER = 5
"""Pixels at the edge that SSIM leaves out: half of its window of 11."""


@dataclass(frozen=True)
class ImageToImage:
    """Targets of the outputs' shape (N, C, H, W) or (N, H, W), in [0, 1], [-1, 1] or [0, 255]."""

    shapes: Shapes
    name: str = "image-to-image"
    loss: str = "MSELoss"
    diagnostics: tuple[Metric, ...] = ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("psnr", partial(Averaged, psnr), unit="dB"), Metric("ssim", partial(Averaged, ssim)))

    def check(self, targets: Any, samples: int, where: str) -> Any:
        shape = (samples, *self.shapes[0])
        images = tensor_of(targets, where, f"images {shape}")
        if len(shape) < 3:
            raise DataError(f"{where}: outputs of the network are {shape}; images are (N, C, H, W) or (N, H, W)")
        if tuple(images.shape) != shape:
            raise wrong(images, where, f"images {shape}")
        return images.float()

    @classmethod
    def fits(cls, targets: Any, shapes: Shapes) -> bool:
        """Whether the data look like this task."""
        return (
            isinstance(targets, Tensor)
            and targets.is_floating_point()
            and len(shapes[0]) == 3
            and tuple(targets.shape[1:]) == shapes[0]
        )


def white(images: Array) -> float:
    """The distance from black to white that the images' values speak of."""
    low, high = float(images.min()), float(images.max())
    return 255.0 if high > 2 else 2.0 if low < 0 else 1.0


def psnr(outputs: Outputs, targets: Array) -> Array:
    """10 log10(white^2 / mean square error) of each image, in dB; at most 100."""
    errors = np.square(outputs[0].astype(np.float64) - targets).reshape(len(targets), -1).mean(1)
    found: Array = np.minimum(100.0, 10 * np.log10(white(targets) ** 2 / np.maximum(errors, 1e-30)))
    return found


def ssim(outputs: Outputs, targets: Array) -> Array:
    """Structural similarity, Wang et al. 2004: a Gaussian window of 11 pixels; the mean of each image."""
    x, y = outputs[0].astype(np.float64), targets.astype(np.float64)
    c1, c2 = (0.01 * white(targets)) ** 2, (0.03 * white(targets)) ** 2

    def blurred(images: Array) -> Array:
        found: Array = gaussian_filter(images, 1.5, truncate=BORDER / 1.5, axes=(-2, -1))
        return found

    mx, my = blurred(x), blurred(y)
    vx, vy, both = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
    similar = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    if min(x.shape[-2:]) > 2 * BORDER:
        similar = similar[..., BORDER:-BORDER, BORDER:-BORDER]
    found: Array = similar.reshape(len(x), -1).mean(1)
    return found
