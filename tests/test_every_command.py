"""Every command for the tasks that tests/test_kinds.py does not have: several labels, soft labels, tokens, images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pow2quant.cli import main
from tests.kinds import FURTHER, QUICK, command, write

LOSSES = {
    "several labels": {"type": "BCEWithLogitsLoss", "pos_weight": [1, 2, 3]},
    "soft labels": {"type": "CrossEntropyLoss", "weight": [1, 2, 3], "label_smoothing": 0.1},
    "tokens": {"type": "CrossEntropyLoss", "weight": [1, 2, 3, 4]},
    "images": {"type": "HuberLoss"},
}
"""Of `qat`, from YAML: with weights of classes where there are classes."""


@pytest.mark.parametrize("name", FURTHER)
def test_every_command_works_for_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, mine, run = FURTHER[name], write(tmp_path), tmp_path / "run"
    report = command("ptq", kind, mine, run, "--weight-bits", "4")
    assert (report["task"], report["metric"], report["verdict"]["agrees"]) == (kind.task, kind.metric, True)
    assert report["metrics"][kind.metric]["quantized"] == report["metrics"][kind.metric]["onnxruntime"]

    (mine / "quick.yaml").write_text(json.dumps(QUICK | {"training": {"epochs": 1, "criterion": LOSSES[name]}}))
    trained = command("qat", kind, mine, tmp_path / "trained", "--weight-bits", "4")
    assert trained["metrics"][kind.metric]["qat_best"] is not None
    assert trained["verdict"]["agrees"]

    bound = "psnr=0.1" if kind.metric == "psnr" else f"{kind.metric}=0%"
    found = command("search", kind, mine, tmp_path / "found", "--constraint", bound, "--candidates", "4,8")
    assert found["search"]["metric"] == kind.metric
    compared = command("compare", kind, mine, tmp_path / "compared", "--method", "none", "--widths", "8:8")
    assert [cell["metric"] for cell in compared["cells"]] == [kind.metric]
    swept = command("sweep", kind, mine, tmp_path / "swept", "--grid", "quantization.weight.bitwidth=4,8")
    assert [row["metric"] for row in swept["rows"]] == [kind.metric] * 2

    assert main(["validate", str(run), "--quiet"]) == 0
    assert main(["report", str(run), "--quiet"]) == 0
    assert main(["report", str(run), str(tmp_path / "trained"), "--output", str(tmp_path / "both"), "--quiet"]) == 0
    capsys.readouterr()
    for each in ("correct", "logits"):
        of_classes = kind.task == "classification"
        assert main([each, str(run), "--quiet"]) == (0 if of_classes else 2)
        refused = f"error: task: {kind.task} has no logits of classes; this is for classification\n"
        assert capsys.readouterr().err == ("" if of_classes else refused)


def test_a_layer_is_explained_where_statistics_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, mine = FURTHER["images"], write(tmp_path)
    command("ptq", kind, mine, tmp_path / "without")
    assert main(["explain", str(tmp_path / "without"), "0"]) == 2
    assert "no such file; it is written unless report.statistics is false" in capsys.readouterr().err
    (mine / "quick.yaml").write_text(json.dumps(QUICK | {"report": {"latency": False}}))
    command("ptq", kind, mine, tmp_path / "with")
    assert main(["explain", str(tmp_path / "with"), "0"]) == 0
    assert "accumulator" in capsys.readouterr().out


def test_one_logit_of_two_classes_has_no_logits_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (write(tmp_path) / "mine.py").read_text()
    source += "def one(): return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1)))\n"
    source += "def two_classes(): return seeded(lambda: loader(images(), torch.arange(24) % 2))\n"
    (tmp_path / "mine.py").write_text(source)
    kind = FURTHER["soft labels"]._replace(model="one", data="two_classes")
    assert command("ptq", kind, tmp_path, tmp_path / "run")["metric"] == "top1"
    for each in ("correct", "logits"):
        assert main([each, str(tmp_path / "run"), "--quiet"]) == 2
        assert "the network has one logit for two classes" in capsys.readouterr().err
