"""The integer pack: a program as files for people who build hardware.

`program.json` says what is computed, every array of integers lies beside it as `.npy`, as `.mem` (hexadecimal words
for Verilog's `$readmemh`) and as `.bin` (without gaps: ternary weights take two bits), and so do the inputs and the
results of every step for a few samples. Nothing else is needed
to compute the network: the test reads these files alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.integer.certificate import certify
from pow2quant.integer.lower import lower
from pow2quant.integer.pack_readme import readme
from pow2quant.integer.program import Requantization
from pow2quant.integer.run import trace
from pow2quant.integer.ternary import Ternary
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN
from pow2quant.saving import staged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact
    from pow2quant.integer.program import Codes, Program, Step, Tensor

PROGRAM, CERTIFICATE = "program.json", "certificate.json"
SAMPLES = 4
"""For so many samples the pack holds every tensor."""


def export_integers(artifact: Artifact, folder: str | Path, *, samples: int = SAMPLES, seed: int = 0) -> Path:
    """Integers as `.npy` and `.mem`, with golden tensors, in `folder`, which an older pack may take up. Returns it.

    Raises what `lower` raises; OutputError where the folder holds something else, or cannot be written.
    """
    program, folder = lower(artifact), Path(folder)
    golden = trace(program, sample_codes(program, samples, seed))
    with staged(folder, PROGRAM) as staging:
        pack = _Pack(staging, artifact, samples)
        document = {
            "format": "pow2quant integers 2",
            "inputs": list(program.inputs),
            "outputs": list(program.outputs),
            "samples": samples,
            "pixels": program.pixels,
            "tensors": {name: pack.tensor(tensor, golden.get(name)) for name, tensor in program.tensors.items()},
            "steps": [pack.step(program, step) for step in program.steps],
        }
        _write_json(staging / PROGRAM, document)
        certificate = certify(artifact)
        _write_json(staging / CERTIFICATE, certificate.to_json(per_channel=True))
        (staging / "README.md").write_text(readme(document, certificate.sentence), encoding="utf-8")
    return folder


def sample_codes(program: Program, count: int, seed: int = 0) -> list[Codes]:
    """Random codes (count, *shape) of every input.

    The first sample takes up the whole grid, every further one half as much around zero, so that deeper layers are not
    all saturated.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for tensor in (program.tensors[name] for name in program.inputs):
        values = rng.uniform(tensor.low - tensor.zero - 0.5, tensor.high - tensor.zero + 0.5, (count, *tensor.shape))
        amplitude = np.ldexp(1.0, -np.arange(count) % 8).reshape(-1, *[1] * len(tensor.shape))
        codes = np.clip(np.rint(values * amplitude) + tensor.zero, tensor.low, tensor.high)
        samples.append(codes.astype(tensor.dtype))
    return samples


