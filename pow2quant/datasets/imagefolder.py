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

TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
"""What folders of a split are called; of several for evaluation, the first one is used."""

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

    training, tests = (_called(path, names) for names in (TRAIN, TEST))
    tests = [found for found in tests if classes_in(found)]
    if training and tests:
        calibration, train = (folder(training[0], steps) for steps in (plain, varied))
        test = folder(tests[0], plain)
        if train.classes != test.classes:
            odd = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
            raise DataError(f"{path}: {training[0].name}/ and {tests[0].name}/ have different classes: {odd}")
        return calibration, train, test
    if {"train", "test", "val"} & {found.name for found in (*training, *tests)}:
        raise DataError(f"{path}: {'test/ or val/' if not tests else 'train/'} is missing; expected {layout}")
    if not classes_in(path) and path.is_dir() and len(images := UnlabelledFiles(path, t.Compose(plain))):
        return images, UnlabelledFiles(path, t.Compose(varied)), images
    images = folder(path, plain)
    kept, held_out = _split(images.targets)
    return Subset(images, kept), Subset(folder(path, varied), kept), Subset(images, held_out)


def _called(path: Path, names: tuple[str, ...]) -> list[Path]:
    """The folders with one of these names, in their order, written with small or capital letters."""
    found = {name.lower(): path / name for name in classes_in(path)}
    return [found[name] for name in names if name in found]


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
