"""What resizing and cropping does to images, done and said."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

ENLARGED = 0.1
"""Where more than this share of the images is enlarged, a warning says so."""


def sized(images: Tensor, resize: int | None, crop: int | None) -> Tensor:
    """Images (N, C, H, W) whose shorter side becomes `resize` pixels, and their central square of side `crop`."""
    from torchvision.transforms import functional

    if resize:
        images = functional.resize(images, [resize], antialias=True)
    return functional.center_crop(images, [crop]) if crop else images


def described(sizes: Sequence[tuple[int, int]], resize: int | None, crop: int | None) -> str:
    """What becomes of images of these sizes, (width, height), in a line: `32x32 -> 256 -> 224 (...)`."""
    smallest, largest = min(sizes), max(sizes)
    start = f"{smallest[0]}x{smallest[1]}"
    if smallest != largest:
        start += f" to {largest[0]}x{largest[1]}"
    numbers = [str(number) for number in (resize, crop) if number]
    words = [f"shorter side {resize}"] if resize else []
    words += [f"central {crop}x{crop}"] if crop else []
    return f"images: {' -> '.join([start, *numbers])} ({', '.join(words)})"


def enlarging(sizes: Sequence[tuple[int, int]], resize: int | None) -> str | None:
    """A warning where resizing enlarges many of the images: the network may have been trained on smaller ones."""
    small = [size for size in sizes if resize and min(size) < resize]
    if len(small) <= ENLARGED * len(sizes):
        return None
    width, height = min(small)
    share = "" if len(small) == len(sizes) else f"{len(small)} of {len(sizes)} "
    return (
        f"{share}images are enlarged, such as {width}x{height} to a shorter side of {resize}; if the network was "
        f"trained on their own size, give --resize {min(width, height)} --crop {min(width, height)}"
    )
