"""The page of a report: complete, escaped, self-contained, and lenient with what older reports lack."""

import copy
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pow2quant.errors import FileFormatError
from pow2quant.report.html import NOTHING, rebuild, render

AGREEMENT = {
    "executor": "onnxruntime, all optimizations",
    "against": "custom simulation",
    "elements": 12800,
    "differing": 0,
    "max_lsb": 0.0,
    "top1_agreement": 100.0,
    "first_diverging": None,
    "claim": "proved",
    "notes": [],
}
LAYER = {
    "node": "conv1",
    "op": "Conv",
    "tensor": "conv1.output",
    "accumulator_max": 102765,
    "bits": 18,
    "proved": True,
    "int32_safe": True,
    "shift": [7, 9, 6],
    "reason": "",
}
REPORT: dict[str, Any] = {
    "verdict": "0 of 12,800 output elements differ",
    "quantization_type": "power_of_2",
    "backend": "custom",
    "model": "digits-cnn",
    "dataset": "digits",
    "pipeline_steps": ["calibrate", "export"],
    "config": {
        "weight": {"bitwidth": 4, "symmetric": True, "power_of_2": True},
        "input": None,
    },
    "initial_accuracy": 98.5,
    "ptq_accuracy": 97.25,
    "final_accuracy": 97.25,
    "onnxruntime_accuracy": 97.25,
    "initial_accuracy_top5": 99.75,
    "final_accuracy_top5": 99.5,
    "onnxruntime_accuracy_top5": 99.5,
    "final_sqnr_db": 34.348,
    "evaluated_samples": 1280,
    "model_size_bytes": {"float": 49693, "quantized": 21395},
    "validation": [AGREEMENT],
    "certificate": {"proved": True, "sentence": "1 of 1 layers proved exact", "layers": [LAYER]},
    "final_quantization_details": {
        "x": {"scale": 0.0078125, "exponent": -7, "hardware_op": "x >> 7", "bitwidth": 8, "zero_point": 0},
        "conv1.weight": {
            "scale": [2.0**-9, 2.0**-6, 2.0**-10],
            "exponent": [-9, -6, -10],
            "power_of_2": ["2^(-9)", "2^(-6)", "2^(-10)"],
            "hardware_op": ["x >> 9", "x >> 6", "x >> 10"],
            "bitwidth": [4, 2, 4],
            "zero_point": [0, 0, 0],
        },
        "relu1.output": {"scale": 0.0123456789, "bitwidth": 8, "zero_point": 12},
    },
    "environment": {"python": "3.11.7", "onnxruntime": "1.31.1"},
    "duration_seconds": 13.81,
}
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Rows of text by table, all text, and a check that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.add(tag)
        self.addresses += [value or "" for key, value in attributes if key in ("src", "href", "action", "data")]
        if found.get("role") == "region":
            self.rows = self.tables[found["aria-label"] or ""] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if not {"td", "th"}.isdisjoint(self.open):
            self.rows[-1][-1] += data


def page(**changes: Any) -> Page:
    return Page(render(REPORT | changes))


def test_the_page_is_one_file_without_scripts_and_links():
    found = page()
    assert found.addresses == []
    assert found.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert not re.search(r"url\(|@import|https?:", render(REPORT))


def test_the_verdict_stands_on_top():
    text = page().text
    assert "✓ 0 of 12,800 output elements differ" in text
    assert text.index("✓ 0 of 12,800") < text.index("Accuracy")
    assert "✗" not in text


def test_accuracy():
    assert page().tables["Accuracy"] == [
        ["executor", "top-1", "against float", "top-5"],
        ["float", "98.50 %", NOTHING, "99.75 %"],
        ["simulation", "97.25 %", "-1.25 points", "99.50 %"],
        ["onnxruntime", "97.25 %", "-1.25 points", "99.50 %"],
    ]


def test_accuracy_after_training_keeps_every_step():
    found = page(qat_best_accuracy=98.0, final_accuracy=98.0, final_accuracy_top5=None)
    assert [row[0] for row in found.tables["Accuracy"]][1:] == [
        "float",
        "simulation after PTQ",
        "simulation, best of QAT",
        "simulation",
        "onnxruntime",
    ]
    assert "pow2quant qat --config" in found.text


def test_channels_are_summarized():
    rows = {row[0]: row[1:] for row in page().tables["Tensors"]}
    assert rows["x"] == ["input", "2^-7", "x >> 7", "0", "8"]
    weight = ["2^-10 … 2^-6 (3 channels)", "x >> 10 … x >> 6 (3 channels)"]
    assert rows["conv1.weight"] == ["weight", *weight, "0", "2 … 4"]
    assert rows["relu1.output"] == ["output", "0.0123457", NOTHING, "12", "8"]


