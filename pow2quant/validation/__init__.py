"""Whether executors agree to the last bit, and where they part when they do not."""

from pow2quant.validation.agreement import Executor, compare

__all__ = ["Executor", "compare"]
