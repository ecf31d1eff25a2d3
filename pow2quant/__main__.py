"""`python -m pow2quant`."""

from pow2quant.cli import run

run()
