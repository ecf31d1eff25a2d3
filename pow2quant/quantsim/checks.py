"""What is checked of a network: that it is float before, and what its accumulators need after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pow2quant.backends.custom import QuantizedLayer
from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.errors import AlreadyQuantizedError, ConfigError

if TYPE_CHECKING:
    from torch import nn

AIMETS = ("BaseQuantizationMixin", "QuantizerBase")
"""Base classes of AIMET's quantized modules and quantizers."""


def refuse_quantized(model: nn.Module) -> None:
    """Raises AlreadyQuantizedError for a network that holds quantizers, of AIMET or of ours."""
    for name, module in model.named_modules():
        theirs = any(c.__name__ in AIMETS and c.__module__.startswith("aimet_torch") for c in type(module).__mro__)
        if theirs or isinstance(module, FakeQuantize):
            where = name or type(module).__name__
            raise AlreadyQuantizedError(f"{where}: the network is quantized already; give the float network")


def check_accumulator_overflow(model: nn.Module, quant_bw: int = 8, accum_bw: int = 32) -> tuple[str, float]:
    """The layer whose sums come closest to the ends of an accumulator, and the share of its range that they may use.

    AIMET's function of this name, for `sim.model` of `custom`: sum(|w_q|) * max|x_q - z| + |b_q| over the integers that
    are simulated, so that `quant_bw` says nothing new; above 1, an accumulator of `accum_bw` bits may overflow.
    Raises ConfigError for a model without such layers, or without encodings.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    sums = {name: layer.largest_sum() for name, layer in layers.items()}
    known = {name: largest / 2.0 ** (accum_bw - 1) for name, largest in sums.items() if largest is not None}
    if not known:
        raise ConfigError('check_accumulator_overflow: give the calibrated sim.model of backend="custom"')
    return max(known.items(), key=lambda item: item[1])
