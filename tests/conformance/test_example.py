"""The example of a plug-in passes the suite, and is found by its entry point."""

import sys
from pathlib import Path

import pytest

from pow2quant.backends.conformance import CHECKS
from pow2quant.plugins import names, resolve
from tests.documents import install

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin_backend"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    yield
    sys.modules.pop("pow2quant_numpy", None)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_example_conforms(check):
    from pow2quant_numpy import NumpySimulation

    check(NumpySimulation)


def test_an_entry_point_registers_it(tmp_path, monkeypatch):
    install((EXAMPLE / "pyproject.toml").read_text(), tmp_path)
    assert "numpy" not in names("backends")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("backends", "numpy").__name__ == "NumpySimulation"
