"""The page of a report: complete, escaped, self-contained, and lenient with what older reports lack."""

import base64
import copy
import hashlib
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pow2quant import models
from pow2quant.backends import samples
from pow2quant.errors import FileFormatError
from pow2quant.pow2_constraints import Encoding, IntGrid
from pow2quant.report import comparison, graph, histograms, network, pages, statistics
from pow2quant.report.html import page_of, render
from pow2quant.report.page import NOTHING
from pow2quant.runs import simulate, worst
from pow2quant.tasks.classification import Classification
from pow2quant.validation import latency
from tests.quantized_graphs import Graph, encoding

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
VERDICT: dict[str, Any] = {
    "agrees": True,
    "claim": "proved",
    "quality": "kept",
    "text": "0 of 12,800 output elements differ; quality: kept within noise",
    "agreement": "0 of 12,800 output elements differ",
    "change": "kept within noise",
    "warnings": [],
}
REPORT: dict[str, Any] = {
    "verdict": VERDICT,
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
    "evaluation": {
        "images": 1280,
        "of": 10_000,
        "classes": 10,
        "of_classes": 10,
        "interval": [-2.5, 0.0],
        "intervals": {"float": [97.0, 99.0], "quantized": [96.0, 98.0], "onnxruntime": [96.0, 98.0]},
        "sample": "01ab",
        "preprocessing": ["images: 32x32 -> 256 -> 224 (shorter side 256, central 224x224)"],
    },
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
    "latency": {"float": 0.004, "quantized": 0.002, "calls": 50, "threads": 1, "batch": 1, "shape": [1, 3, 8, 8]},
}
HISTOGRAM = {"start": -10.0, "width": 1.0, "counts": [1, 0, 4, 9, 16, 9, 4, 0, 0, 0, 0, 0, 1], "low": -8, "high": 7}
TENSOR = {
    "role": "output",
    "sqnr_db": 30.25,
    "network_sqnr_db": 20.5,
    "minimum": -1.0,
    "maximum": 2.0,
    "clipped": 0.5,
    "power_of_2_db": 30.0,
    "free_scale_db": 33.0,
    "histogram": HISTOGRAM,
}
STATISTICS: dict[str, Any] = {
    "samples": 32,
    "network": [
        {"name": "x", "op": "input", "nodes": [], "reads": [], "writes": "x", "weight": None, "detail": ""},
        {
            "name": "conv1",
            "op": "Conv + Relu",
            "nodes": ["conv1", "relu1"],
            "reads": ["x"],
            "writes": "relu1.output",
            "weight": "conv1.weight",
            "detail": "3 wide",
        },
    ],
    "tensors": {
        "conv1.weight": TENSOR | {"role": "weight", "sqnr_db": 12.5, "free_scale_db": 36.0},
        "x": TENSOR | {"role": "input", "sqnr_db": None},
        "relu1.output": TENSOR,
    },
}
METRICS = {"epochs": [{"epoch": i, "loss": 1 / i if i else None, "accuracy": 90.0 + i} for i in range(4)]}
VOID = {"meta", "br", "wbr", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Rows of text by table, all text, and a check that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.add(tag)
        self.addresses += [value or "" for key, value in attributes if key in ("src", "href", "action", "data")]
        self.ids += [value or "" for key, value in attributes if key == "id"]
        if found.get("role") == "region":
            self.rows = self.tables[found["aria-label"] or ""] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and "table" in self.open:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        if {"style", "script"}.isdisjoint(self.open):
            self.text += data
        if not {"td", "th"}.isdisjoint(self.open):
            self.rows[-1][-1] += data


def page(**changes: Any) -> Page:
    return Page(render(REPORT | changes))


def full_page(**changes: Any) -> str:
    return render(REPORT | {"qat_best_accuracy": 98.0} | changes, STATISTICS, METRICS, "model: {name: mine}\n")


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


# What is measured


def of_tensor(grid: Encoding, x: Any, role: str = "output", exact: Any = None, quantized: Any = None) -> dict[str, Any]:
    values = np.asarray(x, np.float32)
    reached = grid.fake_quantize(values) if quantized is None else np.asarray(quantized, np.float32)
    reference = values if exact is None else np.asarray(exact, np.float32)
    return statistics.of_tensor(grid, samples.Sampled(role, reference, values, reached))


def test_noise_clipping_and_histogram_of_a_tensor_by_hand():
    # steps of 1/2 on 0 … 3: 0.25 is a tie and becomes 0, 1 and 1.5 stay, 2 saturates to 1.5
    found = of_tensor(encoding(-1, bits=2), [0.25, 1.0, 1.5, 2.0], exact=[0.5, 1.0, 1.5, 2.0])
    signal, noise = 0.0625 + 1 + 2.25 + 4, 0.0625 + 0.25
    assert found["sqnr_db"] == round(10 * math.log10(signal / noise), 2)
    assert found["network_sqnr_db"] == round(10 * math.log10((0.25 + 1 + 2.25 + 4) / (0.25 + 0.25)), 2)
    assert found["clipped"] == 25.0
    bars = found["histogram"]
    edges = [bars["start"] + i * bars["width"] for i, count in enumerate(bars["counts"]) if count]
    assert (edges[0], sum(bars["counts"]), bars["low"], bars["high"]) == (0.5, 4, 0, 3)
    assert edges[1:3] == [2.0, 3.0]


def test_a_tensor_on_its_grid_has_no_noise():
    found = of_tensor(encoding(-3, 4), [0.125, -0.5, 2.0])
    assert found["sqnr_db"] is None
    assert found["clipped"] == 0


def test_a_weight_that_was_put_onto_its_grid_is_compared_with_the_float_network():
    grid = encoding([-1, -2], bits=4, signed=True, axis=0)
    exact, rounded = [[0.6, -0.9], [0.3, 0.1]], [[0.5, -1.0], [0.25, 0.0]]
    found = statistics.of_tensor(
        grid, samples.Sampled("weight", *(np.asarray(v, np.float32) for v in (exact, rounded, rounded)))
    )
    assert found["sqnr_db"] == statistics.sqnr_db(np.float32(exact), np.float32(rounded)) is not None
    assert "network_sqnr_db" not in found


def test_free_scales_lose_no_more_than_powers_of_two():
    rng = np.random.default_rng(0)
    grid = Encoding(np.full(8, 0.125, np.float32), np.zeros(8, np.int64), IntGrid((4,) * 8, True), 0)
    found = of_tensor(grid, rng.standard_normal((8, 500)) * 0.3, "weight")
    assert 0 < found["free_scale_db"] - found["power_of_2_db"] < 6.1
    assert found["power_of_2_db"] >= found["sqnr_db"] - 0.5


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
def test_a_histogram_counts_everything_in_few_bins(values):
    found = statistics.histogram(np.asarray(values), -128, 127)
    assert sum(found["counts"]) == len(values)
    assert len(found["counts"]) <= 2 * statistics.BINS
    assert math.log2(found["width"]).is_integer()
    drawn = histograms.draw("t", TENSOR | {"histogram": found}, {"words": "", "scale": 0.5, "bitwidth": 8})
    assert bool(drawn.outside) == any(not -128.5 <= v <= 127.5 for v in values) or found["width"] > 1


def test_values_that_saturate_are_drawn_apart():
    drawn = histograms.draw("t", STATISTICS["tensors"]["relu1.output"], {"words": "w", "scale": 0.5, "bitwidth": 4})
    assert drawn.outside.count("M") == 1
    assert drawn.inside.count("M") == 7 - 1
    assert [text for *_, text in drawn.labels] == ["\u22124", "0", "3.5"]
    assert drawn.words == "w · 4 bits · 0.5 % clipped"


def test_the_simulation_is_sampled_beside_the_float_network():
    torch.manual_seed(0)
    model, data = models.digits_cnn().eval(), torch.rand(40, 1, 8, 8)
    sim = simulate(model, data[:1])
    sim.calibrate([data])
    found, count = samples.sample(sim, [data[:24], data[24:]], seed=0)
    assert count == samples.SAMPLES
    assert found.keys() == {site.name for site in sim.sites if site.role != "bias"}
    x, logits = found["x"], found["fc.output"]
    assert len(x.exact) == samples.SAMPLES * 64
    assert np.array_equal(x.exact, data[: samples.SAMPLES].flatten().numpy())
    assert np.array_equal(x.quantized, sim.encodings()["x"].fake_quantize(x.exact))
    assert np.allclose(logits.exact, model(data[: samples.SAMPLES]).detach().flatten(), atol=1e-5)
    assert np.array_equal(logits.quantized, sim.model(data[: samples.SAMPLES]).detach().flatten().numpy())
    weight = found["conv1.weight"]
    assert weight.exact.shape == model.conv1.weight.shape
    assert np.array_equal(weight.quantized, sim.encodings()["conv1.weight"].fake_quantize(weight.entering))


def test_a_channel_that_does_not_vary_any_more_is_named():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU()).eval(), torch.rand(16, 1, 4, 4)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 1e-4, 0.0]).reshape(3, 1, 1, 1))
        model[0].bias.copy_(torch.tensor([0.0, 0.25, 0.5]))
    sim = simulate(model, data)
    sim.calibrate([data])
    found, _ = samples.sample(sim, [data], seed=0)
    assert found["1.output"].dead == (1,)
    tensor = statistics.of_tensor(sim.encodings()["1.output"], found["1.output"])
    text = Page(render(REPORT, STATISTICS | {"tensors": STATISTICS["tensors"] | {"1.output": tensor}}))
    assert text.tables["Dead channels"][1:] == [["1.output", "1"]]


