"""The page of a report: complete, escaped, self-contained, and lenient with what older reports lack."""

import base64
import copy
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pow2quant.errors import FileFormatError
from pow2quant.report import pages
from pow2quant.report.html import page_of, render
from pow2quant.report.page import NOTHING
from pow2quant.runs import worst
from pow2quant.tasks.classification import Classification
from tests.reports import (
    AGREEMENT,
    LAYER,
    METRICS,
    REPORT,
    STATISTICS,
    TENSOR,
    VERDICT,
    Page,
    full_page,
    page,
)


def test_the_page_is_one_file_that_reaches_for_nothing():
    text = full_page()
    found = Page(text)
    assert found.tags.isdisjoint({"link", "iframe", "object", "img", "form"})
    assert all(address.startswith("#") and address[1:] in found.ids for address in found.addresses)
    assert len(found.ids) == len(set(found.ids))
    assert not re.search(r"url\((?!#)|@import|https?:", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_verdict_stands_on_top():
    text = page().text
    assert "✓ Agreement: 0 of 12,800 output elements differ" in text
    assert text.index("✓ Agreement: 0 of 12,800") < text.index("✓ Quality: kept within noise") < text.index("98.50 %")
    assert "✗" not in text


def test_a_lost_accuracy_and_warnings_stand_beside_the_agreement():
    judged = {"quality": "lost", "change": "lost 9.0 points of top-1", "warnings": ["the weights are random"]}
    text = page(verdict=VERDICT | judged).text
    assert "✓ Agreement: 0 of 12,800" in text
    assert "✗ Quality: lost 9.0 points" in text
    assert "Warning: the weights are random" in text
    unknown = page(verdict=VERDICT | {"quality": "unknown", "change": "not measured"}).text
    assert "Quality: not measured" in unknown
    assert "✓ Quality" not in unknown
    assert "✗ Quality" not in unknown


def test_classes_are_listed_by_what_they_lost_where_they_are_many():
    rows = [{"class": i, "samples": 5, "float": 80.0, "quantized": 80.0 - i} for i in range(100)]
    few, many = (page(by_class=rows[:n]).tables["Classes"] for n in (3, 100))
    assert few[1:] == [[str(i), "5", "80.00 %", f"{80 - i}.00 %", f"{-i:+.2f}"] for i in range(3)]
    assert [row[0] for row in many[1:]] == [str(i) for i in range(99, 59, -1)]


def test_samples_that_lost_most_are_shown_with_their_answers():
    image = worst.picture(np.random.default_rng(0).random((3, 400, 300), np.float32))
    assert image is not None
    assert PIL.Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).size == (84, 112)
    shown = {"sample": 7, "lost": 100.0, "expected": "4", "float": "4", "quantized": "9", "image": image}
    outside = shown | {"image": "https://example.org/a.png"}
    text = render(REPORT, STATISTICS | {"worst": [shown, outside, shown | {"image": None, "sample": 8}]})
    assert text.count("<img") == 1
    assert "example.org" not in text
    assert "sample 8is 4, float says 4, quantized 9" in Page(text).text.replace("\n", "")


def test_the_samples_that_lost_most_are_kept_over_all_batches():
    task = Classification(((10,),))
    kept, rng = worst.Worst(task), np.random.default_rng(0)
    x, targets = rng.random((60, 1, 4, 4), np.float32), rng.integers(0, 10, 60)
    exact, quantized = (np.eye(10, dtype=np.float32)[a] for a in (targets, np.where(np.arange(60) % 3, targets, 0)))
    for start in range(0, 60, 20):
        part = slice(start, start + 20)
        kept.add(x[part], targets[part], [exact[part]], [quantized[part]])
    lost = [i for i in range(0, 60, 3) if targets[i]][: worst.MOST]
    assert [sample.index for sample in kept.samples] == lost
    entry = kept.to_json()[0]
    assert (entry["lost"], entry["expected"], entry["quantized"]) == (100.0, str(targets[lost[0]]), "0")
    assert worst.picture(np.zeros((5, 8, 8))) is None
    assert worst.picture(np.full((1, 8, 8), np.nan)) is None


