"""Every module that a prepared network may hold: how it is quantized, and how it is written as ONNX.

A new operation is one row in a file of `rows/` and, where PyTorch has no module for it, one class in `modules/`.
"""

from __future__ import annotations

import math

from torch import fx, nn

from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.modules import CONVOLUTIONS, TRANSPOSED
from pow2quant.frontends.rows import (
    arithmetic,
    composed,
    constants,
    counting,
    functions,
    normalization,
    pooling,
    shape,
    weighted,
)
from pow2quant.frontends.writing import Operator, Rows, many
from pow2quant.operators import Kind

OPERATORS: Rows = {
    **weighted.ROWS,
    **functions.ROWS,
    **composed.ROWS,
    **normalization.ROWS,
    **pooling.ROWS,
    **arithmetic.ROWS,
    **shape.ROWS,
    **constants.ROWS,
    **counting.ROWS,
}


def called(network: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node of a prepared network calls, or None."""
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def operator(module: nn.Module | None) -> Operator | None:
    """The row of a module's exact type; None where there is none."""
    return None if module is None else OPERATORS.get(type(module))


def kind_of(module: nn.Module | None) -> Kind:
    """How a module treats encodings; a network's input is like something computed."""
    row = operator(module)
    return row.kind if row is not None else Kind.COMPUTE


def weight_axis(module: nn.Module) -> int | None:
    """The output-channel axis of a weighted module's weight; None where one scale per channel is not expressible."""
    if isinstance(module, TRANSPOSED):
        return 1 if module.groups == 1 else None
    return 0


def _constraints(module: nn.Module) -> str | None:
    """Why this configuration of a known module cannot be quantized, or None."""
    if isinstance(module, CONVOLUTIONS) and module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}, only with 'zeros'"
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)) and module.return_indices:
        return "return_indices=True"
    if (
        isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))
        and module.ceil_mode
        and module.count_include_pad
        and any(many(module.padding, 1))
    ):
        return "ceil_mode=True and count_include_pad=True (executors disagree about the last window's divisor)"
    if isinstance(module, (nn.AvgPool2d, nn.AvgPool3d)) and module.divisor_override is not None:
        return "divisor_override is set"
    if isinstance(module, nn.Softmax) and module.dim is None:
        return "dim=None"
    if isinstance(module, nn.Hardtanh) and not (
        math.isfinite(module.min_val) and math.isfinite(module.max_val) and module.min_val <= 0 <= module.max_val
    ):
        return f"clips to [{module.min_val}, {module.max_val}], which does not hold zero"
    return None


def check(module: nn.Module, where: str) -> None:
    """Raises UnsupportedModelError, naming `where`, unless the module can be quantized."""
    if operator(module) is None:
        known = ", ".join(sorted({t.__name__ for t in OPERATORS}))
        raise UnsupportedModelError(f"{where}: {type(module).__name__} is not supported; supported are {known}")
    reason = _constraints(module)
    if reason:
        raise UnsupportedModelError(f"{where}: {type(module).__name__} is not supported with {reason}")