def test_a_large_tensor_is_sampled_at_the_same_places(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "ELEMENTS", 320)
    sim = simulate(models.digits_cnn().eval(), torch.rand(1, 1, 8, 8))
    data = torch.rand(40, 1, 8, 8)
    sim.calibrate([data])
    found, count = samples.sample(sim, [data], seed=1)
    assert count == samples.SAMPLES
    assert len(found["x"].exact) == 320
    assert np.array_equal(found["x"].entering, found["x"].exact)


def residual() -> Graph:
    g = Graph()
    g.input("x", [2, 4, 4], encoding(-4))
    g.layer("Conv", "conv", "x", np.ones((2, 2, 3, 3)), grid=None, pads=[1, 1, 1, 1], strides=[1, 1])
    g.node("Relu", "relu", ["conv.output"], encoding(-3))
    g.layer("Conv", "down", "relu.output", np.ones((2, 1, 1, 1)), grid=encoding(-2), group=2, strides=[2, 2])
    g.layer("Conv", "side", "relu.output", np.ones((4, 2, 1, 1)), grid=encoding(-2), strides=[2, 2])
    g.node("Concat", "both", ["down.output", "side.output"], encoding(-2), axis=1)
    return g


def test_the_network_is_described_in_boxes():
    boxes = network.describe(residual().artifact("both.output"))
    assert [(b["name"], b["op"], b["reads"], b["writes"]) for b in boxes] == [
        ("x", "input", [], "x"),
        ("conv", "Conv + Relu", ["x"], "relu.output"),
        ("down", "Conv", ["relu.output"], "down.output"),
        ("side", "Conv", ["relu.output"], "side.output"),
        ("both", "Concat", ["down.output", "side.output"], "both.output"),
    ]
    assert boxes[1]["nodes"] == ["conv", "relu"]
    assert boxes[2]["detail"].endswith(", 2 → 2, depthwise, stride 2")
    assert boxes[3]["weight"] == "side.weight"


