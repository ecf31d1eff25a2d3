"""Data by name: batches for calibration, training and test, checked on the way out.

What `dataset` may be: `digits`, `cifar10`, `mnist`, `imagefolder`, a plug-in's name, `path/to/file.py:function`, or a
file of arrays (`.npz`, `.npy`). Each function, of the `DataConfig` if it takes an argument, returns a finished `Data`,
or data in a form that `sources` knows: (train, test) or (calibration, train, test) as torch data sets, a DataLoader, …
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from pow2quant.config import DataConfig, from_file, is_in_file, users_code
from pow2quant.datasets.arrays import arrays
from pow2quant.datasets.image_files import ImageFiles, sizes
from pow2quant.datasets.images import Images
from pow2quant.datasets.resizing import described, enlarging
from pow2quant.datasets.settings import resolved as resolved
from pow2quant.datasets.settings import white_of as white_of
from pow2quant.datasets.sources import SHUFFLE_SEED as SHUFFLE_SEED
from pow2quant.datasets.sources import Data as Data
from pow2quant.datasets.sources import data_of
from pow2quant.errors import ConfigError, DataError
from pow2quant.plugins import names, resolve


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
        if unused := [key for key in ("path", "resize", "crop") if getattr(config, key) is not None]:
            raise ConfigError(f"data.{unused[0]}: {name} holds arrays, which are used as they are; legal: null")
        made = arrays(Path(name))
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


def _call(function: Callable[..., Any], config: DataConfig) -> Any:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters):
        return function(config)
    given = [key for key in ("path", "resize", "crop", "mean", "std") if getattr(config, key) is not None]
    if given:
        raise ConfigError(f"data.{given[0]}: {config.dataset} takes no argument, so it cannot follow; legal: null")
    return function()


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