def test_accuracy():
    assert page().tables["Accuracy"] == [
        ["executor", "top-1", "95 % interval", "against float", "top-5"],
        ["float", "98.50 %", "97.00 to 99.00 %", NOTHING, "99.75 %"],
        ["simulation", "97.25 %", "96.00 to 98.00 %", "-1.25 points", "99.50 %"],
        ["onnxruntime", "97.25 %", "96.00 to 98.00 %", "-1.25 points", "99.50 %"],
    ]
    assert "Measured on 1,280 of 10,000 images, a stratified sample, 10 of 10 classes. Images: 32x32" in page().text


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
    assert rows["x"] == ["input", "2⁻⁷", "x >> 7", "0", "8"]
    weight = ["2⁻¹⁰ … 2⁻⁶ (3 channels)", "x >> 10 … x >> 6 (3 channels)"]
    assert rows["conv1.weight"] == ["weight", *weight, "0", "2 … 4"]
    assert rows["relu1.output"] == ["output", "0.0123457", NOTHING, "12", "8"]


def test_layers_without_statistics():
    (row,) = page().tables["Layers"][1:]
    weight = "2⁻¹⁰ … 2⁻⁶"
    assert row == ["1", "conv1", "Conv", weight, NOTHING, ">> 6 … >> 9", "102,765", "18", "✓ "]


def test_layers_with_statistics():
    found = Page(full_page())
    x, conv = found.tables["Layers"][1:]
    assert x[1:6] == ["x", "input", NOTHING, "2⁻⁷", NOTHING]
    assert conv[:6] == ["2", "conv1", "Conv + Relu 3 wide", "2⁻¹⁰ … 2⁻⁶", "0.0123457", ">> 6 … >> 9"]
    assert conv[6:] == ["12.5", "30.2", "20.5", "0.500", "102,765", "18", "✓ "]
    for words in ("Signal-to-noise ratio", "32 calibration images", "model: {name: mine}", "2.00\u00d7of float"):
        assert words in found.text


def test_a_layer_that_is_not_proved_says_why():
    layer = LAYER | {
        "proved": False,
        "shift": -2,
        "accumulator_max": None,
        "bits": None,
        "reason": "25 bits are needed",
    }
    (row,) = page(certificate=REPORT["certificate"] | {"layers": [layer]}).tables["Layers"][1:]
    assert row[5:] == ["<< 2", NOTHING, NOTHING, "✗ 25 bits are needed"]


def test_the_tax_is_the_gain_of_free_scales():
    assert Page(full_page()).tables["Power-of-two tax"][1:] == [
        ["1 weights", "6.00 dB", "1.00", "6.00 dB", "conv1.weight"],
        ["2 activations", "3.00 dB", "0.50", "3.00 dB", "x"],
    ]


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
    found = page(validation=[AGREEMENT, wrong], verdict=VERDICT | {"agreement": "DIFFERS: 3 of 12,800"})
    assert "✗ Agreement: DIFFERS" in found.text
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
    measured = poisoned(STATISTICS)
    measured["tensors"] = {name + HOSTILE: tensor for name, tensor in measured["tensors"].items()}
    text = render(report, measured, METRICS, HOSTILE)
    found = Page(text)
    assert text.count("<script>") == 1
    assert found.text.count("<script>") > 40


@given(st.sets(st.sampled_from(sorted(REPORT))))
def test_an_older_report_lacks_keys(missing):
    found = Page(render({key: value for key, value in REPORT.items() if key not in missing}))
    assert ("Tensors" in found.tables) == ("final_quantization_details" not in missing)
    assert ("Not validated." in found.text) == ("validation" in missing)


@settings(max_examples=15)
@given(st.sets(st.sampled_from(sorted(REPORT))))
def test_statistics_stand_beside_any_report(missing):
    found = Page(render({key: value for key, value in REPORT.items() if key not in missing}, STATISTICS))
    assert "conv1" in found.tables["Layers"][2]


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
    assert text.count("2⁻¹² … 2⁻¹ (480 channels)") == 3000
    assert len(text) < 1_600_000


