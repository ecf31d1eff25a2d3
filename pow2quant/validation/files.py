"""Quantized models, read once for all executors of one validation."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from pow2quant.adapters import onnx_qdq
from pow2quant.errors import UnsupportedModelError
from pow2quant.integer.lower import lower
from pow2quant.integer.stream import one_step

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    from pow2quant.artifact import Artifact
    from pow2quant.integer.program import Program


class QdqFile:
    """A QDQ model; each view of it is made when it is first asked for. They are shared: no caller changes them.

    read: what gives the model. path: where it lies, if it lies on disk.
    """

    def __init__(self, read: Callable[[], onnx.ModelProto], path: Path | None = None) -> None:
        self.read, self.path = read, path

    @cached_property
    def model(self) -> onnx.ModelProto:
        """As it was written. Raises FileFormatError where it is no ONNX file."""
        return self.read()

    def same_as(self, other: QdqFile) -> bool:
        """Whether both have the same bytes."""
        mine, yours = (file.model.SerializeToString(deterministic=True) for file in (self, other))
        return bool(mine == yours)

    @cached_property
    def network(self) -> Artifact:
        """The float network and the encodings. Raises as `onnx_qdq.from_qdq` does."""
        return onnx_qdq.from_qdq(self.model)

    @cached_property
    def program(self) -> Program:
        """The network in integers. Raises as `integer.lower.lower` does."""
        return lower(self.network)

    @cached_property
    def step(self) -> Program | None:
        """One step of a recurrent network; None where it cannot go step by step."""
        try:
            return one_step(self.network)
        except UnsupportedModelError:
            return None


_OPEN: WeakValueDictionary[tuple[object, ...], QdqFile] = WeakValueDictionary()


def opened(path: Path) -> QdqFile:
    """A file as those have read it that still use it; anew where it has changed on disk."""
    file = QdqFile(partial(onnx_qdq.load, path), path)
    try:
        now = path.stat()
    except OSError:  # reading it says why
        return file
    return _OPEN.setdefault((str(path.resolve()), now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns), file)
