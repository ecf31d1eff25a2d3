"""Folders of image files: which files are images, and what values they hold.

Hidden folders and files (`.ipynb_checkpoints`, `._1.png`, `__MACOSX`) are neither classes nor images.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pow2quant.errors import DataError
from pow2quant.foreign import check_is_file

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""How the names of images end; those of torchvision's ImageFolder."""

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""Pillow's names of what such files hold, whatever they are called; for others Pillow may start programs."""

MOST_ENTRIES = 20_000_000
"""Files and folders below one class's folder; ImageNet has 1,300."""

ENOUGH = 100
"""So many images tell what sizes the images of a folder have."""

SHALLOW = {"1", "L", "P", "RGB", "RGBA", "LA", "PA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
"""Pillow's modes of at most 8 bits per channel, which it converts to RGB without losing any."""

TWO_BYTES = {"RGB;16B", "RGB;16L", "RGBA;16B", "RGBA;16L"}
"""Pillow's names of colours of 16 bits, in the order of bytes that is named last."""

LEGAL = "legal: 8 bits per channel, 16 bits per channel as PNG or TIFF, grey float TIFF with values from 0 to 1"


class ImageFiles(Dataset[tuple[Any, int]]):
    """The images in `root/CLASS/`, at any depth, classes and files in the order of their names.

    Items are (transformed image, index of the class). Raises FileNotFoundError for a root without classes and a class
    without images; DataError, naming the file, for what is no readable image.
    """

    def __init__(self, root: Path, transform: Callable[[Any], Any]) -> None:
        self.root = root
        self.transform = transform
        self.classes = classes_in(root)
        self.files: list[str] = []
        self.targets: list[int] = []
        if not self.classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {root}")
        for index, name in enumerate(self.classes):
            own = sorted(_images(root / name))
            if not own:
                raise FileNotFoundError(f"Found no valid file for the classes {name} (legal: {', '.join(EXTENSIONS)})")
            self.files += own
            self.targets += [index] * len(own)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(image(self.files[index])), self.targets[index]

    def identity(self, chosen: Sequence[int]) -> str:
        """What tells these images from others, whatever is done to them: their names within the folder, and sizes."""
        lines = [f"{Path(f).relative_to(self.root)} {Path(f).stat().st_size}" for f in (self.files[i] for i in chosen)]
        return blake2b("\n".join(lines).encode()).hexdigest()[:16]


class UnlabelledFiles(ImageFiles):
    """The images that lie in `root` itself, in the order of their names. Items are transformed images."""

    def __init__(self, root: Path, transform: Callable[[Any], Any]) -> None:
        self.root, self.transform = root, transform
        self.files = [str(path) for path in sorted(root.iterdir()) if _is_image(path.name)]

    def __getitem__(self, index: int) -> Any:
        return self.transform(image(self.files[index]))


def classes_in(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted; none where it is no folder."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not hidden(p.name)) if root.is_dir() else []


def hidden(name: str) -> bool:
    """Whether systems and programs keep files of this name for themselves."""
    return name.startswith(".") or name == "__MACOSX"


def _images(folder: Path) -> Iterator[str]:
    """The files below a class's folder that are called as images are. The folder may be a link; those in it lead away.

    Raises DataError for a link to where it lies, and for more than `MOST_ENTRIES`.
    """
    if folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder}: is a link to where it lies")
    seen = 0
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not hidden(name))
        seen += len(folders) + len(files)
        if seen > MOST_ENTRIES:
            raise DataError(f"{folder}: has more than {MOST_ENTRIES:,} files")
        yield from (os.path.join(root, name) for name in files if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not hidden(name)


def sizes(files: Sequence[str]) -> list[tuple[int, int]]:
    """(width, height) of some of the images, evenly spaced; of those that can be read."""
    from PIL import Image

    found = []
    for index in np.unique(np.linspace(0, len(files) - 1, min(len(files), ENOUGH)).astype(int)):
        try:
            with Image.open(check_is_file(files[index], DataError), formats=FORMATS) as opened:
                found.append(opened.size)
        except Exception:
            continue  # reading the image itself will say what is wrong
    return found


def image(path: str) -> Any:
    """An image file: a PIL image (RGB) of 8 bits, or float32 (3, H, W) from 0 to 1 where it holds more than 8 bits.

    Values are scaled by the range of their type, so that white is 1. Raises DataError, naming the file, for what is no
    readable image or has values whose range is unknown.
    """
    from PIL import Image

    check_is_file(path, DataError)
    try:
        with Image.open(path, formats=FORMATS) as opened:
            raw, depth = _stored(opened)
            if _is_planar(opened):
                raise DataError(f"{path}: holds one channel of more than 8 bits behind the other; {LEGAL}")
            if depth == 8 and opened.mode in SHALLOW:
                return opened.convert("RGB")
            return _colours(path, raw) if raw in TWO_BYTES else _deep(opened, raw, depth, path)
    except DataError:
        raise
    except Exception as error:  # a damaged file makes Pillow fail in every way there is
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise DataError(f"{path}: not a readable image ({reason})") from None


def _stored(opened: Any) -> tuple[str, int]:
    """Pillow's name of how a file stores its values, and bits per value; 8 for fewer and where the name is silent."""
    args = opened.tile[0].args if opened.tile else ()
    name, *rest = (args or ("",)) if isinstance(args, tuple) else (args,)  # WebP says nothing
    if opened.format == "PPM":
        return str(name), 16 if rest and isinstance(rest[0], int) and rest[0] > 255 else 8
    name = re.sub("N$", sys.byteorder[0].upper(), str(name))  # what libtiff decodes is in the order of the machine
    bits = re.search(r";(\d+)", str(name)) if opened.format in ("PNG", "TIFF") else None
    return str(name), max(8, int(bits[1])) if bits else 8


def _is_planar(opened: Any) -> bool:
    """Whether a TIFF has channels of more than 8 bits one behind the other, which Pillow reads wrongly."""
    tags = opened.tag_v2 if opened.format == "TIFF" else {}
    return bool(tags.get(284) == 2 and max(tags.get(258, (1,))) > 8)


def _colours(path: str, raw: str) -> Tensor:
    """Colours of 16 bits per channel, with all of them: Pillow keeps 8, the first or the second byte of each value.

    Which one follows from the order of bytes that it is told, `B` or `L` at the end of the layout's name.
    """
    from PIL import Image

    found = []
    for order in "BL":
        with Image.open(path, formats=FORMATS) as opened:
            name = raw[:-1] + order
            opened.tile = [
                tile._replace(args=(name, *tile.args[1:]) if isinstance(tile.args, tuple) else name)
                for tile in opened.tile
            ]
            found.append(np.asarray(opened.convert("RGB")).astype(np.float32))
    first, second = found if raw.endswith("B") else reversed(found)
    return torch.from_numpy((256 * first + second) / np.float32(65535)).permute(2, 0, 1).contiguous()


def _deep(opened: Any, raw: str, depth: int, path: str) -> Tensor:
    """A grey image of more than 8 bits that is no PNG."""
    values = np.asarray(opened)
    inverted = opened.format == "TIFF" and opened.tag_v2.get(262) == 0  # 0 is white; Pillow heeds it on 8 bits only
    if opened.mode == "F" and raw.endswith("F"):
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):
            raise DataError(f"{path}: holds float values from {low:g} to {high:g}; {LEGAL}")
        white = 1.0
    elif opened.mode.startswith("I;16"):
        white = 2.0 ** (depth if depth > 8 else 16) - 1
    elif opened.mode == "I" and opened.format == "PPM":
        white = 65535.0  # Pillow has scaled the values to 16 bits
    else:
        raise DataError(f"{path}: holds values as {opened.format} {raw}; {LEGAL}")
    grey = torch.from_numpy(values.astype(np.float32) / np.float32(white))
    return (1 - grey if inverted else grey).expand(3, -1, -1).clone()
