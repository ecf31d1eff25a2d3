"""MNIST from its four files."""

from __future__ import annotations

from pow2quant.config import DataConfig
from pow2quant.datasets.images import Images
from pow2quant.datasets.settings import path_of
from pow2quant.errors import DataError
from pow2quant.reading import last_line


def mnist(config: DataConfig) -> tuple[Images, Images]:
    """MNIST (1, 28, 28) from `path/MNIST/raw/*-ubyte`; nothing is downloaded."""
    from torchvision.datasets import MNIST

    path = path_of(config, "MNIST/raw/train-images-idx3-ubyte and the other three files")
    try:
        parts = [MNIST(str(path), train=train, download=False) for train in (True, False)]
    except Exception as error:  # torchvision asserts and raises whatever it likes about a damaged file
        layout = "expected MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte, complete"
        raise DataError(f"{path}: {layout} ({last_line(error)})") from None
    train, test = (Images(p.data[:, None], p.targets.long(), tuple(map(str, range(10))), config) for p in parts)
    return train, test
