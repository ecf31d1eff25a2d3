"""`auto` beside chains by hand and beside other quantizers: the same network, calibration images and test images.

    python benchmarks/peers/compare.py --title "keyword spotting" --network benchmarks/kinds.py:keywords
        --data benchmarks/kinds.py:keywords_data [--metric …] [--input pixels] [--widths 8:8 4:8]
        [--tools auto hand mct brevitas esp-ppq onnxruntime aimet]
    python benchmarks/peers/compare.py    # only writes the page again

`auto` chooses on calibration images alone. `hand` is what no user can have: of all chains of HAND the one whose outputs
are closest to float on the test images. Tools get the float network, with their defaults. Their pins clash: give each
an environment of its own, beside which this project's packages are on the path; a tool that is absent is said to be
absent. Only simulations run, over the whole test set. Rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))
from chains import written
from methods import DOCS, add_network, network_values, widths, write
from vendors import FLOAT_ONLY, Given, float_model

from peers.tools import TOOLS, NotOfferedError
from pow2quant.backends.base import SILENT, inputs
from pow2quant.config import RunConfig, with_values
from pow2quant.methods.auto import LEAD, Chain, Trial
from pow2quant.runs import choosing
from pow2quant.runs.job import Job
from pow2quant.tasks.judging import leading

BEGIN, END = "<!-- peers: written by benchmarks/peers/compare.py -->\n", "<!-- end of peers -->"

HAND = (
    "bias_correction",
    "align: {rounds: 1}, bias_correction",
    "align: {rounds: 1}, output_mse",
    "equalize, output_mse, bias_correction",
    "gptq, bias_correction",
    "align: {rounds: 1}, gptq, bias_correction",
    "align: {rounds: 1}, output_mse, adaround: {iterations: 400}",
)


@dataclass(frozen=True)
class Row:
    """A network by a tool. tool: with its version; chain: of this project's own rows. sqnr_db: of the outputs.

    behind, error: how many dB `hand` is ahead of `auto`, and two standard errors of that; null elsewhere. reason: why a
    tool has no result; the figures are null then.
    """

    network: str
    widths: str
    tool: str
    chain: str | None
    images: int
    calibration: int
    metric: str
    float_value: float
    value: float | None
    sqnr_db: float | None
    behind: float | None
    error: float | None
    date: str
    reason: str | None = None


class Bench:
    """A network at a width, and how results are judged."""

    def __init__(self, title: str, values: dict[str, object], bits: str) -> None:
        weight, activation = widths(bits)
        wide = {"quantization.weight.bitwidth": weight, "quantization.output.bitwidth": activation}
        self.title, self.bits, self.weight = title, bits, weight
        self.config = with_values(RunConfig(), values | wide)
        self.float_config = with_values(RunConfig(), values | FLOAT_ONLY)
        self.job = Job.start(self.config, SILENT)
        self.metric = leading(self.job.task)
        self.test = [batch for batch, _ in self.job.data.test]
        self.noises: dict[str, Trial] = {}

    def row(self, tool: str, model: nn.Module, chain: str | None = None) -> Row:
        """What a tool's network is worth on the test images."""
        noise = choosing.noise(model, self.job.model, self.test, torch.device("cpu"))
        self.noises[tool] = Trial((), noise, 0.0)
        behind = error = None
        if tool == "auto" and "hand" in self.noises:
            behind, error = self.noises["hand"].gain_over(self.noises["auto"])
        return Row(
            self.title,
            self.bits,
            tool,
            chain,
            len(noise),
            sum(len(inputs(batch)[0]) for batch in self.job.calibration()),
            self.metric.name,
            round(self.job.score(self.job.model), 3),
            round(self.job.score(model), 3),
            round(self.noises[tool].sqnr_db, 2),
            None if behind is None else round(behind, 2),
            None if error is None else round(LEAD * error, 2),
            date.today().isoformat(),
        )

    def auto(self) -> Row:
        """The chain that is chosen on calibration images."""
        torch.manual_seed(0)
        job = choosing.decided(
            Job.start(with_values(self.config, {"ptq.methods": [{"auto": {"minutes": 60}}]}), SILENT)
        )
        return self.row("auto", job.quantized().model, written(job.config.ptq.methods or ()))

    def hand(self) -> Row:
        """The best of HAND on the test images."""
        rows, trials = [], []
        for chain in HAND:
            torch.manual_seed(0)
            methods: Chain = with_values(RunConfig(), {"ptq.methods": listed(chain)}).ptq.methods or ()
            rows.append(self.row("hand", choosing.with_methods(self.job, methods).quantized().model, chain))
            trials.append(self.noises["hand"])
            print(f"{self.title}, {self.bits}, {chain}: {rows[-1].sqnr_db} dB", flush=True)
        first = int(np.argmax([trial.sqnr_db for trial in trials]))
        self.noises["hand"] = trials[first]
        return rows[first]

    def other(self, name: str) -> Row:
        """What another quantizer makes of the float network, or why it makes nothing. Raises ImportError without it."""
        quantize, package = TOOLS[name]
        job = Job.start(self.float_config, SILENT)
        images = np.concatenate([x.numpy() for batch in job.calibration() for x in inputs(batch)])
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            float_model(job, Path(folder, "model.onnx"))
            try:
                run = quantize(Given(copy.deepcopy(job.model), Path(folder, "model.onnx"), images), self.weight)
                row = self.row(name, Called(run))
            except ImportError:
                raise
            except Exception as error:  # whatever a tool does not take
                why = str(error) if isinstance(error, NotOfferedError) else f"fails: {type(error).__name__}"
                print(f"{name}: {error}", flush=True)
                row = replace(self.row(name, job.model), value=None, sqnr_db=None, reason=why)
        return replace(row, tool=f"{package} {version(package)}")


