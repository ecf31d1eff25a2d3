"""Every command and every block of Python in README.md runs, in one folder, in order; and its links lead somewhere."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
