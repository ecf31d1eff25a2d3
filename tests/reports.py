"""A report and its page, as tests of pages take them."""

from html.parser import HTMLParser
from typing import Any

from pow2quant.report.html import render

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
