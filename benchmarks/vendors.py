"""The quantizers of vendors beside this one: the same networks, calibration images and test images.

    python benchmarks/vendors.py --title digits --network digits-cnn --data digits [--vendors litert openvino …]
    python benchmarks/vendors.py    # only writes the page again

Every vendor's tool is given the float network and its defaults for int8; the network that it makes runs where the tool
runs it. A row goes to `--rows` as soon as it is measured; rows that are there are not measured again. The tools' pins
clash, so each is run in an environment of its own: a vendor whose packages are absent is said to be absent. The rows of
this project are those of `benchmarks/targets.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import targets
import torch
from methods import add_network, network_values
from numpy.typing import NDArray
from torch import nn

from pow2quant.backends.base import SILENT, inputs
from pow2quant.config import RunConfig, with_values
from pow2quant.runs.executors import runner
from pow2quant.runs.job import Job
from pow2quant.runs.scores import FLOAT, Scores
from pow2quant.validation.agreement import Executor

Array = NDArray[np.float32]
Run = Callable[[Array], Array]
"""Images (N, …) -> outputs."""

BEGIN, END = "<!-- vendors: written by benchmarks/vendors.py -->\n", "<!-- end of vendors -->"
HEAD = (
    "| network | images | float | vendor's quantizer | accuracy | dB | `--target` | accuracy | dB |\n"
    + "|---" * 9
    + "|"
)


FLOAT_ONLY = {f"quantization.{role}": None for role in ("weight", "output", "input", "bias")}


@dataclass(frozen=True)
class Given:
    """What every vendor's tool gets. model: the network as ONNX. images: (N, …), to calibrate with."""

    network: nn.Module
    model: Path
    images: Array

    @property
    def each(self) -> list[Array]:
        """Image by image, (1, …)."""
        return [self.images[i : i + 1] for i in range(len(self.images))]


@dataclass(frozen=True)
class Row:
    """A network by a vendor's quantizer. tool: with its version. accuracies: in per cent. sqnr_db: of the outputs."""

    network: str
    vendor: str
    tool: str
    images: int
    calibration: int
    float_accuracy: float
    accuracy: float
    sqnr_db: float
    date: str


def onnxruntime(given: Given) -> Run:
    """quantize_static: QDQ, weights per channel, activations of 8 bits without sign."""
    from onnxruntime.quantization import quantize_static

    file = given.model.with_name("quantized.onnx")
    quantize_static(given.model, file, reader(given), per_channel=True)
    return session_of(file)


def amd_quark(given: Given) -> Run:
    """The configuration XINT8: scales of 2^k."""
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config import Config, get_default_config

    file = given.model.with_name("quantized.onnx")
    tool = ModelQuantizer(Config(global_quant_config=get_default_config("XINT8")))
    here = Path.cwd()
    os.chdir(file.parent)  # it writes a report where it stands
    try:
        tool.quantize_model(str(given.model), str(file), reader(given))
    finally:
        os.chdir(here)
    return session_of(file)


def openvino(given: Given) -> Run:
    """NNCF with its default preset."""
    import nncf
    import openvino as ov

    core = ov.Core()
    dataset = nncf.Dataset(given.each)
    network = nncf.quantize(core.read_model(given.model), dataset, subset_size=len(given.images))
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return _by_image(lambda image: compiled(image)[0])


