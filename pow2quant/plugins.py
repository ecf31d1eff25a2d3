"""What can be chosen by name, and where it lives. Adding one is a file and a row, or an entry point of a package.

Entry point groups: `pow2quant.backends`, `pow2quant.methods`, `pow2quant.exporters`, `pow2quant.validators`,
`pow2quant.tasks`, `pow2quant.models`, `pow2quant.datasets`.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib import import_module
from typing import Any

from pow2quant.errors import ConfigError

TABLES: dict[str, dict[str, str]] = {
    "backends": {
        "custom": "pow2quant.backends.custom:CustomSimulation",
        "aimet": "pow2quant.backends.aimet:AimetSimulation",
    },
    "methods": {
        "equalize": "pow2quant.methods.equalization:Equalize",
        "align": "pow2quant.methods.alignment:Align",
        "migrate": "pow2quant.methods.migration:Migrate",
        "ptf": "pow2quant.methods.ptf:Ptf",
        "log2_attention": "pow2quant.methods.log2_attention:Log2Attention",
        "output_mse": "pow2quant.methods.output_mse:OutputMse",
        "bias_correction": "pow2quant.methods.bias_correction:BiasCorrection",
        "bn_reestimation": "pow2quant.methods.bn_reestimation:BnReestimation",
        "aciq": "pow2quant.methods.aciq:Aciq",
        "lapq": "pow2quant.methods.lapq:Lapq",
        "gpfq": "pow2quant.methods.gpfq:Gpfq",
        "gptq": "pow2quant.methods.gptq:Gptq",
        "adaround": "pow2quant.methods.adaround:AdaRound",
        "qdrop": "pow2quant.methods.qdrop:QDrop",
        "ternary": "pow2quant.methods.ternary:Ternary",
        "auto": "pow2quant.methods.auto:Auto",
    },
    "exporters": {
        "aimet-0.6.1": "pow2quant.adapters.aimet_encodings:export_0_6_1",
        "aimet-1.0.0": "pow2quant.adapters.aimet_encodings:export_1_0_0",
        "aimet-2.0.0": "pow2quant.adapters.aimet_encodings:export_2_0_0",
        "c": "pow2quant.integer.emit_c:export_c",
        "coreml": "pow2quant.runs.coreml:export_coreml",
        "espdl": "pow2quant.runs.espdl:export_espdl",
        "executorch": "pow2quant.runs.executorch:export_executorch",
        "hls4ml": "pow2quant.integer.hls4ml:export_hls4ml",
        "integers": "pow2quant.integer.pack:export_integers",
        "pt2": "pow2quant.runs.pt2:export_pt2",
        "qdq": "pow2quant.adapters.onnx_qdq:export_qdq",
        "qonnx": "pow2quant.adapters.qonnx:export_qonnx",
        "tensorrt": "pow2quant.adapters.tensorrt:export_tensorrt",
        "tflite": "pow2quant.integer.tflite.file:export_tflite",
    },
    "validators": {
        "onnxruntime": "pow2quant.validation.ort:executors",
        "engine": "pow2quant.validation.engine:executors",
        "c": "pow2quant.validation.c99:executors",
        "c-arm": "pow2quant.validation.emulated:arm",
        "c-riscv64": "pow2quant.validation.emulated:riscv64",
        "litert": "pow2quant.validation.litert:executors",
        "tflite-micro": "pow2quant.validation.tflite_micro:executors",
        "onnxruntime-web": "pow2quant.validation.onnxruntime_js:web",
        "onnxruntime-node": "pow2quant.validation.onnxruntime_js:node",
        "tract": "pow2quant.validation.tract:executors",
        "openvino": "pow2quant.validation.openvino:executors",
        "executorch": "pow2quant.runs.executorch:executors",
        "esp-ppq": "pow2quant.runs.esp_ppq:executors",
        "hls4ml": "pow2quant.validation.hls4ml:executors",
        "pt2": "pow2quant.runs.pt2:executors",
        "qonnx": "pow2quant.validation.qonnx:executors",
    },
    "tasks": {
        "classification": "pow2quant.tasks.classification:Classification",
        "multi-label": "pow2quant.tasks.multilabel:MultiLabel",
        "segmentation": "pow2quant.tasks.segmentation:Segmentation",
        "image-to-image": "pow2quant.tasks.images:ImageToImage",
        "regression": "pow2quant.tasks.regression:Regression",
        "detection": "pow2quant.tasks.detection:Detection",
        "none": "pow2quant.tasks.none:Unlabelled",
    },
    "models": {
        "digits-cnn": "pow2quant.models:digits_cnn",
    },
    "datasets": {
        "digits": "pow2quant.datasets.digits:digits",
        "cifar10": "pow2quant.datasets.cifar10:cifar10",
        "mnist": "pow2quant.datasets.mnist:mnist",
        "imagefolder": "pow2quant.datasets.imagefolder:imagefolder",
    },
}


def names(kind: str) -> dict[str, str]:
    """Every name of `kind` and where it lives ("module:attribute"): ours, then those of installed packages."""
    found = dict(TABLES[kind])
    for name, place in _installed(tuple(map(_state, sys.path))).get(kind, ()):
        found.setdefault(name, place)
    return found


@lru_cache(maxsize=1)
def _installed(folders: tuple[tuple[int, ...], ...]) -> dict[str, list[tuple[str, str]]]:
    """What packages in `folders` of `sys.path` add, by kind: 10 ms where many are installed, so once."""
    from importlib.metadata import entry_points  # a tenth of the time of `--help`, which needs none

    points = entry_points()
    return {kind: [(point.name, point.value) for point in points.select(group=f"pow2quant.{kind}")] for kind in TABLES}


def _state(folder: str) -> tuple[int, ...]:
    """Which folder it is, and when it has changed last; empty where there is none."""
    try:
        found = os.stat(folder or os.curdir)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def resolve(kind: str, name: str) -> Any:
    """The object that `name` stands for. Raises ConfigError, with the known names, when there is none."""
    known = names(kind)
    if name not in known:
        raise ConfigError(f"unknown {kind.rstrip('s')} {name!r}; known are: {', '.join(sorted(known)) or 'none'}")
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)
