"""The scripts of examples/ run as they stand, elsewhere than in the checkout, and print what they promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from pow2quant.adapters import onnx_qdq

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
LONGEST = 60


def run(script: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_own_network_agrees_bit_for_bit(tmp_path: Path) -> None:
    printed = run("own_network.py", tmp_path)
    assert len(re.findall(r": 0 of 3970 elements differ: proved$", printed, re.MULTILINE)) == 2
    before, after = (float(x) for x in re.findall(r"([\d.]+)%", printed))
    assert before > 85  # it has learned something,
    assert after > before - 5  # and four bits keep it
    table = onnx_qdq.from_qdq(onnx_qdq.load(tmp_path / "runs/own_network/model.onnx")).encodings
    assert all(encoding.is_power_of_two for encoding in table.values())
    assert {table[name].grid.bits for name in table if name.endswith(".weight")} == {4}


def test_aimet_script_needs_one_other_line(tmp_path: Path) -> None:
    printed = run("aimet_script.py", tmp_path, "out")
    assert printed.startswith("0 free scales; 0 of 640 differ\n2 of 2 layers proved exact in float32")
    assert onnx.load(tmp_path / "out/model.onnx").graph.input[0].name == "input"
    encodings = json.loads((tmp_path / "out/model.encodings").read_text(encoding="utf-8"))
    assert encodings["version"] == "2.0.0"
    script = (EXAMPLES / "aimet_script.py").read_text(encoding="utf-8")
    assert "# from aimet_torch import QuantizationSimModel" in script
    assert "\nfrom pow2quant import QuantizationSimModel\n" in script


def test_check_onnx_reports_free_scales_of_another_tool(tmp_path: Path) -> None:
    printed = run("check_onnx.py", tmp_path)
    assert re.search(r"^w1: scale 0\.00\d+ = 2\^-[78]\.\d{3}$", printed, re.MULTILINE)
    assert "\n8 free scales\n" in printed
    agreement = r"^onnxruntime, all optimizations against onnxruntime, no optimization: \d+ of 640 elements differ"
    assert re.search(agreement, printed, re.MULTILINE)
    assert "0 of 2 layers proved" in printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_is_short_tested_and_listed(script: str) -> None:
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) < LONGEST
    assert f'run("{script}"' in Path(__file__).read_text(encoding="utf-8")
    assert f"]({script})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
