"""Files of arrays: `.npz` and `.npy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import TensorDataset

from pow2quant.errors import DataError
from pow2quant.reading import last_line, tensor_of


def arrays(path: Path) -> Any:
    """The arrays of a file: X of .npy; of .npz `train_x` and `test_x` (with `train_y`, `test_y`), or any columns.

    Either part of such a name may stand first, as in `x_train` and `X_train`. `X` and `y` alone are inputs and targets.
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
    arrays = {
        next((n for n in parts if {*n.split("_")} == {*name.lower().split("_")}), name): a for name, a in arrays.items()
    }
    if arrays.keys() == {"X", "y"}:
        return arrays["X"], arrays["y"]
    if not {"train_x", "test_x"} <= arrays.keys():
        return arrays
    tensors = {key: tensor_of(array, f"{path}: {key}") for key, array in arrays.items() if key in parts}
    train, test = ([tensors[key] for key in parts if key in tensors and key.startswith(p)] for p in ("train", "test"))
    try:
        return tuple(TensorDataset(*part) for part in (train, test))
    except AssertionError as error:  # more images than labels
        raise DataError(f"{path}: not one label for each image ({last_line(error)})") from None
