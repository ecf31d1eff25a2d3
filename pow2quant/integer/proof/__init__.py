"""The certificate's rules: where each ONNX operation's accumulator and result lie, and what executors may change.

The arguments behind them stand at the head of `certificate.py`.
"""

from pow2quant.integer.proof.judging import judge
from pow2quant.integer.proof.products import WEIGHTED, bias_rows, partial_sums, rows_of
from pow2quant.integer.proof.requirements import INT32_MAX
from pow2quant.integer.proof.tensors import Tensors

__all__ = ["INT32_MAX", "WEIGHTED", "Tensors", "bias_rows", "judge", "partial_sums", "rows_of"]
