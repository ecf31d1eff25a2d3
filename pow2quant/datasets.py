"""Data by name: batches for calibration, training and test, checked on the way out.

What `dataset` may be: `digits`, `cifar10`, `mnist`, `imagefolder`, a plug-in's name, or `path/to/file.py:function`.
Each is a function, of the `DataConfig` if it takes an argument, that returns a finished `Data`, or (train, test) or
(calibration, train, test) as torch data sets whose items are (float32 image (C, H, W), class index).
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from pow2quant.config import DataConfig, from_file, is_in_file, users_code
from pow2quant.errors import ConfigError, DataError
from pow2quant.plugins import names, resolve

Batch = tuple[Tensor, Tensor]
"""Images, float32 (N, C, H, W), and their classes, int64 (N,)."""

SHUFFLE_SEED = 20240917
"""Orders the calibration images, whatever the run's seed: the same images calibrate every run."""

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


class Batches(Protocol):
    """What can be iterated again and again, such as a DataLoader or a list of batches."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Data:
    """Everything a run reads.

    calibration: all training images without augmentation, in one fixed shuffled order; take as many batches as needed.
    train: shuffled by torch's global generator, augmented where the data set says so, without an incomplete last batch.
    test: in the data set's own order. input_shape: of one image, (C, H, W).
    """

    calibration: Batches
    train: Batches
    test: Batches
    num_classes: int
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]


def load(config: DataConfig, train_batch_size: int | None = None) -> Data:
    """The data that a configuration asks for; `train` in batches of `train_batch_size` where that is given.

    Raises DataError, naming the path and the layout it should have, or what is wrong with a batch; ConfigError for an
    unknown data set or a normalization that does not fit the images.
    """
    config, name = resolved(config), config.dataset
    if is_in_file(name):
        function = from_file(name, DataError)
        with users_code(name, DataError):
            made = _call(function, config)
    elif name in names("datasets"):
        made = _call(resolve("datasets", name), config)
    else:
        known = ", ".join([*sorted(names("datasets")), "path/to/file.py:function"])
        raise ConfigError(f"data.dataset: {name!r} is unknown; known: {known}")
    if isinstance(made, Data):
        return _checked(made, name)
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        got = f"{len(made)} things" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise DataError(f"{name}: expected Data, (train, test) or (calibration, train, test), got {got}")
    return _data(name, (made[0], *made[-2:]), config, train_batch_size or config.batch_size)


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
        _check_labels(self.labels, len(self.classes), where)
        _normalization(self.config, self.pixels.shape[1])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once, which DataLoader prefers where it exists."""
        pixels = self.pixels[indices]
        images = (_jittered(pixels) if self.augmented else pixels).float().div_(self.white)
        if self.config.resize or self.config.crop:
            images = _sized(images, self.config)
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
    train, test = (Images(pixels[part], labels[part], names, config, white=16) for part in parts)
    return train, test


