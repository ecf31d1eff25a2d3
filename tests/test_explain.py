"""`pow2quant explain`: its figures are those of the arithmetic, and what is not there is named."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pow2quant import run_folder
from pow2quant.cli import main
from pow2quant.errors import ConfigError, FileFormatError
from pow2quant.pow2_constraints import Encoding
from pow2quant.pow2_constraints.arithmetic import ROUNDINGS
from pow2quant.report.explain import candidates, explain, lines


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    target = folder / "mine.yaml"
    target.write_text("rounding: {products: half_up}\nexecutors: [engine]", encoding="utf-8")
    arguments = ["--target", str(target), "--max-eval-batches", "1", "--quiet"]
    assert main(["ptq", "--output", str(folder / "run"), *arguments]) == 0
    target.unlink()  # the folder says what is needed of it
    return folder / "run"


def test_candidates_by_hand() -> None:
    """Steps 0.5 and 3 on the grid -2 to 1: 0.5 becomes 0 (half to even), 3 saturates at 1."""
    ends = np.array(-2.0), np.array(1.0)
    found = {c.change: c for c in candidates(np.array([0.5, 3.0]), np.ones(2), np.ones(2), *ends)}
    assert found[0].clipped == 50
    assert found[0].rounding == pytest.approx(100 * 0.25 / 9.25)
    assert found[0].clipping == pytest.approx(100 * 4 / 9.25)
    assert found[0].sqnr_db == pytest.approx(10 * np.log10(9.25 / 4.25))
    assert found[2].clipped == 0  # in steps of 4: 0.125 becomes 0, 0.75 becomes 1, which is 4
    assert found[2].rounding == pytest.approx(100 * (0.25 + 1) / 9.25)


def test_a_weights_candidates_are_exact(run: Path) -> None:
    parameters, table = run_folder.load_state(run / run_folder.STATE)
    weight, encoding = parameters["conv4.weight"].astype(np.float64), table["conv4.weight"]
    tensor = next(t for t in explain(run, "conv4").tensors if t.role == "weight")
    for candidate in tensor.candidates:
        scale = np.ldexp(encoding.scale, candidate.change).astype(np.float32)
        other = Encoding(scale, encoding.zero_point, encoding.grid, encoding.axis)
        lost = np.square(other.fake_quantize(weight.astype(np.float32)).astype(np.float64) - weight).sum()
        share = 100 * lost / np.square(weight).sum()
        assert candidate.rounding + candidate.clipping == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("layer", ["conv1", "fc"])
def test_a_value_becomes_the_code_that_its_encoding_gives(run: Path, layer: str) -> None:
    _, table = run_folder.load_state(run / run_folder.STATE)
    explained = explain(run, layer)
    text = " ".join(explained.steps)
    assert ROUNDINGS["half_up"] in text
    real, code = (float(re.search(p, text)[1]) for p in (r"real sum of ([-\d.]+) is", r"the code (\d+)\."))  # type: ignore[index]
    encoding = table[explained.tensors[-1].name]
    assert code == encoding.quantize(np.float32(real))


def test_a_weight_that_a_method_rounded_is_explained_by_the_float_one(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    parameters, table = run_folder.load_state(folder / run_folder.STATE)
    rounded = table["conv4.weight"].fake_quantize(parameters["conv4.weight"])
    run_folder.save_state(folder / run_folder.STATE, parameters | {"conv4.weight": rounded}, table, "")
    exact, estimated = (next(t for t in explain(f, "conv4").tensors if t.role == "weight") for f in (run, folder))
    assert (exact.exact, estimated.exact) == (True, False)
    assert next(c for c in estimated.candidates if c.change == 0).sqnr_db is not None
    assert "estimated from the histogram" in "\n".join(lines(explain(folder, "conv4")))


def test_the_report_has_the_steps_of_the_layers_that_cost_most(run: Path, tmp_path: Path) -> None:
    page = html.unescape((run / "report.html").read_text(encoding="utf-8"))
    layers = re.findall(r"<details><summary>(\w+)</summary><pre", page)
    assert layers
    assert all("\n".join(lines(explain(run, layer))) in page for layer in layers)
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / run_folder.STATE).unlink()
    assert main(["report", str(folder)]) == 0
    assert "step by step" not in (folder / "report.html").read_text(encoding="utf-8")


def test_every_layer_is_explained(run: Path) -> None:
    network = json.loads((run / run_folder.STATISTICS).read_text(encoding="utf-8"))["network"]
    for box in network:
        explained = explain(run, box["name"])
        assert explained.layer == box["name"]
        assert "\n".join(lines(explained)).startswith(box["name"])
    assert explain(run, "conv4.weight") == explain(run, "conv4")


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(run), "conv1"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("lost to clipping", "no sum exceeds", "is shifted by", "half a step"))
    assert main(["explain", str(run), "conv1", "--output", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "explain.json").read_text(encoding="utf-8"))
    assert document.keys() == dataclasses.asdict(explain(run, "conv1")).keys()


def test_what_is_not_there_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'konv1' is not in .*conv1"):
        explain(run, "konv1")
    with pytest.raises(FileFormatError, match=r"report\.json"):
        explain(tmp_path, "conv1")
    (tmp_path / "report.json").write_text("[]", encoding="utf-8")
    with pytest.raises(FileFormatError, match="object"):
        explain(tmp_path, "conv1")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("report.json", {"final_quantization_details": None}),
        ("report.json", {"rounding": 5}),
        ("statistics.json", {"tensors": {}, "network": [5]}),
        ("certificate.json", {"layers": {"a": "b"}}),
    ],
)
def test_files_that_were_changed_are_no_defect(name: str, change: dict[str, Any], run: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(run, tmp_path / "run")
    document = json.loads((changed / name).read_text(encoding="utf-8"))
    (changed / name).write_text(json.dumps(document | change), encoding="utf-8")
    with pytest.raises(FileFormatError, match=r"run: not the files of one finished run \(report\.json, "):
        explain(changed, "conv1")
