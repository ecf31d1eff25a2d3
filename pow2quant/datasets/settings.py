"""What a configuration says of a data set, and what the name of the set implies where it says nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pow2quant.config import DataConfig
from pow2quant.errors import ConfigError, DataError

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"mean": (0.0,), "std": (1.0,)},
    "mnist": {"mean": (0.1307,), "std": (0.3081,)},
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    "imagefolder": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "resize": 256, "crop": 224},
}
"""What a data set's name implies where the configuration says nothing."""

LARGEST_SIDE = 16_384
"""Pixels of a side of an image; three channels of float32 then take 3 GB."""

WHITE = {"digits": 16}
"""The pixel that becomes 1.0, where that is not 255."""


def white_of(config: DataConfig) -> int:
    """The pixel that becomes 1.0 before normalization."""
    return WHITE.get(config.dataset, 255)


def resolved(config: DataConfig) -> DataConfig:
    """The configuration with what its data set implies filled in, so that it says how to repeat the run.

    Raises ConfigError when the crop is larger than the resized image, for images that no memory holds, and for a path
    that nothing reads.
    """
    given = {key: value for key in ("mean", "std", "resize", "crop") if (value := getattr(config, key)) is not None}
    if config.dataset == "imagefolder" and ("resize" in given or "crop" in given):  # one side implies the other
        given = {"resize": given.get("crop"), "crop": given.get("resize"), **given}
    config = replace(config, **{**DEFAULTS.get(config.dataset, {}), **given})
    if config.dataset == "digits" and config.path is not None:
        raise ConfigError(
            f"data.path: {config.path} is not read, as the data are the embedded digits; for a folder of images give "
            "data.dataset: imagefolder (--data imagefolder)"
        )
    for key in ("resize", "crop"):
        if (size := getattr(config, key)) is not None and size > LARGEST_SIDE:
            raise ConfigError(f"data.{key}: {size:,} is not legal; legal: up to {LARGEST_SIDE:,} pixels")
    if config.resize and config.crop and config.crop > config.resize:
        raise ConfigError(f"data.crop: {config.crop} is larger than data.resize, {config.resize}")
    return config


def normalization(config: DataConfig, channels: int) -> tuple[Tensor, Tensor]:
    """mean and std as (channels or 1, 1, 1). Raises ConfigError when their number is wrong or a std is not positive."""
    tensors = []
    for key, values in (("mean", config.mean or (0.0,)), ("std", config.std or (1.0,))):
        if len(values) not in (1, channels):
            raise ConfigError(f"data.{key}: {len(values)} values for images of {channels} channels")
        if key == "std" and not min(values) > 0:
            raise ConfigError(f"data.std: {list(values)} is not legal; legal: a list of finite numbers above 0")
        tensors.append(torch.tensor(values, dtype=torch.float32)[:, None, None])
    return tensors[0], tensors[1]


def path_of(config: DataConfig, layout: str) -> Path:
    """The folder or file of the data. Raises DataError, with the layout it should have, if there is none."""
    if config.path is None:
        raise DataError(f"data.path: {config.dataset} needs a folder with {layout}")
    path = Path(config.path)
    if not path.exists():
        raise DataError(f"{path}: no such folder; expected one with {layout}")
    return path