def litert(given: Given) -> Run:
    """litert-torch, then ai-edge-quantizer's static recipe of 8 bits."""
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    file = given.model.with_name("float.tflite")
    litert_torch.convert(given.network, (torch.from_numpy(given.each[0]),)).export(str(file))
    tool = quantizer.Quantizer(str(file), recipe.static_wi8_ai8())
    (signature,) = Interpreter(str(file)).get_signature_list()
    seen = tool.calibrate({signature: [{"args_0": image} for image in given.each]})
    tool.quantize(seen).export_model(str(file.with_name("int8.tflite")), overwrite=True)
    interpreter = Interpreter(str(file.with_name("int8.tflite")))
    interpreter.allocate_tensors()
    (first,), (last,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(image: Array) -> Array:
        scale, zero = first["quantization"]
        codes = np.clip(np.rint(image / np.float32(scale)) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(first["index"], codes)
        interpreter.invoke()
        scale, zero = last["quantization"]
        return np.float32(scale) * (interpreter.get_tensor(last["index"]).astype(np.float32) - zero)

    return _by_image(run)


def executorch(given: Given) -> Run:
    """The XNNPACK quantizer with symmetric weights per channel; the program that is then lowered, run by torch."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    images = [torch.from_numpy(image) for image in given.each]
    tool = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(given.network, (images[0],)).module(), tool)
    for image in images:
        prepared(image)
    converted = convert_pt2e(prepared)
    return _by_image(lambda image: converted(torch.from_numpy(image)).detach().numpy())


def esp_ppq(given: Given) -> Run:
    """Its setting for ESP-DL on the ESP32-P4: scales of 2^k."""
    from esp_ppq import api
    from esp_ppq.api.setting import QuantizationSettingFactory
    from esp_ppq.executor import TorchExecutor

    images = [torch.from_numpy(image) for image in given.each]
    graph = api.quantize_onnx_model(
        str(given.model),
        images,
        len(images),
        list(images[0].shape),
        api.get_target_platform("esp32p4", "w8a8"),
        setting=QuantizationSettingFactory.espdl_setting(),
        device="cpu",
    )
    executor = TorchExecutor(graph, device="cpu")
    return lambda batch: executor.forward(torch.from_numpy(batch))[0].numpy()


VENDORS: dict[str, tuple[Callable[[Given], Run], str, str]] = {
    "litert": (litert, "ai-edge-quantizer", "litert"),
    "openvino": (openvino, "nncf", "openvino"),
    "onnxruntime": (onnxruntime, "onnxruntime", "onnxruntime"),
    "executorch": (executorch, "executorch", "executorch"),
    "esp-ppq": (esp_ppq, "esp-ppq", "esp32-p4"),
    "amd-quark": (amd_quark, "amd-quark", "amd-xint8"),
}
"""By name: the function, the package that quantizes, and the target of this project beside it."""


def reader(given: Given) -> Any:
    """The images as onnxruntime's quantizer reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    name = onnx.load(given.model, load_external_data=False).graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        rest = iter(given.each)

        def get_next(self) -> dict[str, Array] | None:
            return next(({name: image} for image in self.rest), None)

    return Reader()


def session_of(file: Path) -> Run:
    import onnxruntime as ort

    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    first = session.get_inputs()[0]
    return lambda batch: session.run(None, {first.name: batch})[0]


def _by_image(run: Callable[[Array], Array]) -> Run:
    return lambda batch: np.concatenate([run(batch[i : i + 1]) for i in range(len(batch))])


def float_model(job: Job, file: Path) -> None:
    """The float network as ONNX, batch norms folded, for one image."""
    sim = job.simulate()
    onnx.save(sim.export(job.example).model, file)


def measure(title: str, vendor: str, config: RunConfig, limit: int | None) -> Row:
    """Quantizes by a vendor's tool with the images that a run calibrates with, and judges it on the test images."""
    quantize, package, _ = VENDORS[vendor]
    job = Job.start(config, SILENT)
    images = np.concatenate([x.numpy() for batch in job.calibration() for x in inputs(batch)])
    with tempfile.TemporaryDirectory() as folder:
        float_model(job, Path(folder, "model.onnx"))
        with contextlib.redirect_stdout(io.StringIO()):  # they talk
            run = quantize(Given(job.model, Path(folder, "model.onnx"), images))
            scores = Scores(job.task, limit=limit, total=job.sample(limit).total)
            executor = scores.watch(Executor(vendor, lambda x: [run(x[0])], lambda _: {}), noise=True)
            for batch in scores.stream(job.test(limit), runner(job.model, job.device)):
                executor.run(batch)
    float_accuracy, accuracy = (scores.value(name, job.task.metrics[0]) or 0.0 for name in (FLOAT, vendor))
    return Row(
        title,
        vendor,
        f"{package} {version(package)}",
        scores.samples,
        len(images),
        float_accuracy,
        accuracy,
        scores.noise.value() or 0.0,
        date.today().isoformat(),
    )


def rendered(rows: Sequence[Row], own: Sequence[targets.Row]) -> str:
    """A line for every network and vendor, with the row of this project's target where it has the same images."""
    lines = []
    for row in rows:
        target = VENDORS[row.vendor][2]
        same = (r for r in own if (r.network, r.target, r.images) == (row.network, target, row.images))
        mine = next((f"{r.accuracy:.2f} % | {r.sqnr_db:.1f}" for r in same if r.widths == "8:8"), " | ")
        lines.append(
            f"| {row.network} | {row.images:,} | {row.float_accuracy:.2f} % | {row.tool} | {row.accuracy:.2f} % "
            f"| {row.sqnr_db:.1f} | `{target}` | {mine} |"
        )
    return "\n".join([HEAD, *lines, "", f"Measured on {', '.join(sorted({row.date for row in rows}))}."])


def put(page: Path, rows: Sequence[Row]) -> str:
    """The page with its table written anew."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    table = rendered(rows, targets.load(targets.DOCS / "targets.json"))
    return f"{before}{BEGIN}\n{table}\n\n{END}{rest.partition(END)[2]}"


def load(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network(parser)
    parser.set_defaults(data="digits")
    parser.add_argument("--vendors", nargs="+", default=list(VENDORS), choices=VENDORS, metavar="VENDOR")
    parser.add_argument("--rows", type=Path, default=targets.DOCS / "vendors.json")
    parser.add_argument("--page", type=Path, default=targets.DOCS / "targets.md")
    options = parser.parse_args()
    rows = load(options.rows)
    for vendor in options.vendors if options.network else ():
        if any((row.network, row.vendor) == (options.title, vendor) for row in rows):
            continue
        config = with_values(RunConfig(), FLOAT_ONLY | network_values(options))
        try:
            rows.append(measure(options.title, vendor, config, options.test_batches))
        except ImportError as error:
            print(f"{options.title}, {vendor}: absent ({error})", flush=True)
            continue
        print(rows[-1], flush=True)
        options.rows.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if options.page.exists():
        options.page.write_text(put(options.page, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
