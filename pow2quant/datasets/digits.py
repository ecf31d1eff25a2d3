"""scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

import numpy as np
import torch

from pow2quant.config import DataConfig
from pow2quant.datasets.images import Images
from pow2quant.datasets.settings import WHITE


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
