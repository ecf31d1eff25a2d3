"""The backends on which tests run: AIMET's where it is installed."""

from importlib.util import find_spec

import pytest

NEEDS_AIMET = pytest.mark.skipif(find_spec("aimet_torch") is None, reason="the extra 'aimet' is not installed")

BACKENDS = ["custom", pytest.param("aimet", marks=NEEDS_AIMET)]