def mnist(config: DataConfig) -> tuple[Images, Images]:
    """MNIST (1, 28, 28) from `path/MNIST/raw/*-ubyte`; nothing is downloaded."""
    from torchvision.datasets import MNIST

    path = _path(config, "MNIST/raw/train-images-idx3-ubyte and the other three files")
    try:
        parts = [MNIST(str(path), train=train, download=False) for train in (True, False)]
    except Exception as error:  # torchvision asserts and raises whatever it likes about a damaged file
        layout = "expected MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte, complete"
        raise DataError(f"{path}: {layout} ({_last_line(error)})") from None
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

    The shorter side becomes `resize`, the central square of side `crop` is used; training crops at random places.
    """
    from torchvision import transforms as t

    layout = "train/CLASS/*.jpg and test/ or val/ with the same classes, or CLASS/*.jpg without a split"
    path = _path(config, layout)
    mean, std = _normalization(config, 3)
    last = [t.ToTensor(), t.Normalize(mean.flatten().tolist(), std.flatten().tolist())]
    plain, varied = ([t.Resize(config.resize), crop(config.crop), *last] for crop in (t.CenterCrop, t.RandomCrop))

    def folder(root: Path, steps: list[Any]) -> Any:
        return _folder(root, t.Compose(steps), layout)

    tests = [path / name for name in ("test", "val") if any(p.is_dir() for p in path.glob(f"{name}/*"))]
    if (path / "train").is_dir() and tests:
        calibration, train = (folder(path / "train", steps) for steps in (plain, varied))
        test = folder(tests[0], plain)
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise DataError(f"{path}: train/ and {tests[0].name}/ have different classes: {', '.join(odd[:5])}")
        return calibration, train, test
    if (path / "train").is_dir() or tests:
        raise DataError(f"{path}: {'test/ or val/' if not tests else 'train/'} is missing; expected {layout}")
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


def _sized(images: Tensor, config: DataConfig) -> Tensor:
    from torchvision.transforms import functional

    if config.resize:
        images = functional.resize(images, [config.resize], antialias=True)
    return functional.center_crop(images, [config.crop]) if config.crop else images


def _jittered(pixels: Tensor, margin: int = 4) -> Tensor:
    """Each image (N, C, H, W) cropped at a random place of its zero-padded self, and flipped half of the time."""
    n, _, height, width = pixels.shape
    rows = torch.randint(2 * margin + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * margin + 1, (n, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    padded = F.pad(pixels, (margin,) * 4).permute(0, 2, 3, 1)
    cropped = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


def _cifar_archive(path: Path) -> tuple[Batch, Batch]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("train_x", "train_y", "test_x", "test_y")}
    except Exception as error:  # numpy and zipfile raise whatever they like about a damaged file
        raise DataError(f"{path}: expected train_x, train_y, test_x, test_y ({_last_line(error)})") from None
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
            raise DataError(f"{path}: not a CIFAR-10 batch ({_last_line(error)})") from None

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
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(root), transform=transform, loader=_image)
    except FileNotFoundError as error:
        raise DataError(f"{root}: {_last_line(error).split('. ')[0]}; expected {layout}") from None


def _image(path: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({_last_line(error)})") from None


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
    return function(config) if any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters) else function()


def _data(name: str, parts: tuple[Any, Any, Any], config: DataConfig, train_batch_size: int) -> Data:
    for part, dataset in zip(("calibration", "training", "test"), parts, strict=True):
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise DataError(f"{name}: the {part} set is a {type(dataset).__name__}, not a torch Dataset with a length")
        if not len(dataset):
            raise DataError(f"{name}: the {part} set is empty")
    calibration, train, test = parts
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(SHUFFLE_SEED)).tolist()
    options: dict[str, Any] = {"num_workers": 0 if isinstance(train, Images) else config.workers}
    options["collate_fn"] = _collated
    own = torch.Generator()  # without one, reading test data would take numbers from the generator that orders training
    last = len(train) > train_batch_size
    classes = _classes(train, test, name)
    data = Data(
        calibration=DataLoader(Subset(calibration, order), config.batch_size, generator=own, **options),
        train=DataLoader(train, train_batch_size, shuffle=True, drop_last=last, **options),
        test=DataLoader(test, config.batch_size, generator=own, **options),
        num_classes=len(classes),
        class_names=classes,
        input_shape=tuple(np.shape(_first(test, name))),
    )
    return _checked(data, name)


def _first(dataset: Any, name: str) -> Tensor:
    """The first image."""
    try:
        image, _ = dataset[0]
    except Exception as error:
        raise _data_error(error, name) from error
    if not isinstance(image, Tensor):
        raise DataError(f"{name}: its images are {type(image).__name__}, not tensors (torchvision: add ToTensor)")
    return image


def _collated(items: Any) -> Any:
    return items if isinstance(items, tuple) else default_collate(items)


def _classes(train: Any, test: Any, name: str) -> tuple[str, ...]:
    """The training set's class names, or "0", "1", ... up to the largest label of both sets."""
    while isinstance(train, Subset) and not hasattr(train, "classes"):
        train = train.dataset
    if hasattr(train, "classes"):
        return tuple(map(str, train.classes))
    labels = _labels(train)
    if labels is None:
        raise DataError(f"{name}: how many classes? Give the training set `classes`, a list of names, or return Data")
    if np.ndim(labels) != 1 or not len(labels):
        raise DataError(f"{name}: expected items (image, class index), got labels of shape {np.shape(labels)}")
    others = _labels(test)  # a few images for calibration need not have the last classes
    known = [labels] if others is None or np.ndim(others) != 1 else [labels, others]
    return tuple(map(str, range(max(int(max(each)) for each in known) + 1)))


def _labels(dataset: Any) -> Any:
    """All labels of a data set that has them at hand, otherwise None."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1]
    return [pair[1] for pair in dataset] if isinstance(dataset, list) else getattr(dataset, "targets", None)


def _checked(data: Data, name: str) -> Data:
    parts: dict[str, Any] = {}
    for part in ("calibration", "train", "test"):
        batches = getattr(data, part)
        if not (isinstance(batches, Sized) and hasattr(batches, "__iter__")):
            raise DataError(f"{name}: {part} can be iterated once only; expected a DataLoader or a list of batches")
        if not len(batches):
            raise DataError(f"{name}: {part} is empty")
        parts[part] = _Checked(cast(Batches, batches), f"{name}: {part}", data.num_classes)
    return replace(data, **parts)


@dataclass(frozen=True)
class _Checked:
    """Batches that are as `Batch` says, or a DataError."""

    batches: Batches
    name: str
    num_classes: int

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        batches = enumerate(self.batches)
        while True:
            try:
                index, (images, labels) = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise _data_error(error, self.name) from error
            yield self._batch(images, labels, f"{self.name}, batch {index}")

    def _batch(self, images: Any, labels: Any, where: str) -> Batch:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise DataError(f"{where}: expected float32 images (N, C, H, W), got {kind}")
        if not torch.isfinite(images).all():
            raise DataError(f"{where}: holds NaN or infinity")
        labels = torch.as_tensor(labels)
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise DataError(f"{where}: expected {len(images)} class indices, got {tuple(labels.shape)} {labels.dtype}")
        _check_labels(labels, self.num_classes, where)
        return images.float(), labels.long()


def _check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise DataError(f"{where}: label {int(wrong[0])} is no class; legal: 0 to {num_classes - 1}")


def _data_error(error: Exception, name: str) -> DataError:
    """One line for whatever came out of a data set, perhaps through a DataLoader's worker process."""
    line = _last_line(error)
    if isinstance(error, DataError):
        return DataError(line.removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: "))
    return DataError(f"{name}: {type(error).__name__}: {line}")


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