class Called(nn.Module):
    """A function of arrays as a network."""

    def __init__(self, run: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.run(x.numpy())))


def listed(chain: str) -> object:
    """A chain as under `ptq.methods`."""
    import yaml

    return yaml.safe_load(f"[{chain}]")


def rendered(rows: Sequence[Row]) -> str:
    """A table for every network and width, the closest to float first."""
    lines = []
    for network, bits in dict.fromkeys((row.network, row.widths) for row in rows):
        own = [r for r in rows if (r.network, r.widths) == (network, bits)]
        own.sort(key=lambda r: -math.inf if r.sqnr_db is None else r.sqnr_db, reverse=True)
        weight, activation = bits.split(":")
        lines += [
            f"### {network}, W{weight}A{activation}\n",
            f"Float: {own[0].metric} {own[0].float_value:.2f} on {own[0].images:,} test samples; "
            f"{own[0].calibration:,} to calibrate.\n",
            f"| | {own[0].metric} | SQNR dB | date |\n|---|---|---|---|",
            *(f"| {_name(row)} | {_figures(row)} | {row.date} |" for row in own),
            "",
        ]
    return "\n".join(lines)


def _name(row: Row) -> str:
    names = {"auto": "**`auto`**", "hand": f"best of {len(HAND)} chains by hand"}
    return names.get(row.tool, row.tool) + (f": `{row.chain}`" if row.chain else "")


def _figures(row: Row) -> str:
    if row.value is None:
        return f"{row.reason} |"
    behind = "" if row.behind is None else f" (by hand {row.behind:+.2f} ± {row.error:.2f})"
    return f"{row.value:.2f} | {row.sqnr_db:.1f}{behind}"


def load(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def put(page: Path, rows: Sequence[Row]) -> str:
    """The page with its tables written anew."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{rendered(rows)}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network(parser)
    parser.add_argument("--metric")
    parser.add_argument("--input", choices=["float", "pixels"])
    parser.add_argument("--per-tensor", action="store_true")
    parser.add_argument("--widths", nargs="+", default=["8:8", "4:8"], metavar="W:A")
    parser.add_argument("--tools", nargs="+", default=["hand", "auto", *TOOLS], choices=["hand", "auto", *TOOLS])
    parser.add_argument("--rows", type=Path, default=DOCS / "peers.json")
    parser.add_argument("--page", type=Path, default=DOCS / "peers.md")
    options = parser.parse_args()
    rows = load(options.rows)
    more = {"metric": options.metric, "data.input": options.input}
    values = network_values(options) | {key: value for key, value in more.items() if value}
    values |= {"quantization.weight.per_channel": False} if options.per_tensor else {}
    for bits in options.widths if options.network else ():
        bench = Bench(options.title, values, bits)
        for tool in options.tools:
            if any((r.network, r.widths) == (options.title, bits) and r.tool.startswith(known(tool)) for r in rows):
                continue
            try:
                rows.append(bench.other(tool) if tool in TOOLS else getattr(bench, tool)())
            except ImportError as error:
                print(f"{options.title}, {bits}, {tool}: absent ({error})", flush=True)
                continue
            print(rows[-1], flush=True)
            write(options.rows, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.page.exists():
        write(options.page, put(options.page, rows))


def known(tool: str) -> str:
    """How a tool's rows begin."""
    return TOOLS[tool][1] + " " if tool in TOOLS else tool


if __name__ == "__main__":
    main()
