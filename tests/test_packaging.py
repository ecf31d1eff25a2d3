"""The source distribution and the wheel: what is in them, and that they install and run away from the checkout."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from pow2quant import __version__

ROOT = Path(__file__).resolve().parents[1]
PRODUCTS = {"build", "dist", "runs", "site"}  # at the root only: pow2quant/runs is a package
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "pow2quant").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
INFO = f"pow2quant-{__version__}.dist-info"


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What the command prints; it must succeed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@dataclass(frozen=True)
class Distributions:
    """wheel: built from the sdist, as for a release; direct: built from the tree."""

    sdist: Path
    wheel: Path
    direct: Path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def not_sources(folder: str, names: list[str]) -> set[str]:
    """What `shutil.copytree` leaves out."""
    hidden = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")(folder, names)
    return hidden | (PRODUCTS & set(names) if Path(folder) == ROOT else set())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """From a copy of the tree: what earlier builds have left in build/ and *.egg-info would get into the archives."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=not_sources)
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", folder / "dist", tree, cwd=folder)
    run(*build, "--wheel", "--outdir", folder / "direct", tree, cwd=folder)
    (sdist,), (wheel,) = (list((folder / "dist").glob(f"*.{kind}")) for kind in ("tar.gz", "whl"))
    return Distributions(sdist, wheel, folder / "direct" / wheel.name)


@pytest.fixture(scope="module")
def installed(built: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel in it; what it depends on comes from the tests' environment.

    A folder that a .pth file names is searched, but its own .pth files, such as an editable install's, are not read.
    """
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder, with_pip=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    run(folder / "bin" / "pip", "install", "--no-index", "--no-deps", "--force-reinstall", built.wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_holds_the_package_and_nothing_else(built):
    assert built.wheel.name == f"pow2quant-{__version__}-py3-none-any.whl"
    files = contents(built.wheel)
    assert {name for name in files if not name.startswith(f"{INFO}/")} == PACKAGE
    assert {name.removeprefix(f"{INFO}/") for name in files.keys() - PACKAGE} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }
    assert [name for name in sorted(PACKAGE) if files[name] != (ROOT / name).read_bytes()] == []
    assert {"pow2quant/py.typed", "pow2quant/report/templates/report.html.j2"} <= PACKAGE
    assert files[f"{INFO}/top_level.txt"] == b"pow2quant\n"


def test_the_source_distribution_holds_the_package_and_what_builds_it(built):
    with tarfile.open(built.sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members)  # no links
    names = {member.name.removeprefix(f"pow2quant-{__version__}/") for member in members}
    generated = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("pow2quant.egg-info/")}
    assert names - generated == PACKAGE | {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}


def test_the_source_distribution_builds_the_wheel_of_the_tree(built):
    assert contents(built.wheel) == contents(built.direct)


def test_twine_finds_nothing(built):
    run(sys.executable, "-m", "twine", "check", "--strict", built.sdist, built.wheel, cwd=ROOT)


def test_metadata(built):
    files = contents(built.wheel)
    metadata = email.message_from_bytes(files[f"{INFO}/METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("pow2quant", __version__)
    assert (metadata["Requires-Python"], metadata["License-Expression"]) == (">=3.10", "Apache-2.0")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
    assert {"aimet", "dev", "docs"} <= set(metadata.get_all("Provides-Extra", []))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {"torch>=2.8", "onnx>=1.17", "onnxruntime<1.33,>=1.20"} <= set(required)
    assert not any(line.startswith(("aimet", "pytest")) for line in required)
    assert files[f"{INFO}/entry_points.txt"] == b"[console_scripts]\npow2quant = pow2quant.cli:run\n"


def test_the_installed_wheel_runs_outside_the_checkout(installed, tmp_path):
    where = "import pow2quant, importlib.metadata as m; print(pow2quant.__file__, m.version('pow2quant'))"
    place, version = run(installed / "python", "-c", where, cwd=tmp_path).split()
    assert Path(place).is_relative_to(installed.parent)
    assert version == __version__
    assert "digits-cnn" in run(installed / "pow2quant", "list", cwd=tmp_path)
    printed = run(installed / "pow2quant", "ptq", "--output", "run", "--quiet", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "verdict: 0 of 4,500 output elements differ" in printed
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not os.environ.get("POW2QUANT_SLOW"), reason="installs gigabytes; POW2QUANT_SLOW=1 runs it")
def test_the_wheel_installs_with_its_dependencies_alone(built, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    program = tmp_path / "env" / "bin"
    run(program / "pip", "install", "--constraint", ROOT / "constraints.txt", built.wheel, cwd=tmp_path)
    run(program / "pip", "check", cwd=tmp_path)
    run(program / "pow2quant", "list", cwd=tmp_path)
    printed = run(program / "pow2quant", "ptq", "--output", "run", "--quiet", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "verdict: 0 of 4,500 output elements differ" in printed
