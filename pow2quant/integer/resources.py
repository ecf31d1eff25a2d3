"""What a network needs as integers: memory of the generated C, multiply-accumulates, and the widest accumulator."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pow2quant.artifact import Artifact
from pow2quant.errors import NotPowerOfTwoError, UnsupportedModelError
from pow2quant.integer.certificate import Certificate
from pow2quant.integer.emit_c import memory
from pow2quant.integer.lower import lower


@dataclass(frozen=True)
class Resources:
    """For one sample: RAM (without the caller's inputs and outputs) and flash of the C code in bytes.

    macs: multiply-accumulates. accumulator_bits: of the largest sum that any layer can reach.
    """

    ram_bytes: int
    flash_bytes: int
    macs: int
    accumulator_bits: int | None

    def to_json(self) -> dict[str, int | None]:
        """As report.json has it."""
        return asdict(self)


def resources(artifact: Artifact, certificate: Certificate) -> Resources | None:
    """What a network needs as integers; None where it has none, as with a float tensor or free scales."""
    try:
        program = lower(artifact)
        ram, flash = memory(program)
    except (NotPowerOfTwoError, UnsupportedModelError):
        return None
    bits = [layer.bits for layer in certificate.layers if layer.bits is not None]
    return Resources(ram, flash, program.work, max(bits, default=None))
