"""Every command and every block of Python in README.md runs, in one folder, in order; and its links lead somewhere."""

import os
import re
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image

from pow2quant import targets
from pow2quant.plugins import TABLES
from tests import documents

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What README takes for granted: weights of a ResNet-18, and a folder of images."""
    import torchvision

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    torch.save(torchvision.models.resnet18().state_dict(), "resnet18.pth")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            pixels = rng.integers(0, 255, (240, 240, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / name / "0.png")
    return tmp_path


@pytest.mark.usefixtures("workplace")
def test_every_command_and_block_runs() -> None:
    assert documents.run(README) >= 6
    assert (Path("runs/mine/export/aimet-2.0.0/model.encodings")).is_file()


def test_it_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def required(name: str) -> set[str]:
    """The distributions that `pip install NAME` needs on this machine, NAME included."""
    found: set[tuple[str, frozenset[str]]] = set()
    left = [(name, frozenset[str]())]
    while left:
        known = left.pop()
        if known not in found:
            found.add(known)
            for requirement in map(Requirement, distribution(known[0]).requires or ()):
                extras = known[1] or {""}
                if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras):
                    left.append((requirement.name, frozenset(requirement.extras)))
    return {name.lower().replace("_", "-") for name, _ in found}


@pytest.mark.skipif(sys.platform != "linux" or torch.version.cuda is None, reason="README counts Linux with CUDA")
def test_the_packages_and_their_size_are_as_it_says() -> None:
    text = README.read_text(encoding="utf-8")
    packages = required("pow2quant") - {"pow2quant"}
    files = [path.locate() for name in packages for path in distribution(name).files or ()]
    size = sum(os.stat(path).st_size for path in files if os.path.exists(path))
    said = re.search(r"the (\d+) packages take (\d+) GB", text)
    assert said is not None
    assert abs(int(said[1]) - len(packages)) <= 3, "a version of Python or torch may need another package"
    assert abs(int(said[2]) - size / 1e9) < 1


def test_its_table_counts_targets_and_tasks() -> None:
    text = README.read_text(encoding="utf-8")
    assert f"| targets | {len(targets.presets())} |" in text
    assert f"| evaluates accuracy | {len(TABLES['tasks']) - 1} kinds of task |" in text  # without `none`
