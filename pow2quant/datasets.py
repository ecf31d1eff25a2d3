"""Data by name: batches for calibration, training and test, checked on the way out.

What `dataset` may be: `digits`, `cifar10`, `mnist`, `imagefolder`, a plug-in's name, `path/to/file.py:function`, or a
file of arrays (`.npz`, `.npy`). Each function, of the `DataConfig` if it takes an argument, returns a finished `Data`,
or data in a form that `sources` knows: (train, test) or (calibration, train, test) as torch data sets, a DataLoader, …
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

from pow2quant.config import DataConfig, from_file, is_in_file, users_code
from pow2quant.errors import ConfigError, DataError
from pow2quant.image_files import ImageFiles, UnlabelledFiles, classes_in, sizes
from pow2quant.plugins import names, resolve
from pow2quant.reading import check_labels, last_line
from pow2quant.resizing import described, enlarging, sized
from pow2quant.sources import SHUFFLE_SEED as SHUFFLE_SEED
from pow2quant.sources import Data as Data
from pow2quant.sources import data_of

Batch = tuple[Tensor, Tensor]
"""Images, float32 (N, C, H, W), and their classes, int64 (N,)."""

HELD_OUT = 5
"""Every fifth image of a class is for test where a folder has no split of its own."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"mean": (0.0,), "std": (1.0,)},
    "mnist": {"mean": (0.1307,), "std": (0.3081,)},
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    "imagefolder": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "resize": 256, "crop": 224},
}
"""What a data set's name implies where the configuration says nothing."""


WHITE = {"digits": 16}
"""The pixel that becomes 1.0, where that is not 255."""


def white_of(config: DataConfig) -> int:
    """The pixel that becomes 1.0 before normalization."""
    return WHITE.get(config.dataset, 255)


def load(config: DataConfig, train_batch_size: int | None = None, given: Any = None) -> Data:
    """The data that a configuration asks for; `train` in batches of `train_batch_size` where that is given.

    given: data in a form that `sources` knows, in place of what `config.dataset` names.
    Raises DataError, naming the path and the layout it should have, or what is wrong with a batch; ConfigError for an
    unknown data set or a normalization that does not fit the images.
    """
    config, name = resolved(config), config.dataset
    if given is not None:
        made, name = given, f"data, a {type(given).__name__}"
    elif name.startswith("python:"):
        raise DataError(f"{name}: were given in Python as an object; name data that can be read again (--data)")
    elif is_in_file(name):
        function = from_file(name, DataError)
        with users_code(name, DataError):
            made = _call(function, config)
    elif name.endswith((".npz", ".npy")):
        made = _arrays(Path(name))
    elif name in names("datasets"):
        made = _call(resolve("datasets", name), config)
    else:
        known = ", ".join([*sorted(names("datasets")), "path/to/file.py:function", "arrays.npz", "arrays.npy"])
        raise ConfigError(f"data.dataset: {name!r} is unknown; known: {known}")
    in_memory = isinstance(made, tuple) and isinstance(made[-1], Images)
    data = data_of(
        made, name, config.batch_size, train_batch_size or config.batch_size, 0 if in_memory else config.workers
    )
    return _told(data, made[-1], config) if isinstance(made, tuple) else data


def resolved(config: DataConfig) -> DataConfig:
    """The configuration with what its data set implies filled in, so that it says how to repeat the run.

    Raises ConfigError when the crop is larger than the resized image.
    """
    given = {key: value for key in ("mean", "std", "resize", "crop") if (value := getattr(config, key)) is not None}
    if config.dataset == "imagefolder" and ("resize" in given or "crop" in given):  # one side implies the other
        given = {"resize": given.get("crop"), "crop": given.get("resize"), **given}
    config = replace(config, **{**DEFAULTS.get(config.dataset, {}), **given})
    if config.resize and config.crop and config.crop > config.resize:
        raise ConfigError(f"data.crop: {config.crop} is larger than data.resize, {config.resize}")
    return config


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
        _normalization(self.config, self.pixels.shape[1])
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
        mean, std = _normalization(self.config, images.shape[1])
        return images.sub_(mean).div_(std), self.labels[indices]


