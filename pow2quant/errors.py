"""Everything that pow2quant raises on purpose.

Pow2QuantError                     one clear line; the command line prints it and exits with status 2
├── ConfigError                    a key or value of a configuration, a flag, a plug-in name
├── DataError                      an empty data set, NaN in calibration data, a wrong folder
├── ModelError                     a network that cannot be built
│   ├── AlreadyQuantizedError      a network that holds quantizers
│   ├── UnsupportedModelError      an operator or control flow that cannot be captured or quantized
│   └── WeightsError               a state dict that does not fit, NaN in a layer's weights
├── EncodingError                  an encoding that is impossible or belongs to another model
│   └── NotPowerOfTwoError         a scale that is not exactly 2^k
├── NotCalibratedError             a simulation that runs before it has encodings
├── TrainingError                  a training that has diverged
├── FileFormatError                a corrupt or foreign file
├── OutputError                    an existing run, a read-only folder, a full disk
└── MissingExtraError              an optional dependency that is not installed
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Pow2QuantError(Exception):
    """Base of every error that pow2quant raises on purpose; its text is one line for the user."""


class ConfigError(Pow2QuantError):
    """A configuration key, flag or plug-in name is unknown, or its value is not legal."""


class DataError(Pow2QuantError):
    """Data are missing, empty, or not finite."""


class ModelError(Pow2QuantError):
    """A network cannot be built or used."""


class UnsupportedModelError(ModelError):
    """A network holds an operator or control flow that cannot be quantized; the text names the node."""


class AlreadyQuantizedError(ModelError, RuntimeError):
    """A network that is to be quantized holds quantizers; AIMET raises RuntimeError."""


class WeightsError(ModelError):
    """Weights do not fit the network, or are not finite; the text names the keys or the layer."""


class EncodingError(Pow2QuantError, ValueError, RuntimeError):
    """An encoding is impossible, or does not belong to the model it is applied to; AIMET raises RuntimeError."""


class NotPowerOfTwoError(EncodingError):
    """A scale is not exactly a power of two."""


class NotCalibratedError(Pow2QuantError, RuntimeError):
    """A simulation is run before it has encodings: it would compute in float and look as if nothing were lost."""


class TrainingError(Pow2QuantError):
    """Training has diverged; the text says where, and which checkpoint is still good."""


class FileFormatError(Pow2QuantError):
    """A file is corrupt, or not of the format it should have."""


class OutputError(Pow2QuantError):
    """Output cannot be written: it exists already, the folder is read-only, the disk is full."""


class MissingExtraError(Pow2QuantError):
    """An optional dependency is not installed; the text says what to install."""


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Puts a file in front of the text of every error that is raised inside and does not name it."""
    try:
        yield
    except Pow2QuantError as error:
        if str(file) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error
