"""The generated C on another processor, emulated by QEMU: 32-bit ARM and 64-bit RISC-V."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.errors import MissingExtraError, UnsupportedModelError
from pow2quant.integer.emit_c import code
from pow2quant.saving import scratch
from pow2quant.validation.c99 import TRACED, of_code
from pow2quant.validation.files import opened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pow2quant.integer.program import Codes, Program, Tensor
    from pow2quant.validation.agreement import Executor

COMPILERS = {"arm": "arm-linux-gnueabihf-gcc", "riscv64": "riscv64-linux-gnu-gcc"}
"""By the name of the processor in QEMU."""

MAIN = """
#include <stdio.h>
{arrays}
static const size_t sizes[] = {{{sizes}}};
static void put(int32_t layer, const void *codes) {{ fwrite(codes, 1, sizes[layer], stdout); }}
int main(void)
{{
    model_watch(put);
    while ({reads})
        model_run({names});
    return 0;
}}
"""


def arm(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The QDQ file as C on 32-bit ARM; see `executors`."""
    return executors(model, "arm")


def riscv64(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The QDQ file as C on 64-bit RISC-V; see `executors`."""
    return executors(model, "riscv64")


def executors(model: Path, machine: str) -> list[Executor]:
    """The QDQ file lowered to integers, written as C and compiled for another processor.

    Raises MissingExtraError without compiler or emulator; UnsupportedModelError or NotPowerOfTwoError, naming the
    tensor or node, where the network has no integers.
    """
    if reason := unavailable(machine):
        raise MissingExtraError(reason)
    file = opened(model)
    made = of_code(file.program, f"generated C ({machine}, emulated)", Emulated(file.program, machine))
    return [replace(made, network=lambda: file.network)]


def unavailable(machine: str) -> str | None:
    """Why nothing can be emulated; None where it can."""
    absent = [name for name in (COMPILERS[machine], f"qemu-{machine}") if shutil.which(name) is None]
    return f"not on the PATH: {', '.join(absent)}" if absent else None


class Emulated:
    """A program's C, compiled for a processor when it first runs; it reads codes and writes those of every step."""

    def __init__(self, program: Program, machine: str) -> None:
        self.program, self.machine = program, machine

    def run(self, inputs: Sequence[Codes]) -> list[Codes]:
        """Codes (N, *shape) of the network's inputs -> codes of its outputs."""
        found = self.trace(inputs)
        return [found[name] for name in self.program.outputs]

    def trace(self, inputs: Sequence[Codes]) -> dict[str, Codes]:
        """The codes of the inputs and of every step's output, by name."""
        tensors = [self.program.tensors[name] for name in self.program.inputs]
        read = [np.ascontiguousarray(x, t.dtype) for x, t in zip(inputs, tensors, strict=True)]
        given = b"".join(x[i].tobytes() for i in range(len(read[0])) for x in read)
        with scratch() as folder:
            binary = folder / "main"
            binary.write_bytes(self._binary)
            binary.chmod(0o700)
            written = _output([f"qemu-{self.machine}", str(binary)], folder, given)
        steps = [self.program.tensors[step.output] for step in self.program.steps]
        columns = np.dtype([(f"{i}", t.dtype, t.shape) for i, t in enumerate(steps)])
        rows = np.frombuffer(written, columns)
        traced = {tensor.name: rows[f"{i}"] for i, tensor in enumerate(steps)}
        return dict(zip(self.program.inputs, inputs, strict=True)) | traced

    @cached_property
    def _binary(self) -> bytes:
        texts = code(self.program) | {"main.c": TRACED + _main(self.program)}
        with scratch() as folder:
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            _output([COMPILERS[self.machine], "-std=c99", "-O2", "-static", "-o", "main", "main.c"], folder)
            return (folder / "main").read_bytes()


def _main(program: Program) -> str:
    """A program in C that reads inputs and writes the codes of every step."""
    tensors = [program.tensors[name] for name in (*program.inputs, *program.outputs)]
    names = [f"codes{i}" for i in range(len(tensors))]
    arrays = [f"static {t.dtype}_t {n}[{t.size}];" for n, t in zip(names, tensors, strict=True)]
    return MAIN.format(
        arrays="\n".join(arrays),
        sizes=", ".join(str(_bytes(program.tensors[step.output])) for step in program.steps),
        reads=" && ".join(f"fread({name}, sizeof {name}, 1, stdin)" for name in names[: len(program.inputs)]),
        names=", ".join(names),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.size * tensor.dtype.itemsize


def _output(line: Sequence[str], folder: Path, given: bytes = b"") -> bytes:
    done = subprocess.run(line, cwd=folder, input=given, capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()[:300] or f"exit code {done.returncode}"
        raise UnsupportedModelError(f"{line[0]} fails: {reason}")
    return done.stdout