def digits(config: DataConfig) -> tuple[Images, Images]:
    """scikit-learn's 1,797 handwritten digits (1, 8, 8), of which a fixed stratified quarter is for test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    parts = train_test_split(np.arange(len(bunch.target)), test_size=0.25, stratify=bunch.target, random_state=0)
    pixels, labels = torch.from_numpy(bunch.images.astype(np.uint8))[:, None], torch.from_numpy(bunch.target).long()
    names = tuple(map(str, range(10)))
    train, test = (Images(pixels[part], labels[part], names, config, white=WHITE["digits"]) for part in parts)
    return train, test


def mnist(config: DataConfig) -> tuple[Images, Images]:
    """MNIST (1, 28, 28) from `path/MNIST/raw/*-ubyte`; nothing is downloaded."""
    from torchvision.datasets import MNIST

    path = _path(config, "MNIST/raw/train-images-idx3-ubyte and the other three files")
    try:
        parts = [MNIST(str(path), train=train, download=False) for train in (True, False)]
    except Exception as error:  # torchvision asserts and raises whatever it likes about a damaged file
        layout = "expected MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte, complete"
        raise DataError(f"{path}: {layout} ({last_line(error)})") from None
    train, test = (Images(p.data[:, None], p.targets.long(), tuple(map(str, range(10))), config) for p in parts)
    return train, test


def cifar10(config: DataConfig) -> tuple[Images, Images, Images]:
    """CIFAR-10 (3, 32, 32) from `path/cifar-10-batches-py/` or `path/cifar10.npz`; training images are augmented.

    The npz holds train_x (N, 32, 32, 3) uint8, train_y (N,), test_x and test_y.
    """
    layout = "cifar-10-batches-py/ (data_batch_1 ... data_batch_5, test_batch) or cifar10.npz"
    path = _path(config, layout)
    archive = path if path.suffix == ".npz" else path / "cifar10.npz"
    folder = path if (path / "test_batch").is_file() else path / "cifar-10-batches-py"
    if not archive.is_file() and not folder.is_dir():
        raise DataError(f"{path}: expected {layout}")
    (train_x, train_y), test = _cifar_archive(archive) if archive.is_file() else _cifar_batches(folder)
    train = Images(train_x, train_y, CIFAR10_CLASSES, config)
    return train, replace(train, augmented=True), Images(*test, CIFAR10_CLASSES, config)


def imagefolder(config: DataConfig) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
    """Image files in `path/{train, test or val}/CLASS/`, or in `path/CLASS/`: then every fifth file is for test.

    Images that lie in `path` itself have no labels; all of them are for calibration and for test.

    The shorter side becomes `resize`, the central square of side `crop` is used; training crops at random places.
    """
    from torchvision import transforms as t

    layout = "train/CLASS/*.jpg and test/ or val/ with the same classes, CLASS/*.jpg, or *.jpg without labels"
    path = _path(config, layout)
    mean, std = _normalization(config, 3)
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


def _path(config: DataConfig, layout: str) -> Path:
    if config.path is None:
        raise DataError(f"data.path: {config.dataset} needs a folder with {layout}")
    path = Path(config.path)
    if not path.exists():
        raise DataError(f"{path}: no such folder; expected one with {layout}")
    return path


def _normalization(config: DataConfig, channels: int) -> tuple[Tensor, Tensor]:
    """mean and std as (channels or 1, 1, 1). Raises ConfigError when their number is wrong or a std is not positive."""
    tensors = []
    for key, values in (("mean", config.mean or (0.0,)), ("std", config.std or (1.0,))):
        if len(values) not in (1, channels):
            raise ConfigError(f"data.{key}: {len(values)} values for images of {channels} channels")
        if key == "std" and not min(values) > 0:
            raise ConfigError(f"data.std: {list(values)} is not legal; legal: a list of finite numbers above 0")
        tensors.append(torch.tensor(values, dtype=torch.float32)[:, None, None])
    return tensors[0], tensors[1]


def _jittered(pixels: Tensor, margin: int = 4) -> Tensor:
    """Each image (N, C, H, W) cropped at a random place of its zero-padded self, and flipped half of the time."""
    n, _, height, width = pixels.shape
    rows = torch.randint(2 * margin + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * margin + 1, (n, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    padded = F.pad(pixels, (margin,) * 4).permute(0, 2, 3, 1)
    cropped = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


def _arrays(path: Path) -> Any:
    """The arrays of a file: X of .npy; of .npz `train_x` and `test_x` (with `train_y`, `test_y`), or any columns.

    Either part of such a name may stand first, as in `x_train`.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy and zipfile raise whatever they like about a damaged file
        raise DataError(f"{path}: not a file of arrays ({last_line(error)})") from None
    parts = [f"{part}_{kind}" for part in ("train", "test") for kind in "xy"]
    arrays = {next((n for n in parts if {*n.split("_")} == {*name.split("_")}), name): a for name, a in arrays.items()}
    if not {"train_x", "test_x"} <= arrays.keys():
        return arrays
    train, test = ([arrays[key] for key in (f"{part}_x", f"{part}_y") if key in arrays] for part in ("train", "test"))
    try:
        return tuple(TensorDataset(*map(torch.from_numpy, part)) for part in (train, test))
    except (AssertionError, TypeError, ValueError) as error:  # dates, text; more images than labels
        raise DataError(f"{path}: not images and labels as numbers, one of each ({last_line(error)})") from None


