"""Reading data sets in tests."""

from __future__ import annotations

import pytest
import torch

from pow2quant import datasets
from pow2quant.config import DataConfig
from pow2quant.errors import DataError


def all_of(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def read_all(config: DataConfig) -> None:
    data = datasets.load(config)
    for part in (data.calibration, data.train, data.test):
        all_of(part)


def complaint(config: DataConfig, error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as raised:
        read_all(config)
    assert "\n" not in str(raised.value)
    return str(raised.value)
