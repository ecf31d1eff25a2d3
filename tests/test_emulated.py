"""The generated C on 32-bit ARM and 64-bit RISC-V, emulated by QEMU: every code of every step is the engine's."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from pow2quant.integer import run as engine
from pow2quant.integer.emit_c import code
from pow2quant.integer.lower import lower
from pow2quant.integer.pack import sample_codes
from pow2quant.validation.c99 import TRACED
from tests.quantized_graphs import ternary_network
from tests.test_emit_c import layers

MACHINES = {"arm": "arm-linux-gnueabihf-gcc", "riscv64": "riscv64-linux-gnu-gcc"}

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


def emulated(program, codes, machine, folder):
    """What the C gives for codes (N, *shape) of every input: the bytes of every step, one after the other."""
    texts = code(program) | {"main.c": TRACED + main(program)}
    for name, text in texts.items():
        (folder / name).write_text(text)
    line = [MACHINES[machine], "-std=c99", "-O1", "-static", "-o", "main", "main.c"]
    subprocess.run(line, cwd=folder, check=True)
    given = b"".join(x[i].tobytes() for i in range(len(codes[0])) for x in codes)
    return subprocess.run(
        [f"qemu-{machine}", "./main"], cwd=folder, input=given, capture_output=True, check=True
    ).stdout


def main(program):
    """A program in C that reads inputs and writes the codes of every step."""
    tensors = [program.tensors[name] for name in (*program.inputs, *program.outputs)]
    names = [f"codes{i}" for i in range(len(tensors))]
    arrays = [f"static {t.dtype}_t {n}[{t.size}];" for n, t in zip(names, tensors, strict=True)]
    steps = [program.tensors[step.output] for step in program.steps]
    return MAIN.format(
        arrays="\n".join(arrays),
        sizes=", ".join(str(t.size * t.dtype.itemsize) for t in steps),
        reads=" && ".join(f"fread({n}, sizeof {n}, 1, stdin)" for n in names[: len(program.inputs)]),
        names=", ".join(names),
    )


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "artifact",
    [ternary_network(shifted=False), layers(8, signed=False), layers(16, signed=True)],
    ids=["ternary", "8 bits", "16 bits"],
)
def test_another_machine_gives_every_code_of_the_engine(artifact, machine, tmp_path):
    if not (shutil.which(MACHINES[machine]) and shutil.which(f"qemu-{machine}")):
        pytest.skip(f"needs {MACHINES[machine]} and qemu-{machine}")
    program = lower(artifact)
    codes = sample_codes(program, 4)
    expected = engine.trace(program, codes)
    rows = [
        expected[step.output][i].astype(program.tensors[step.output].dtype) for i in range(4) for step in program.steps
    ]
    got = np.frombuffer(emulated(program, codes, machine, tmp_path), np.uint8)
    wanted = np.frombuffer(b"".join(row.tobytes() for row in rows), np.uint8)
    assert len(got) == len(wanted)
    assert int((got != wanted).sum()) == 0
