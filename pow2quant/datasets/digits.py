"""scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pow2quant.config import DataConfig
from pow2quant.datasets.images import Images
from pow2quant.datasets.settings import WHITE


def digits(config: DataConfig) -> tuple[Images, Images]:
    """scikit-learn's 1,797 handwritten digits (1, 8, 8), of which a fixed stratified quarter is for test.

    They lie in the package, split by `train_test_split(test_size=0.25, stratify=labels, random_state=0)`: to import
    scikit-learn takes a second.
    """
    names = tuple(map(str, range(10)))
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        train, test = (
            Images(
                torch.from_numpy(stored[f"pixels_{part}"])[:, None],
                torch.from_numpy(stored[f"labels_{part}"]).long(),
                names,
                config,
                white=WHITE["digits"],
            )
            for part in ("train", "test")
        )
    return train, test
