"""What a command has computed so far, beside its output, so that the same command continues a killed one.

A simulation is kept behind each method and behind each part of a long one, with the state of the random generator; so
the result has the bits of a run that was not interrupted. What takes a few seconds is not kept but computed again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pow2quant.artifact import Table
from pow2quant.backends.base import Simulation
from pow2quant.errors import FileFormatError, OutputError, Pow2QuantError
from pow2quant.frontends.copies import array
from pow2quant.pow2_constraints import Encoding, IntGrid
from pow2quant.report.document import environment
from pow2quant.saving import write
from pow2quant.training import checkpoint

PAUSE = 5.0
"""Seconds of work that may be lost, at the least."""

SHARE = 20
"""Writing takes at most one part in so many of the time."""

KEPT, NUMBERS = ".safetensors", "numbers.json"

Parameters = Callable[[Simulation], Mapping[str, Tensor]]
"""The network's own parameters and buffers in a simulation."""


@dataclass(frozen=True)
class Unfinished:
    """The folder of what a command has computed so far; None: nothing is kept."""

    folder: Path | None = None

    def simulation(self, name: str, fingerprint: Callable[[], str], parameters: Parameters) -> Kept:
        """A simulation on its way. fingerprint: what it depends on; called only where something is read or written."""
        return Kept(self._path(f"{name}{KEPT}"), fingerprint, parameters)

    def numbers(self, fingerprint: Callable[[], str]) -> Numbers:
        """Numbers that were measured."""
        return Numbers(self._path(NUMBERS), fingerprint)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name


NOTHING = Unfinished()
"""Nothing is kept."""


def folder_of(output: Path, suffix: str = ".unfinished") -> Path:
    """Where what was computed for an output is kept, beside it. Raises OutputError where nothing can be beside it."""
    try:
        target = output.resolve()
        return target.with_name(f"{target.name}{suffix}")
    except (ValueError, RuntimeError):  # the root; links that go round, before Python 3.13
        raise OutputError(f"{output}: cannot be written: it cannot be a folder") from None


@contextmanager
def beside(output: Path) -> Iterator[Unfinished]:
    """The folder beside an output, which goes when the command ends: well, or with an error that would come again."""
    folder = folder_of(output)
    try:
        yield Unfinished(folder)
    except OutputError:  # a full disk, for instance
        raise
    except Pow2QuantError:
        remove(folder)
        raise
    remove(folder)


def remove(folder: Path) -> None:
    """Removes such a folder, but for what else lies in it: a user may have a folder of this name."""
    with suppress(OSError):
        if not folder.is_symlink():
            for file in (*folder.glob(f"*{KEPT}"), *folder.glob(".*.partial"), folder / NUMBERS):
                file.unlink(missing_ok=True)
            folder.rmdir()


class _Pace:
    """When it is time to write."""

    def __init__(self) -> None:
        self.due = time.monotonic() + PAUSE

    def write(self, act: Callable[[], None]) -> None:
        """Writes if it is time."""
        started = time.monotonic()
        if started < self.due:
            return
        act()
        now = time.monotonic()
        self.due = now + max(PAUSE, SHARE * (now - started))


@dataclass
class Kept:
    """How far a simulation is: behind so many methods, and so many parts of the next one. See `backends.base.Marks`."""

    path: Path | None
    fingerprint: Callable[[], str]
    parameters: Parameters
    methods: int = 0
    parts: int = 0
    pace: _Pace = field(default_factory=_Pace)

    def restore(self, sim: Simulation) -> bool:
        """Takes a simulation to where it was; False where nothing is known of it."""
        state: dict[str, Any] = {}
        if self.path is not None and self.path.is_file():
            with suppress(FileFormatError):
                state = checkpoint.load(self.path)
        if not state or state["fingerprint"] != self.fingerprint():
            return False
        self.methods, self.parts = state["place"]
        with torch.no_grad():
            for name, parameter in self.parameters(sim).items():
                parameter.copy_(state["parameters"][name])
        sim.load(_table(state["encodings"]))
        torch.set_rng_state(state["generator"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])
        return True

    def mark(self, sim: Simulation, parts: int) -> None:
        """So many parts of the method under way are done."""
        self.parts = parts
        self.pace.write(lambda: self._write(sim))

    def next_method(self, sim: Simulation) -> None:
        """The method under way is done."""
        self.methods += 1
        self.mark(sim, 0)

    def _write(self, sim: Simulation) -> None:
        if self.path is None:
            return
        state = {
            "fingerprint": self.fingerprint(),
            "place": [self.methods, self.parts],
            "parameters": dict(self.parameters(sim)),
            "encodings": _plain(sim.encodings()),
            "generator": torch.get_rng_state(),
        }
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        checkpoint.dump(self.path, state)


@dataclass
class Numbers:
    """Numbers by name, each measured once."""

    path: Path | None
    fingerprint: Callable[[], str]
    pace: _Pace = field(default_factory=_Pace)
    _known: dict[str, list[float]] | None = None

    def get(self, name: str, measure: Callable[[], float]) -> float:
        """The number, as it is known or is measured now."""
        return self.several(name, lambda: [measure()])[0]

    def several(self, name: str, measure: Callable[[], Iterable[float]]) -> list[float]:
        """The same for several numbers that are measured at once."""
        known = self._read() if self._known is None else self._known
        self._known = known
        if name not in known:
            known[name] = [float(value) for value in measure()]
            self.pace.write(self._write)
        return known[name]

    def _read(self) -> dict[str, list[float]]:
        if self.path is not None and self.path.is_file():
            with suppress(ValueError, KeyError, TypeError):
                document = json.loads(self.path.read_text())
                if document["fingerprint"] == self.fingerprint():
                    return dict(document["measured"])
        return {}

    def _write(self) -> None:
        if self.path is not None:
            document = {"fingerprint": self.fingerprint(), "measured": self._known}
            write(self.path, json.dumps(document).encode())


def fingerprint_of(texts: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """What a computation depends on: texts, tensors, versions and the kind of processor, threads included."""
    own = str(environment(torch.get_num_threads())), torch.backends.cpu.get_cpu_capability()
    return digest_of((*own, *texts), tensors)


def digest_of(texts: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """SHA-256 of texts and tensors."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(array(tensor.contiguous()).tobytes())
    return digest.hexdigest()


def _plain(table: Table) -> dict[str, list[Any]]:
    return {
        name: [
            torch.tensor(e.scale),
            torch.tensor(e.zero_point),
            [e.grid.bits, e.grid.signed, e.grid.narrow],
            [e.axis, e.block],
        ]
        for name, e in table.items()
    }


def _table(plain: Mapping[str, Any]) -> Table:
    return {
        name: Encoding(scale.numpy(), zero_point.numpy(), IntGrid(*grid), *place)
        for name, (scale, zero_point, grid, place) in plain.items()
    }