def test_shifts_of_channels_are_summarized():
    (row,) = page().tables["Certificate"][1:]
    assert row == ["conv1", "Conv", "102,765", "18", "✓ proved", "✓", "x >> 6 … x >> 9 (3 channels)"]


def test_a_layer_that_is_not_proved_says_why():
    layer = LAYER | {
        "proved": False,
        "shift": -2,
        "accumulator_max": None,
        "bits": None,
        "reason": "25 bits are needed",
    }
    (row,) = page(certificate=REPORT["certificate"] | {"layers": [layer]}).tables["Certificate"][1:]
    assert row == ["conv1", "Conv", NOTHING, NOTHING, "✗ 25 bits are needed", "✓", "x << 2"]


def test_a_difference_is_shown_with_its_place_and_cause():
    divergence = {
        "tensor": "add.output",
        "node": "add",
        "elements": 640,
        "differing": 7,
        "max_lsb": None,
        "cause": "an odd zero point",
    }
    wrong = AGREEMENT | {"differing": 3, "max_lsb": 1.5, "first_diverging": divergence, "notes": ["look again"]}
    found = page(validation=[AGREEMENT, wrong], verdict="DIFFERS: 3 of 12,800")
    assert "✗ DIFFERS" in found.text
    assert found.tables["Agreement"][2] == [
        "✗ onnxruntime, all optimizations",
        "3",
        "12,800",
        "1.5",
        "100.00 %",
        "proved",
        "custom simulation",
    ]
    for words in ("add.output", "7 of 640 elements", "NaN or infinity", "an odd zero point", "look again"):
        assert words in found.text


HOSTILE = "</td></table><script>alert('x')</script>&amp;\"'"


def poisoned(value: Any) -> Any:
    """Every text of a report, keys that are names included, with markup in it."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return {key: poisoned(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_everything_is_escaped():
    report = poisoned(copy.deepcopy(REPORT))
    for part in ("environment", "model_size_bytes", "config", "final_quantization_details"):
        report[part] = {name + HOSTILE: value for name, value in report[part].items()}
    divergence = {"tensor": HOSTILE, "node": HOSTILE, "elements": 1, "differing": 1, "max_lsb": 1.0, "cause": HOSTILE}
    report["validation"][0] |= {"first_diverging": divergence, "notes": [HOSTILE]}
    report["certificate"]["layers"][0] |= {"proved": False, "reason": HOSTILE}
    found = Page(render(report))
    assert "script" not in found.tags
    assert found.text.count("<script>") > 25


@given(st.sets(st.sampled_from(sorted(REPORT))))
def test_an_older_report_lacks_keys(missing):
    found = Page(render({key: value for key, value in REPORT.items() if key not in missing}))
    assert ("Tensors" in found.tables) == ("final_quantization_details" not in missing)
    assert ("Not validated." in found.text) == ("validation" in missing)


@pytest.mark.parametrize("part", ["validation", "certificate"])
def test_parts_lack_keys_too(part):
    sparse = {"validation": [{"executor": "onnxruntime"}], "certificate": {"layers": [{"node": "conv1"}]}}
    assert {"validation": "onnxruntime", "certificate": "conv1"}[part] in page(**{part: sparse[part]}).text


def test_an_empty_report_is_a_page():
    assert "Not validated." in Page(render({})).text


def test_thousands_of_tensors_are_no_problem():
    channels = list(range(-12, 0)) * 40
    detail = {
        "scale": [2.0**k for k in channels],
        "exponent": channels,
        "hardware_op": [f"x >> {-k}" for k in channels],
        "zero_point": [0] * len(channels),
        "bitwidth": 8,
    }
    started = time.process_time()
    text = render(REPORT | {"final_quantization_details": {f"layer{i}.weight": detail for i in range(3000)}})
    assert time.process_time() - started < 10
    assert text.count("2^-12 … 2^-1 (480 channels)") == 3000
    assert len(text) < 1_500_000


def test_a_page_is_rebuilt_from_the_file_beside_it(tmp_path: Path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert rebuild(tmp_path).read_text(encoding="utf-8") == render(REPORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        '"text"',
        '{"validation": 3}',
        '{"validation": ["x"]}',
        '{"final_quantization_details": []}',
        '{"initial_accuracy": "much"}',
        '{"config": [1]}',
        '{"model_size_bytes": {"float": "big", "quantized": 1}}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str | bytes | None):
    if text is not None:
        (tmp_path / "report.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = list(tmp_path.iterdir())
    with pytest.raises(FileFormatError, match=r"report\.json: "):
        rebuild(tmp_path)
    assert list(tmp_path.iterdir()) == before
