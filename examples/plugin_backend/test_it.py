import pytest
from pow2quant_numpy import NumpySimulation

from pow2quant.backends.conformance import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(check):
    check(NumpySimulation)