def test_the_graph_draws_every_tensor_that_is_read():
    boxes = network.describe(residual().artifact("both.output"))
    (strip,) = graph.draw(boxes, {b["writes"]: f"k{i}" for i, b in enumerate(boxes)}, {})
    assert [box.label for box in strip.boxes] == ["k0", "k1", None, "k3", None]
    assert [[label for *_, label in lane.enters] for lane in strip.lanes] == [["k1"], ["k2"]]
    assert strip.lanes[0].colour != strip.lanes[1].colour, "they overlap, so each has its own lane"


def test_a_dense_network_of_150_layers_is_a_column_of_strips():
    boxes = [
        {"name": f"b{i}", "op": "Concat", "nodes": [], "reads": [f"t{j}" for j in range(i)], "writes": f"t{i}"}
        | {"weight": None, "detail": ""}
        for i in range(150)
    ]
    strips = graph.draw(boxes, {}, {})
    names = [box.name for i, strip in enumerate(strips) for box in strip.boxes[i > 0 :]]
    assert names == [f"b{i}" for i in range(150)]
    for strip, following in pairwise(strips):
        assert 0 <= strip.y + strip.height - following.y <= 2, "strips under each other are one column"


def test_latency_is_measured_in_turn_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N, 4] x) => (float[N, 4] y) {y = Relu(x)}'
    )
    onnx.save(model, tmp_path / "m.onnx")
    files = {"float": tmp_path / "m.onnx", "quantized": tmp_path / "m.onnx"}
    found = latency.measure(files, [np.zeros((1, 4), np.float32)])
    assert found["calls"] == latency.CALLS[-1]
    assert 0 < found["float"] < 0.1
    assert found["shape"] == [1, 4]
    monkeypatch.setattr(latency, "BUDGET", 0.0)
    assert latency.measure(files, [np.zeros((1, 4), np.float32)])["calls"] == latency.CALLS[0]


# Several runs


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
