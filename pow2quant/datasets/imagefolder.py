"""Folders of image files: a folder for each class, or images without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from pow2quant.config import DataConfig
from pow2quant.datasets.image_files import ImageFiles, UnlabelledFiles, classes_in
from pow2quant.datasets.settings import normalization, path_of
from pow2quant.errors import DataError
from pow2quant.reading import last_line

HELD_OUT = 5
"""Every fifth image of a class is for test where a folder has no split of its own."""


def imagefolder(config: DataConfig) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
    """Image files in `path/{train, test or val}/CLASS/`, or in `path/CLASS/`: then every fifth file is for test.

    Images that lie in `path` itself have no labels; all of them are for calibration and for test.

    The shorter side becomes `resize`, the central square of side `crop` is used; training crops at random places.
    """
    from torchvision import transforms as t

    layout = "train/CLASS/*.jpg and test/ or val/ with the same classes, CLASS/*.jpg, or *.jpg without labels"
    path = path_of(config, layout)
    mean, std = normalization(config, 3)
    last = [_tensor, t.Normalize(mean.flatten().tolist(), std.flatten().tolist())]
    plain, varied = ([t.Resize(config.resize), crop(config.crop), *last] for crop in (t.CenterCrop, t.RandomCrop))

    def folder(root: Path, steps: list[Any]) -> Any:
        return _folder(root, t.Compose(steps), layout)

    tests = [path / name for name in ("test", "val") if classes_in(path / name)]
    if (path / "train").is_dir() and tests:
        calibration, train = (folder(path / "train", steps) for steps in (plain, varied))
        test = folder(tests[0], plain)
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise DataError(f"{path}: train/ and {tests[0].name}/ have different classes: {', '.join(odd[:5])}")
        return calibration, train, test
    if (path / "train").is_dir() or tests:
        raise DataError(f"{path}: {'test/ or val/' if not tests else 'train/'} is missing; expected {layout}")
    if not classes_in(path) and path.is_dir() and len(images := UnlabelledFiles(path, t.Compose(plain))):
        return images, UnlabelledFiles(path, t.Compose(varied)), images
    images = folder(path, plain)
    kept, held_out = _split(images.targets)
    return Subset(images, kept), Subset(folder(path, varied), kept), Subset(images, held_out)


def _folder(root: Path, transform: Any, layout: str) -> Any:
    try:
        return ImageFiles(root, transform)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{root}: {last_line(error)}; expected {layout}") from None


def _tensor(image: Any) -> Tensor:
    """float32 (3, H, W) from 0 to 1; images of more than 8 bits are that already."""
    from torchvision.transforms import functional

    found: Tensor = image if isinstance(image, Tensor) else functional.to_tensor(image)
    return found


def _split(targets: list[int]) -> tuple[list[int], list[int]]:
    """Indices for training and for test: the fifth, tenth, ... of each class."""
    seen: dict[int, int] = {}
    held_out = []
    for index, target in enumerate(targets):
        seen[target] = seen.get(target, 0) + 1
        if seen[target] % HELD_OUT == 0:
            held_out.append(index)
    return sorted(set(range(len(targets))) - set(held_out)), held_out
