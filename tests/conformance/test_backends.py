"""Every registered backend, those of installed packages too, passes every check."""

import pytest

from pow2quant.backends.conformance import CHECKS
from pow2quant.plugins import names, resolve


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", sorted(names("backends")))
def test_a_backend_conforms(name, check):
    if name == "aimet":
        pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")
    check(resolve("backends", name))
