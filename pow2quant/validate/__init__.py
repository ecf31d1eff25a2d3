"""Whether executors agree to the last bit, and where they part when they do not."""

from pow2quant.validate.agreement import Executor, compare

__all__ = ["Executor", "compare"]
