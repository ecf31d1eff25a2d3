"""The interface: what a backend hands over, and what an executor says about it. No torch here."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pow2quant.errors import ConfigError
from pow2quant.plugins import resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

    from pow2quant.pow2_constraints import Encoding

Table = dict[str, "Encoding"]
"""Encodings by name: by site name before the export, by ONNX tensor name after it."""


@dataclass(frozen=True)
class Site:
    """A tensor that is quantized.

    name: `<module>.weight`, `<module>.bias`, `<module>.output`, or for a network input the argument's name.
    role: "weight", "bias", "output" or "input".
    """

    name: str
    role: str

    @property
    def module(self) -> str:
        """The module whose tensor this is: `layer1.0.conv1` for `layer1.0.conv1.weight`."""
        return self.name if self.role == "input" else self.name.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Artifact:
    """A quantized network, ready for every exporter and executor.

    model: float ONNX without QuantizeLinear/DequantizeLinear; its weights and biases lie on their grids, its first
        dimension of inputs and outputs is the free batch size.
    encodings: by ONNX tensor name: initializers (weights, biases), graph inputs, and results of nodes. A tensor
        without an entry stays float.
    """

    model: onnx.ModelProto
    encodings: Table

    def per_channel(self) -> Artifact:
        """The same network without blocks: such weights in units of each channel's smallest scale, in more bits."""
        return Artifact(self.model, {name: encoding.per_channel for name, encoding in self.encodings.items()})

    def stored_in(self, kind: str) -> Artifact:
        """The same network, noting in which type of `STORAGES` files store weights of up to 4 bits.

        Raises ConfigError for another.
        """
        if kind not in STORAGES:
            raise ConfigError(f"storage: {kind!r} is not legal; legal: {' and '.join(STORAGES)}")
        if kind == stored_in(self.model):
            return self
        model = copy.deepcopy(self.model)
        entries = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != BYTES[0]]
        del model.metadata_props[:]
        for key, value in entries if kind == "int4" else (*entries, BYTES):
            model.metadata_props.add(key=key, value=value)
        return Artifact(model, self.encodings)

    def save(self, folder: str | os.PathLike[str], form: str = "qdq") -> Path:
        """Writes it in a format, such as `qdq` or `c`, into a folder; returns the file or folder that was written."""
        written: Path = resolve("exporters", form)(self, Path(folder))
        return written


STORAGES = ("int4", "int8")
"""In which type a file may have weights of up to 4 bits."""

BYTES = ("pow2quant.storage", "int8")
"""A file's metadata where weights of up to 4 bits are stored in 8."""


def stored_in(model: onnx.ModelProto) -> str:
    """The type that files have for weights of up to 4 bits."""
    return "int8" if any((entry.key, entry.value) == BYTES for entry in model.metadata_props) else "int4"


PIXELS = ("pow2quant.input", "pixels")
"""A file's metadata where its input is an image's bytes: code and value of the input are the pixel."""


def note_pixels(model: onnx.ModelProto) -> None:
    """Notes in a file's metadata that its input is an image's bytes."""
    model.metadata_props.add(key=PIXELS[0], value=PIXELS[1])


def takes_pixels(model: onnx.ModelProto) -> bool:
    """Whether a file's input is an image's bytes."""
    return any((entry.key, entry.value) == PIXELS for entry in model.metadata_props)


RECURRENT = "pow2quant.recurrent"
"""The key in a file's metadata under which its recurrent layers stand."""

SEQUENCE, EVERY = "sequence", "every"
"""The roles in a `Recurrent` of the part of a sequence that a step reads, and of all results in one tensor."""


@dataclass(frozen=True)
class Recurrent:
    """A recurrent layer that is written out over time.

    steps: so many. whole: why it cannot go step by step, or None. tensors: by role, then by the step's number; a role
    is what a tensor is in every step alike. States have a tensor -1 besides, their first value.
    """

    layer: str
    steps: int
    whole: str | None
    tensors: dict[str, dict[int, str]]

    @property
    def states(self) -> list[dict[int, str]]:
        """The tensors of its states."""
        return [names for names in self.tensors.values() if -1 in names]


def note_recurrent(model: onnx.ModelProto, layers: Sequence[Recurrent]) -> None:
    """Notes recurrent layers in a file's metadata, where there are any."""
    if layers:
        model.metadata_props.add(key=RECURRENT, value=json.dumps([asdict(layer) for layer in layers]))


def recurrent_of(model: onnx.ModelProto) -> list[Recurrent]:
    """The recurrent layers that a file's metadata name; none where these are not understood."""
    text = next((entry.value for entry in model.metadata_props if entry.key == RECURRENT), "[]")
    try:
        entries = [Recurrent(**entry) for entry in json.loads(text)]
        found = [
            replace(e, tensors={r: {int(t): n for t, n in x.items()} for r, x in e.tensors.items()}) for e in entries
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return found if all(map(_is_understood, found)) else []


def _is_understood(entry: Recurrent) -> bool:
    names = [name for times in entry.tensors.values() for name in times.values()]
    texts = [entry.layer, *names, *([] if entry.whole is None else [entry.whole])]
    return type(entry.steps) is int and entry.steps > 0 and all(isinstance(text, str) for text in texts)


@dataclass(frozen=True)
class Divergence:
    """The first tensor, in the order of computation, at which two executors differ."""

    tensor: str
    node: str
    elements: int
    differing: int
    max_lsb: float
    cause: str | None = None


@dataclass(frozen=True)
class Agreement:
    """What one executor's results are against another's, on the same inputs.

    executor, against: names such as "onnxruntime (all optimizations)" and "simulation".
    elements, differing: compared and differing output elements; max_lsb: the largest difference in units of the
        output's scale. top1_agreement: per cent of samples whose largest logit has the same index.
    claim: "proved", "observed on N inputs" or "differs".
    """

    executor: str
    against: str
    elements: int
    differing: int
    max_lsb: float
    top1_agreement: float
    first_diverging: Divergence | None
    claim: str
    notes: tuple[str, ...] = field(default=())

    @property
    def agrees(self) -> bool:
        """Whether not a single element differs."""
        return self.differing == 0

    def to_json(self) -> dict[str, Any]:
        """In JSON's types; a difference that is infinite (NaN was involved) becomes None."""
        document = asdict(self)
        for part in (document, document["first_diverging"] or {}):
            if not math.isfinite(part.get("max_lsb", 0.0)):
                part["max_lsb"] = None
        return document
