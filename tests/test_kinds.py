"""Five kinds of job through every command and from a notebook: judged by their own metric, the same bits everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pow2quant
from pow2quant import config
from pow2quant.backends.base import SILENT
from pow2quant.cli import main
from pow2quant.plugins import names, resolve
from pow2quant.runs import quantized, start
from tests.kinds import KINDS, QUICK, command, write

FILES = ("model.onnx", "model_float.onnx", "model.encodings", "model.safetensors")


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mine"))


@pytest.fixture(scope="module")
def runs(mine: Path) -> dict[str, Path]:
    """A run of `ptq` for each kind."""
    for name, kind in KINDS.items():
        command("ptq", kind, mine, mine / name)
    return {name: mine / name for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_one_call_gives_the_bits_of_the_command_line(name: str, mine: Path, runs: dict[str, Path]) -> None:
    kind = KINDS[name]
    own: dict[str, Any] = {}
    exec(compile((mine / "mine.py").read_text(), "mine.py", "exec"), own)
    model = mine / kind.model if kind.model.endswith(".onnx") else own[kind.model]()
    here = pow2quant.quantize(model, own[kind.data](), config=QUICK, progress=False)
    for file in FILES:
        assert (here.folder / file).read_bytes() == (runs[name] / file).read_bytes(), file
    there = json.loads((runs[name] / "report.json").read_text())
    for key in ("metrics", "task", "metric", "final_sqnr_db", "verdict"):
        assert here.report[key] == there[key], key
    assert (here.report["task"], here.report["metric"]) == (kind.task, kind.metric)
    assert here.agrees


@pytest.mark.parametrize("name", KINDS)
def test_what_integers_need_is_said_wherever_there_are_integers(
    name: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    needs = json.loads((runs[name] / "report.json").read_text())["resources"]
    assert main(["export", str(runs[name]), "--to", "c", "--overwrite", "--quiet"]) == 0
    text = (runs[name] / "export" / "c" / "README.md").read_text()
    for key in ("ram_bytes", "flash_bytes", "macs"):
        assert f"{needs[key]:,}" in text, key
    largest = json.loads((runs[name] / "certificate.json").read_text())["layers"]
    assert needs["accumulator_bits"] == max(layer["bits"] for layer in largest if layer["bits"])
    said = f"RAM {needs['ram_bytes']:,} bytes, flash {needs['flash_bytes']:,} bytes"
    assert said in capsys.readouterr().out
    assert main(["export", str(runs[name] / "model.onnx"), "--to", "qdq", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resources"] == needs


def test_a_network_without_integers_has_no_resources(mine: Path, tmp_path: Path) -> None:
    kind = KINDS["classifier"]
    (mine / "free.yaml").write_text(json.dumps(QUICK | {"quantization": {"weight": {"power_of_2": False}}}))
    arguments = ["--model", kind.model_in(mine), "--data", kind.data_in(mine), "--config", str(mine / "free.yaml")]
    assert main(["ptq", *arguments, "--output", str(tmp_path / "free"), "--quiet"]) == 0
    assert json.loads((tmp_path / "free" / "report.json").read_text())["resources"] is None


CELL = """
import pow2quant, {imports}
result = pow2quant.quantize({model}, {data}, config={config})
result.save({output!r})
result
"""


def test_five_lines_in_a_notebook_give_the_bits_of_the_command_line(mine: Path, runs: dict[str, Path]) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the extra 'dev' is not installed")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = []
    for name, kind in KINDS.items():
        model = repr(kind.model) if kind.model.endswith(".onnx") else f"mine.{kind.model}()"
        values = {"model": model, "data": f"mine.{kind.data}()", "config": QUICK, "output": f"{name} here"}
        cells.append(nbformat.v4.new_code_cell(CELL.format(imports="mine", **values)))
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(mine)}}).execute()
    for cell, (name, kind) in zip(notebook.cells, KINDS.items(), strict=True):
        for file in FILES:
            assert (mine / f"{name} here" / file).read_bytes() == (runs[name] / file).read_bytes(), (name, file)
        shown = next(out["data"]["text/html"] for out in cell.outputs if out.output_type == "execute_result")
        assert "<b>verdict</b>" in shown, name
        report = json.loads((runs[name] / "report.json").read_text())
        assert report["verdict"]["agreement"][:40] in shown
        assert ("<td>onnxruntime</td>" in shown) == (kind.metric is not None)


@pytest.mark.parametrize("name", KINDS)
def test_methods_are_compared_by_the_task_s_metric(name: str, mine: Path, tmp_path: Path) -> None:
    kind = KINDS[name]
    methods = ["--method", "none", "--method", "none+gpfq:conv_scalar=1.16+bias_correction", "--widths", "8:8,3:4"]
    document = command("compare", kind, mine, tmp_path / "compared", *methods, "--seeds", "0..1")
    cells = document["cells"]
    assert [(c["widths"], c["method"], c["seeds"], c["failed"]) for c in cells] == [
        ("W8A8", "none", 1, 0),
        ("W8A8", "none+gpfq:conv_scalar=1.16+bias_correction", 2, 0),
        ("W3A4", "none", 1, 0),
        ("W3A4", "none+gpfq:conv_scalar=1.16+bias_correction", 2, 0),
    ], "what is not random runs once"
    assert {c["metric"] for c in cells} == {kind.metric or "sqnr"}
    assert {c["higher_is_better"] for c in cells} == {kind.metric != "mae"}
    best = max if cells[0]["higher_is_better"] else min
    assert document["best"][0]["value"] == best(c["value"] for c in cells)
    assert (document["best"][0]["top1"] is None) == (kind.metric != "top1")
    chosen = tmp_path / "compared" / "best.yaml"
    assert main(["ptq", "--config", str(chosen), "--output", str(tmp_path / "best"), "--quiet"]) == 0
    report = json.loads((tmp_path / "best" / "report.json").read_text())
    if document["best"][0]["seeds"] == 1:
        measured = report["metrics"][kind.metric]["quantized"] if kind.metric else report["final_sqnr_db"]
        assert measured == pytest.approx(document["best"][0]["value"], abs=1e-3)


@pytest.mark.parametrize("name", ["regressor", "ONNX file"])
def test_a_sweep_is_judged_by_the_task_s_metric(name: str, mine: Path, tmp_path: Path) -> None:
    kind = KINDS[name]
    grid = ["--grid", "quantization.weight.bitwidth=2,8", "--method", "none", "--runs", "ptq"]
    document = command("sweep", kind, mine, tmp_path / "swept", *grid)
    assert document["best"]["metric"] == (kind.metric or "sqnr")
    assert document["best"]["weight_bits"] == 8
    values = [row["quantized"] for row in document["rows"]]
    assert (values[0] > values[1]) == (kind.metric == "mae")
    assert "bitwidth: 8" in (tmp_path / "swept" / "best.yaml").read_text()
    page = (tmp_path / "swept" / "report.html").read_text()
    assert f"Best {'mae' if kind.metric else 'SQNR'}: <b>bitwidth 8</b>" in page


@pytest.mark.parametrize("name", KINDS)
def test_a_search_is_judged_by_the_task_s_metric(name: str, mine: Path, tmp_path: Path) -> None:
    kind = KINDS[name]
    constraint = {"top1": "top1=1%", "miou": "miou=1%", "mae": "mae=5", None: "sqnr=10dB"}[kind.metric]
    options = ["--candidates", "4,8", "--points", "2", "--constraint", constraint]
    report = command("search", kind, mine, tmp_path / "searched", *options)
    assert report["search"]["metric"] == (kind.metric or "sqnr")
    assert report["verdict"]["agrees"]
    chosen = tmp_path / "searched" / "best.yaml"
    assert main(["ptq", "--config", str(chosen), "--output", str(tmp_path / "best"), "--quiet"]) == 0
    for file in FILES:
        assert (tmp_path / "best" / file).read_bytes() == (tmp_path / "searched" / file).read_bytes(), file


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.has_labels])
def test_training_is_judged_by_the_task_s_metric(name: str, mine: Path, tmp_path: Path) -> None:
    kind = KINDS[name]
    report = command("qat", kind, mine, tmp_path / "trained", "--weight-bits", "3", "--epochs", "1")
    assert (report["task"], report["metric"]) == (kind.task, kind.metric)
    assert report["metrics"][kind.metric]["qat_best"] is not None
    assert report["verdict"]["agrees"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compare", "--model", "nowhere.py:net"], "nowhere.py: no such file"),
        (["compare", "--weights", "nowhere.pt"], "nowhere.pt"),
        (["sweep", "--grid", "seed=0..9", "--data", "nowhere.py:data"], "nowhere.py: no such file"),
        (["sweep", "--grid", "model.weights=a.pt,b.pt"], "a.pt"),
    ],
)
def test_a_wrong_path_is_said_once_before_the_trials(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "study"), "--quiet"]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


FIXED = [name for name in names("methods") if getattr(resolve("methods", name), "deterministic", False)]


@pytest.mark.parametrize("method", FIXED)
def test_a_method_that_says_it_is_deterministic_ignores_the_seed(method: str, mine: Path) -> None:
    kind, found = KINDS["classifier"], []
    for seed in (0, 1):
        values = {"model.name": kind.model_in(mine), "data.dataset": kind.data_in(mine), "seed": seed}
        widths = {"quantization.weight.bitwidth": 2 if method == "ternary" else 4, "ptq.methods": ["none", method]}
        job, sim, _ = quantized(start(config.with_values(config.RunConfig(), values | widths), SILENT))
        found.append((sim.encodings(), {name: p.clone() for name, p in job.parameters(sim).items()}))
    (one, first), (other, second) = found
    assert one == other
    assert all(torch.equal(p, second[name]) for name, p in first.items())
