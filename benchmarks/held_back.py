"""CIFAR-10 without its test images: what settings of a training can be chosen by.

    python benchmarks/held_back.py --data-path DIR --network models.py:cifar10_resnet20 --weights resnet20.safetensors
        --output OTHER [--train 28000] [--held-back 2000]
    python benchmarks/qat.py --data-path OTHER …

DIR holds `cifar-10-batches-py/` or `cifar10.npz`; the network and its weights are your own. OTHER gets a `cifar10.npz`.
Its training images are the first of DIR's. Its test images are made of DIR's last training images, which are held back:
each is the left half of one and the right half of another, in five pairings. Their labels are the classes that the
float network gives them. So `benchmarks/qat.py` prints a float accuracy of 100 %, and the other accuracies are shares
of images whose class is still that of the float network. Images that are held back cannot be used as they are, when the
float network was trained on them: it is so sure of their classes that hardly any quantized network differs from it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pow2quant import models
from pow2quant.config import DataConfig
from pow2quant.datasets.cifar10 import cifar10
from pow2quant.datasets.settings import resolved

PAIRINGS = 5
"""Test images for each image that is held back."""


def composed(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (5 N, C, H, W): left halves, each beside the right half of another image."""
    generator = torch.Generator().manual_seed(0)
    shifts = torch.randperm(len(images) - 1, generator=generator)[:PAIRINGS] + 1
    half = images.shape[3] // 2
    pairs = [torch.cat([images[..., :half], images.roll(int(s), 0)[..., half:]], dim=3) for s in shifts]
    return torch.cat(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--train", type=int, default=28000, help="training images")
    parser.add_argument("--held-back", type=int, default=2000, help="of the last training images")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    options = parser.parse_args()
    images, _, _ = cifar10(resolved(DataConfig("cifar10", options.data_path)))
    if options.train < 1 or options.train + options.held_back > len(images):
        parser.error(f"--train and --held-back: {options.data_path} has {len(images)} training images")
    if options.held_back <= PAIRINGS:
        parser.error(f"--held-back: {options.held_back}; at least {PAIRINGS + 1} images make {PAIRINGS} pairings")
    pixels = composed(images.pixels[-options.held_back :])
    tested = replace(images, pixels=pixels, labels=torch.zeros(len(pixels), dtype=torch.int64))
    network = models.build(options.network, weights=options.weights).eval()
    with torch.no_grad():
        found = [network(x).argmax(1) for x, _ in DataLoader(tested, 64, collate_fn=lambda batch: batch)]
    path = options.output / "cifar10.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    train = (images.pixels[: options.train], images.labels[: options.train])
    save(path, {"train": train, "test": (pixels, torch.cat(found))})
    print(f"{path}: {options.train:,} training images, {len(pixels):,} test images")


def save(path: Path, parts: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Images (N, C, H, W) uint8 and labels (N,), by the name of their part."""
    arrays = {f"{name}_x": x.permute(0, 2, 3, 1).numpy() for name, (x, _) in parts.items()}
    np.savez(path, **arrays, **{f"{name}_y": y.numpy() for name, (_, y) in parts.items()})


if __name__ == "__main__":
    main()
