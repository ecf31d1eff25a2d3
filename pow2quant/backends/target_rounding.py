"""How a target's rounding enters the simulation: the quantizers that do not round half to even."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pow2quant.pow2_constraints.arithmetic import mean_round, round_real

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.pow2_constraints import Encoding


@dataclass
class TargetRounding:
    """The rule of one quantizer, a name of `arithmetic.ROUNDINGS`.

    unit: gives the exponents of what the accumulator counts in, () or (C,) along `axis` of the tensor. count: how many
    values are averaged; None where nothing is. Only a rule that looks at the accumulator needs them.
    """

    rule: str
    unit: Callable[[], NDArray[np.int64]] | None = None
    axis: int = 1
    count: int | None = None

    def __call__(self, quotient: Tensor, encoding: Encoding) -> Tensor:
        """x / scale, exact and of any shape, rounded."""
        values = quotient.detach().cpu().numpy()
        rounded = self._by_accumulator(values, encoding) if self.unit else round_real(values, self.rule)
        return torch.from_numpy(np.asarray(rounded, values.dtype)).to(quotient.device)

    def _by_accumulator(self, values: NDArray[Any], encoding: Encoding) -> NDArray[Any]:
        assert self.unit is not None
        shift = encoding.exponent - self.unit()
        if self.count is not None:
            total = np.rint(np.ldexp(values.astype(np.float64) * self.count, int(shift))).astype(np.int64)
            return mean_round(total, self.count, int(shift), self.rule)
        if shift.ndim:
            shape = [1] * values.ndim
            shape[self.axis] = -1
            shift = shift.reshape(shape)
        return round_real(values, self.rule, shift)
