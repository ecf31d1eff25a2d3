"""The example of a plug-in passes the suite, and is found by its entry point."""

import sys
from pathlib import Path

import pytest

from pow2quant.backends.conformance import CHECKS
from pow2quant.plugins import names, resolve

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
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    installed = tmp_path / f"{project['name']}-{project['version']}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    lines = [
        f"[{group}]\n{name} = {value}" for group, p in project["entry-points"].items() for name, value in p.items()
    ]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    assert "numpy" not in names("backends")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("backends", "numpy").__name__ == "NumpySimulation"