def test_a_page_is_rebuilt_from_the_file_beside_it(tmp_path: Path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert pages.rebuild(tmp_path)[0].read_text(encoding="utf-8") == render(REPORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_files_beside_a_report_are_used(tmp_path: Path):
    contents = {"report.json": REPORT, "statistics.json": STATISTICS, "training_metrics.json": METRICS}
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "config.yaml").write_text("model: {}\n")
    assert page_of(tmp_path) == render(REPORT, STATISTICS, METRICS, "model: {}\n")
    (tmp_path / "statistics.json").write_text("[]")
    with pytest.raises(FileFormatError, match="not a report"):
        pages.rebuild(tmp_path)


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
        pages.rebuild(tmp_path)
    assert list(tmp_path.iterdir()) == before


# In a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


@pytest.fixture(scope="module")
def browser() -> str:
    """A browser's command: what POW2QUANT_BROWSER names, or the first that is installed."""
    found = os.environ.get("POW2QUANT_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed, POW2QUANT_BROWSER names none")
    return found


def opened(browser: str, page: str, script: str, folder: Path, *flags: str) -> tuple[Any, list[str]]:
    """What `script` returns in the opened page, and what the browser's console says.

    The script is allowed beside the page's own, so that everything else stays forbidden.
    """
    probe = (
        f"addEventListener('load', () => {{ document.body.dataset.found = JSON.stringify((() => {{{script}}})()) }})"
    )
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    page = page.replace("script-src '", f"script-src 'sha256-{digest}' '")
    (folder / "page.html").write_text(page.replace("</body>", f"<script>{probe}</script></body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom", *flags]
    done = subprocess.run(
        [browser, *options, f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    said = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)
    return json.loads(html.unescape(found[1])) if found else None, said


def test_a_broken_page_would_be_noticed(browser: str, tmp_path: Path):
    broken = full_page().replace("<p class", '<img src="https://example.invalid/x.png"><p class', 1)
    _, said = opened(browser, broken, "throw Error('broken')", tmp_path)
    assert any("Content Security Policy" in line for line in said)
    assert any("broken" in line for line in said)


def test_tables_sort_and_the_graph_zooms_in_a_browser(browser: str, tmp_path: Path):
    script = """
    const table = document.querySelector(".layers table"), rows = table.tBodies[0].rows;
    const names = () => [...rows].map(row => row.cells[1].textContent);
    const head = i => table.tHead.rows[0].cells[i], click = i => head(i).querySelector("button").click();
    const found = {before: names(), sorts: {}};
    for (const i of [1, 3, 7, 7]) {
      click(i);
      (found.sorts[i] ??= []).push([head(i).getAttribute("aria-sort"), names()]);
    }
    const strip = document.querySelector(".strips svg"), width = strip.getBoundingClientRect().width;
    document.querySelector("[data-zoom='1.25']").click();
    found.zoom = strip.getBoundingClientRect().width / width;
    found.wide = document.documentElement.scrollWidth - innerWidth;
    found.marked = document.querySelectorAll("[aria-sort]").length;
    return found;
    """
    layers = [{**LAYER, "node": f"n{i}"} for i in range(1, 12)]
    boxes = [
        STATISTICS["network"][1] | {"name": f"n{i}", "nodes": [f"n{i}"], "writes": f"t{i}", "weight": None}
        for i in range(1, 12)
    ]
    tensors = {f"t{i}": TENSOR | {"sqnr_db": None if i == 3 else (i * 7 % 11) + 0.5} for i in range(1, 12)}
    report = REPORT | {"certificate": {"layers": layers, "sentence": ""}}
    page = render(report, {"samples": 32, "network": boxes, "tensors": tensors})
    found, said = opened(browser, page, script, tmp_path, "--window-size=500,900")
    assert said == []
    assert found["before"] == [f"n{i}" for i in range(1, 12)]
    assert found["sorts"]["1"] == [["ascending", [f"n{i}" for i in range(1, 12)]]], "n10 comes after n9"
    known = sorted((i for i in range(1, 12) if i != 3), key=lambda i: i * 7 % 11)
    ascending, descending = ([f"n{i}" for i in order] + ["n3"] for order in (known, known[::-1]))
    assert found["sorts"]["7"] == [["ascending", ascending], ["descending", descending]], "unknown values stay last"
    assert found["zoom"] == pytest.approx(1.25, abs=0.01)
    assert found["wide"] <= 0, "the page itself does not scroll sideways"
    assert found["marked"] == 1
