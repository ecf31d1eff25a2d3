"""What all tests share: hypothesis profiles, threads, and real data where there are some."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small networks run eight times faster

if "POW2QUANT_TEST_CACHE" not in os.environ:  # the user's own stays as it is; processes of pytest-xdist share theirs
    _CACHE = tempfile.TemporaryDirectory()
    os.environ["POW2QUANT_TEST_CACHE"] = os.environ["XDG_CACHE_HOME"] = _CACHE.name

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def data_path() -> Path:
    """The folder of real data that the environment variable POW2QUANT_DATA names; without one, the test is skipped."""
    folder = os.environ.get("POW2QUANT_DATA")
    if not folder:
        pytest.skip("POW2QUANT_DATA names no folder of data")
    return Path(folder)
