"""Files of arrays: `.npz` and `.npy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from pow2quant.errors import DataError
from pow2quant.reading import last_line


def arrays(path: Path) -> Any:
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
