"""Every command and every block of Python in README.md runs, in one folder, in order."""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pow2quant.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """The commands of a shell block, comments and continuation lines resolved."""
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines() if line.strip()]


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


def test_every_command_and_block_runs(workplace: Path) -> None:
    ran = 0
    for language, block in BLOCKS:
        if language == "python":
            named = re.match(r"# (\S+\.py)\n", block)
            path = workplace / (named.group(1) if named else "block.py")
            path.write_text(block)
            runpy.run_path(str(path))
            ran += 1
        elif language == "bash":
            for command in commands(block):
                if command[0] == "make":
                    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
                    continue
                assert command[0] == "pow2quant"
                assert main([*command[1:], *([] if command[1] in ("list", "export") else ["--quiet"])]) == 0, command
                ran += 1
    assert ran >= 8


def test_the_shown_output_is_what_the_command_prints(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = next(block for language, block in BLOCKS if language == "text")
    assert main(["ptq", "--output", "runs/demo", "--quiet"]) == 0
    printed = capsys.readouterr().out
    # Trained on another machine, the last digits of the accuracy may move; the shape and the verdict may not.
    numbers = re.compile(r"[\d.,]+")
    assert numbers.sub("#", printed).split() == numbers.sub("#", shown).split()
    assert re.search(r"verdict: 0 of 4,500 output elements differ .* proved", printed)


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
