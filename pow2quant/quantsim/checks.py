"""What AIMET refuses, and would go wrong without a word here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.errors import AlreadyQuantizedError

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
