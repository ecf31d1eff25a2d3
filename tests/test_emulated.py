"""The generated C on 32-bit ARM and 64-bit RISC-V, emulated by QEMU: every code of every step is the engine's."""

from __future__ import annotations

import pytest

from pow2quant.integer import run as engine
from pow2quant.integer.lower import lower
from pow2quant.integer.pack import sample_codes
from pow2quant.validation.emulated import COMPILERS, Emulated, unavailable
from tests.quantized_graphs import ternary_network
from tests.test_emit_c import layers


@pytest.mark.parametrize("machine", COMPILERS)
@pytest.mark.parametrize(
    "artifact",
    [ternary_network(shifted=False), layers(8, signed=False), layers(16, signed=True)],
    ids=["ternary", "8 bits", "16 bits"],
)
def test_another_machine_gives_every_code_of_the_engine(artifact, machine):
    if reason := unavailable(machine):
        pytest.skip(reason)
    program = lower(artifact)
    codes = sample_codes(program, 4)
    expected, got = engine.trace(program, codes), Emulated(program, machine).trace(codes)
    assert expected.keys() == got.keys()
    assert {name: int((got[name] != x).sum()) for name, x in expected.items()} == dict.fromkeys(expected, 0)
