"""The page that compares finished runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pow2quant.errors import FileFormatError
from pow2quant.report import comparison, pages
from tests.reports import AGREEMENT, REPORT, STATISTICS, VERDICT, Page


def finished(folder: Path, **reports: dict[str, Any]) -> list[Path]:
    for name, changes in reports.items():
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(json.dumps(REPORT | changes))
        (folder / name / "statistics.json").write_text(json.dumps(STATISTICS))
    return [folder / name for name in reports]


def test_runs_are_compared_on_one_page(tmp_path: Path):
    folders = finished(tmp_path, a={}, _b={"final_accuracy": 98.25, "pipeline_steps": ["calibrate", "gpfq", "export"]})
    target = pages.compare(folders, tmp_path / "both")
    found = Page(target.read_text(encoding="utf-8"))
    assert "✓ No output element differs in any run" in found.text
    assert "Best top-1: _b, 98.25 %" in found.text
    same = "Measured on the same images: 1,280 of 10,000 images, a stratified sample, 10 of 10 classes"
    assert same in found.text
    head, first, second = found.tables["Runs"]
    assert head == [
        "run",
        "change against float (95 % interval)",
        *("top-1", "float", "methods", "SQNR, dB", "ONNX file, KiB", "speed", "seconds"),
    ]
    assert first == [
        "✓ a",
        "-1.25 (-2.50 to +0.00)",
        *("97.25 %", "98.50 %", "none", "34.3", "20.9", "2.00\u00d7", "14"),
    ]
    assert second[:5] == ["✓ _b", "-0.25 (-2.50 to +0.00)", "98.25 %", "98.50 %", "gpfq"]
    assert "The other one may be as good: its 95 % interval reaches this change" in found.text
    assert {"../a/report.html", "../_b/report.html"}.isdisjoint(found.addresses), "there are no pages to link to"
    assert {"Signal to noise in dB along the network, a line for each run"} <= {
        *re.findall(r'aria-label="([^"]*)"', target.read_text(encoding="utf-8"))
    }


def test_runs_on_other_images_are_compared_by_their_change_alone(tmp_path: Path):
    few = REPORT["evaluation"] | {"images": 320, "sample": "cd", "classes": 9}
    sizes = {"float": 49693, "quantized": 30000}
    lucky = {"initial_accuracy": 99.5, "final_accuracy": 98.0, "evaluation": few, "model_size_bytes": sizes}
    text = Page(pages.compare(finished(tmp_path, a={}, b=lucky), tmp_path / "both").read_text("utf-8")).text
    assert "Best top-1" not in text
    assert "Best change against float: a, -1.25 (-2.50 to +0.00) points" in text
    assert "measured on different images, so their values cannot be compared" in text
    assert "b: 320 of 10,000 images, a stratified sample, 9 of 10 classes" in text
    assert "top-1 against ONNX file, KiB" in (tmp_path / "both" / "report.html").read_text("utf-8")


def test_a_run_that_differs_is_named_in_the_comparison(tmp_path: Path):
    wrong = {
        "validation": [AGREEMENT | {"differing": 2}],
        "verdict": VERDICT | {"text": "DIFFERS: 2 of 12,800"},
        "model": "another",
    }
    text = Page(pages.compare(finished(tmp_path, a={}, b=wrong), tmp_path).read_text(encoding="utf-8")).text
    assert "✗ Executors differ in 1 of 2 runs" in text
    assert "DIFFERS: 2 of 12,800" in text


def test_what_is_missing_in_a_comparison_is_left_out(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "report.json").write_text("{}")
    assert "Not validated." in Page(pages.compare([tmp_path / "a"] * 2, tmp_path).read_text()).text
    with pytest.raises(FileFormatError, match=r"b/report\.json"):
        pages.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_damaged_report_is_named_in_a_comparison(tmp_path: Path):
    folders = finished(tmp_path, a={}, b={"verdict": float("inf")})
    with pytest.raises(FileFormatError, match=r"b/report\.json: not a report of pow2quant"):
        pages.compare(folders, tmp_path / "c")


def test_runs_are_named_by_what_tells_them_apart():
    assert comparison.names([Path("/r/a/w4"), Path("/r/b/w4"), Path("/r/a/w8")]) == ["a/w4", "b/w4", "a/w8"]
    assert comparison.names([Path("/r/a"), Path("/r/a")]) == ["a", "a (2)"]