@dataclass(frozen=True)
class Word:
    """How one integer is written: two's complement where it is signed."""

    bits: int
    signed: bool

    @classmethod
    def of(cls, values: NDArray[Any], bits: int = 1, signed: bool = False) -> Word:
        """Of at least `bits`, wide enough for every value; signed where it has to be or is asked for."""
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        signed = signed or low < 0
        needed = max(high.bit_length(), (~low if low < 0 else 0).bit_length()) + signed
        return cls(max(bits, needed), signed)

    @property
    def digits(self) -> int:
        """Hexadecimal digits of a word."""
        return -(-self.bits // 4)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest type of numpy."""
        width = next(width for width in (8, 16, 32, 64) if width >= self.bits)
        return np.dtype(f"{'' if self.signed else 'u'}int{width}")


class _Pack:
    """The files of one pack; every name is given once."""

    def __init__(self, folder: Path, artifact: Artifact, samples: int) -> None:
        self.folder, self.samples = folder, samples
        self.taken: set[str] = set()
        self.weight_bits = {
            node.name or node.output[0]: artifact.encodings[name].grid.width
            for node in artifact.model.graph.node
            for name in node.input[1:2]
            if name in artifact.encodings
        }

    def tensor(self, tensor: Tensor, golden: Codes | None) -> dict[str, Any]:
        """A tensor's entry: its encoding, and its codes where they are constant or known for the samples."""
        grid = tensor.encoding.grid
        word = Word(grid.width, grid.signed)
        entry = {
            "shape": list(tensor.shape),
            "bits": word.bits,
            "signed": word.signed,
            "low": tensor.low,
            "high": tensor.high,
            "exponent": tensor.exponent,
            "zero_point": tensor.zero,
        }
        if tensor.constant is not None:
            entry["constant"] = self._array(f"constants/{_plain(tensor.name)}", tensor.constant, word, tensor.name)
        elif golden is not None:
            title = f"{tensor.name}, {self.samples} samples"
            entry["golden"] = self._array(f"golden/{_plain(tensor.name)}", golden, word, title)
        return entry

    def step(self, program: Program, step: Step) -> dict[str, Any]:
        """A step's entry: the fields of its class, arrays as files, and how large its integers get."""
        entry: dict[str, Any] = {"node": step.node, "kind": type(step).__name__.lower()}
        for field in fields(step):
            value = getattr(step, field.name)
            if field.name == "weight" and (ternary := Ternary.of(value)) is not None:
                value = self._ternary(ternary, step.node)
            elif isinstance(value, np.ndarray):
                word = self._word(program, step, field.name, value)
                value = self._array(f"parameters/{_plain(step.node)}.{field.name}", value, word, step.node)
            elif isinstance(value, Requantization) and value.shift.ndim:
                word, path = Word.of(value.shift, 8, signed=True), f"parameters/{_plain(step.node)}.shift"
                value = _plain_types(value) | {"shift_file": self._array(path, value.shift, word, step.node)}
            entry[field.name] = _plain_types(value)
        bound = step.bound(program)
        return entry | {"accumulator": {"bound": bound, "bits": bound.bit_length() + 1}}

    def _ternary(self, weight: Ternary, node: str) -> dict[str, Any]:
        """The codes in two bits; and, where they are not the integers themselves, both shifts of every channel."""
        name = f"parameters/{_plain(node)}.weight"
        entry = self._array(name, weight.codes, Word(2, signed=True), node)
        if weight.is_shifted:
            shifts = np.stack([weight.negative, weight.positive], 1)
            file = self._array(f"{name}_shifts", shifts, Word.of(shifts, 2), node)
            entry |= {"shifts": shifts.tolist(), "shifts_file": file}
        return entry

    def _word(self, program: Program, step: Step, field: str, values: NDArray[Any]) -> Word:
        if field == "weight":
            return Word.of(values, self.weight_bits.get(step.node, 1), signed=True)
        if field == "bias":
            return Word.of(values, 32, signed=True)
        if field == "table":
            grid = program.tensors[step.output].encoding.grid
            if grid.qmin <= values.min() and values.max() <= grid.qmax:  # else they are exponentials, and no codes
                return Word(grid.width, grid.signed)
        return Word.of(values)

    def _array(self, name: str, values: NDArray[Any], word: Word, title: str) -> dict[str, Any]:
        """Writes `name`.npy, `name`.mem and `name`.bin, and returns what program.json says about them."""
        unique, count = name, 1
        while unique.lower() in self.taken:
            count += 1
            unique = f"{name}-{count}"
        self.taken.add(unique.lower())
        path = self.folder / unique
        path.parent.mkdir(exist_ok=True)
        np.save(path.with_name(f"{path.name}.npy"), values.astype(word.dtype))
        with path.with_name(f"{path.name}.mem").open("w", encoding="ascii", newline="\n") as file:
            shape = " x ".join(map(str, values.shape)) or "1"
            kind = "two's complement" if word.signed else "unsigned"
            file.write(f"// {_ascii(title)}: {shape} words of {word.bits} bits, {kind}, the last index runs fastest\n")
            file.writelines(_words(values, word))
        path.with_name(f"{path.name}.bin").write_bytes(_stream(values, word))
        files = {kind: f"{unique}.{kind}" for kind in ("npy", "mem", "bin")}
        return files | {"shape": list(values.shape), "bits": word.bits, "signed": word.signed}


def _words(values: NDArray[Any], word: Word) -> Iterator[str]:
    """One line of hexadecimal digits for every value."""
    codes = values.ravel().astype(np.int64) & ((1 << word.bits) - 1)
    return map(f"%0{word.digits}x\n".__mod__, codes.tolist())


def _stream(values: NDArray[Any], word: Word) -> bytes:
    """All words without gaps, the lowest bit of each first, in the lowest free bit of the byte."""
    bits = values.ravel().astype(np.int64)[:, None] >> np.arange(word.bits) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def _plain(name: str) -> str:
    """A file name that every system and tool accepts."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).strip(".")[:150] or "_"


def _ascii(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text)


def _plain_types(value: Any) -> Any:
    """A field in JSON's types."""
    if is_dataclass(value):
        entry = {field.name: _plain_types(getattr(value, field.name)) for field in fields(value)}
        if entry.get("rounding") == HALF_EVEN:  # what is not said is half to even
            del entry["rounding"]
        return entry
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain_types(item) for item in value]
    return value


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