def _cifar_archive(path: Path) -> tuple[Batch, Batch]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("train_x", "train_y", "test_x", "test_y")}
    except Exception as error:  # numpy and zipfile raise whatever they like about a damaged file
        raise DataError(f"{path}: expected train_x, train_y, test_x, test_y ({last_line(error)})") from None
    train, test = (_bytes(arrays[f"{part}_x"], arrays[f"{part}_y"], path) for part in ("train", "test"))
    return train, test


def _cifar_batches(folder: Path) -> tuple[Batch, Batch]:
    def read(name: str) -> Batch:
        path = folder / name
        try:
            with path.open("rb") as file:
                batch = _ArrayUnpickler(file, encoding="latin1").load()
            planes = np.asarray(batch["data"]).reshape(-1, 3, 32, 32)
            return _bytes(planes.transpose(0, 2, 3, 1), np.asarray(batch["labels"]), path)
        except OSError:
            raise DataError(f"{path}: is missing; expected data_batch_1 ... data_batch_5 and test_batch") from None
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not a CIFAR-10 batch ({last_line(error)})") from None

    images, labels = zip(*(read(f"data_batch_{i}") for i in range(1, 6)), strict=True)
    return (torch.cat(images), torch.cat(labels)), read("test_batch")


class _ArrayUnpickler(pickle.Unpickler):
    """Opens CIFAR-10's pickles, which hold arrays and nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module.partition(".")[0] == "numpy" and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"holds {module}.{name}")


def _bytes(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], path: Path) -> Batch:
    """(N, 32, 32, 3) uint8 and (N,) -> tensors (N, 3, 32, 32) and int64 (N,)."""
    if images.ndim != 4 or images.shape[1:] != (32, 32, 3) or images.dtype != np.uint8:
        raise DataError(f"{path}: expected images of (N, 32, 32, 3) uint8, got {images.shape} {images.dtype}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: expected {len(images)} integer labels, got {labels.shape} {labels.dtype}")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


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


def _told(data: Data, test: Any, config: DataConfig) -> Data:
    """The data with what resizing and cropping does to their images, in words."""
    if not (config.resize or config.crop):
        return data
    files = test.dataset if isinstance(test, Subset) else test
    if isinstance(files, Images):
        height, width = files.pixels.shape[2:]
        found = [(int(width), int(height))]
    elif isinstance(files, ImageFiles):
        found = sizes(files.files)
    else:
        return data
    if not found:
        return data
    warning = enlarging(found, config.resize)
    notes = (described(found, config.resize, config.crop),)
    return replace(data, notes=notes, warnings=(warning,) if warning else ())


def _split(targets: list[int]) -> tuple[list[int], list[int]]:
    """Indices for training and for test: the fifth, tenth, ... of each class."""
    seen: dict[int, int] = {}
    held_out = []
    for index, target in enumerate(targets):
        seen[target] = seen.get(target, 0) + 1
        if seen[target] % HELD_OUT == 0:
            held_out.append(index)
    return sorted(set(range(len(targets))) - set(held_out)), held_out


def _call(function: Callable[..., Any], config: DataConfig) -> Any:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters):
        return function(config)
    given = [key for key in ("resize", "crop", "mean", "std") if getattr(config, key) is not None]
    if given:
        raise ConfigError(f"data.{given[0]}: {config.dataset} takes no argument, so it cannot follow; legal: null")
    return function()
