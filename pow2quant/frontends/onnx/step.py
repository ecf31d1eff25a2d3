"""One operation of an ONNX file as a module: it runs on tensors, or on known values where its operands are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor, nn

from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.onnx.evaluate import EVALUATED, evaluate
from pow2quant.frontends.onnx.file import attribute, title

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST = 1 << 30
"""Elements that a computed tensor may have."""

Row = Callable[..., Any]
"""(step, operands: tensors, or arrays where values are known, or None) -> the result, or a tuple of them."""


class Step(nn.Module):
    """A node of the file.

    known: operands whose values the file holds, by position; the rest is given to `forward` in order.
    fixed: for a Reshape or Flatten in a file with a fixed batch size: (operand's shape, result's shape) at that size.
    """

    one_operation = True

    def __init__(self, file: str, node: NodeProto, opset: int, row: Row | None, known: dict[int, Any]) -> None:
        super().__init__()
        self.file, self.node, self.opset, self.row, self.known = file, node, opset, row, known
        self.batch: int | None = None
        self.fixed: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def forward(self, *given: Any) -> Any:
        """The result, or a tuple of the results. Raises UnsupportedModelError that names file, node and operation."""
        rest = iter(given)
        operands = [self.known[i] if i in self.known else next(rest) for i in range(len(self.node.input))]
        try:
            if all(not isinstance(x, Tensor) for x in operands) and self.node.op_type in EVALUATED:
                results = evaluate(self.node, operands, self.opset)
                return results[0] if len(results) == 1 else tuple(results)
            if self.row is None:
                raise self.error("works on shapes only here")
            return self.row(self, *operands)
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever a malformed node makes numpy, onnx or torch raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise self.error(f"cannot be computed: {reason}") from error

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute of the node, or the default."""
        return attribute(self.node, name, default)

    def integers(self, name: str, operand: Any = None) -> list[int] | None:
        """What older opsets write as an attribute and newer ones as an operand."""
        value = self.attribute(name)
        if value is None:
            value = operand
        if value is None:
            return None
        if isinstance(value, Tensor):
            raise self.error(f"{name} is computed from data")
        return [int(v) for v in np.asarray(value).reshape(-1)]

    def error(self, why: str) -> UnsupportedModelError:
        """One line that names file, node and operation."""
        return UnsupportedModelError(f"{self.file}: {title(self.node)}: {why}")

    def bounded(self, shape: Any) -> list[int]:
        """The shape, unless a tensor of it would be too large to make."""
        sizes = [int(d) for d in shape]
        if math.prod(max(1, d) for d in sizes) > LARGEST:
            raise self.error(f"makes a tensor of shape {tuple(sizes)}, more than {LARGEST:,} elements")
        return sizes


def tensor(value: Any) -> Tensor:
    """A known value as a tensor; a tensor as it is."""
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def number(value: Any) -> Any:
    """A known single value as a number of Python; anything else as a tensor."""
    if isinstance(value, np.ndarray) and value.size == 1 and value.ndim <= 1:
        return value.reshape(()).item()
    return tensor(value)


def scalar(value: NDArray[Any] | None, default: float) -> float:
    """A known single value, or the default."""
    return default if value is None else float(np.asarray(value).reshape(()))
