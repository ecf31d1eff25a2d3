"""The embedded second task, a digit's place and name on a canvas: by both doors, trained, searched, compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pow2quant
from pow2quant.cli import main

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "find_digits" / "find_digits.py"
QUICK = {"report": {"statistics": False, "latency": False}, "ptq": {"calibration_batches": 4}}


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, nn.Module, list[str]]:
    """The example, its trained network, and the command line's flags for it."""
    folder = tmp_path_factory.mktemp("finder")
    sys.path.insert(0, str(EXAMPLE.parent))
    try:
        import find_digits
    finally:
        sys.path.remove(str(EXAMPLE.parent))
    network = find_digits.network()
    save_file({name: p.contiguous() for name, p in network.state_dict().items()}, folder / "finder.safetensors")
    (folder / "quick.yaml").write_text(json.dumps(QUICK))
    flags = [
        "--model",
        f"{EXAMPLE}:Finder",
        "--weights",
        str(folder / "finder.safetensors"),
        "--data",
        f"{EXAMPLE}:data",
    ]
    return (
        find_digits,
        network,
        [*flags, "--metric", f"{EXAMPLE}:found", "--config", str(folder / "quick.yaml"), "--quiet"],
    )


def test_it_is_found_after_quantization_and_both_doors_agree(
    finder: tuple[Any, nn.Module, list[str]], tmp_path: Path
) -> None:
    example, network, flags = finder
    here = pow2quant.quantize(network, example.data(), metric=example.found, config=QUICK, progress=False)
    assert main(["ptq", *flags, "--output", str(tmp_path / "there")]) == 0
    for file in ("model.onnx", "model.encodings", "model.safetensors"):
        assert (here.folder / file).read_bytes() == (tmp_path / "there" / file).read_bytes()
    measured = here.report["metrics"]["found"]
    assert (here.report["task"], here.report["metric"]) == ("detection", "found")
    assert measured["float"] > 75
    assert measured["quantized"] > measured["float"] - 3
    assert here.agrees
    canvas, digit, centre = example.data()[1].tensors
    with torch.no_grad():
        assert example.found(here.model(canvas), (digit, centre)) == pytest.approx(measured["quantized"], abs=1e-4)


def test_it_is_trained_with_its_own_loss(finder: tuple[Any, nn.Module, list[str]], tmp_path: Path) -> None:
    flags = [*finder[2], "--loss", f"{EXAMPLE}:loss", "--weight-bits", "3", "--epochs", "1"]
    assert main(["qat", *flags, "--output", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["metrics"]["found"]["qat_best"] > 40


def test_its_metric_is_what_a_search_holds_and_a_comparison_shows(
    finder: tuple[Any, nn.Module, list[str]], tmp_path: Path
) -> None:
    flags = [*finder[2], "--candidates", "4,8", "--points", "2", "--constraint", "found=60%"]
    assert main(["search", *flags, "--output", str(tmp_path / "run")]) == 0
    searched = json.loads((tmp_path / "run" / "report.json").read_text())["search"]
    assert (searched["metric"], searched["accuracy_floor"]) == ("found", 60.0)
    assert searched["chosen"]["accuracy"] >= 60
    flags = [*finder[2], "--method", "none", "--widths", "8:8", "--seeds", "0"]
    assert main(["compare", *flags, "--output", str(tmp_path / "compared")]) == 0
    (cell,) = json.loads((tmp_path / "compared" / "comparison.json").read_text())["cells"]
    assert cell["metric"] == "found"
    assert cell["value"] > 75


def test_a_bound_on_a_metric_that_there_is_not_is_one_line(
    finder: tuple[Any, nn.Module, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *finder[2], "--constraint", "fond=60", "--output", str(tmp_path / "run")]) == 2
    assert "'fond=60' is not legal" in capsys.readouterr().err
    assert main(["search", *finder[2], "--constraint", "top1=60%", "--output", str(tmp_path / "run")]) == 2
    assert "top1 is no metric of detection; legal: found, sqnr" in capsys.readouterr().err
