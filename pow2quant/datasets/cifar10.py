"""CIFAR-10 from its pickles, which are opened as arrays alone, or from one file of arrays."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pow2quant.config import DataConfig
from pow2quant.datasets.images import Batch, Images
from pow2quant.datasets.settings import path_of
from pow2quant.errors import DataError
from pow2quant.reading import last_line

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(config: DataConfig) -> tuple[Images, Images, Images]:
    """CIFAR-10 (3, 32, 32) from `path/cifar-10-batches-py/` or `path/cifar10.npz`; training images are augmented.

    The npz holds train_x (N, 32, 32, 3) uint8, train_y (N,), test_x and test_y.
    """
    layout = "cifar-10-batches-py/ (data_batch_1 ... data_batch_5, test_batch) or cifar10.npz"
    path = path_of(config, layout)
    archive = path if path.suffix == ".npz" else path / "cifar10.npz"
    folder = path if (path / "test_batch").is_file() else path / "cifar-10-batches-py"
    if not archive.is_file() and not folder.is_dir():
        raise DataError(f"{path}: expected {layout}")
    (train_x, train_y), test = _cifar_archive(archive) if archive.is_file() else _cifar_batches(folder)
    train = Images(train_x, train_y, CIFAR10_CLASSES, config)
    return train, replace(train, augmented=True), Images(*test, CIFAR10_CLASSES, config)


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
