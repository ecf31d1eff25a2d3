"""Targets: which runtimes give the bits of their simulation, what a target's rules cost, and the pages that show it.

    python benchmarks/targets.py --title "ResNet-20, CIFAR-10" --network models.py:cifar10_resnet20
        --weights resnet20.safetensors --data cifar10 --data-path DIR [--targets litert tract …] [--test-batches 16]
        [--bits 8:16]
    python benchmarks/targets.py    # only writes the pages again

Every target is quantized for as `pow2quant ptq --target` does it, and its executors run on the test images. A row
goes to `--rows` as soon as it is measured; rows that are there are not measured again. Networks, weights and data are
your own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from methods import add_network, network_values, widths
from zoo import commit

from pow2quant import targets
from pow2quant.adapters import onnx_qdq
from pow2quant.backends import fitting
from pow2quant.backends.base import SILENT, Simulation, inputs
from pow2quant.config import RunConfig, with_values
from pow2quant.errors import MissingExtraError, Pow2QuantError
from pow2quant.integer.certificate import certify
from pow2quant.plugins import resolve
from pow2quant.report.document import environment
from pow2quant.runs.executors import SIMULATION, Arrays, compared, executors, runner
from pow2quant.runs.job import Job
from pow2quant.runs.scores import FLOAT, Scores
from pow2quant.runs.writing import quantized, start
from pow2quant.validation.agreement import Executor

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- rows: written by benchmarks/targets.py -->\n", "<!-- end of rows -->"
"""Around the summary on one page, and around all rows on the other."""
OWN = ("integer engine", "generated C")
COLUMNS = (
    "target",
    "float",
    "accuracy",
    "SQNR dB",
    "forwards",
    "file",
    "executors",
    "ms",
    "images",
    "differing",
    "claim",
    "commit",
)
RUNTIMES = (
    "ai-edge-litert",
    "tflite-micro",
    "openvino",
    "tract",
    "onnxruntime",
    "executorch",
    "hls4ml",
    "esp-ppq",
    "qonnx",
)


@dataclass(frozen=True)
class Run:
    """An executor against the simulation of the target: output elements, and how many differ.

    milliseconds: an image takes, in its fastest batch; 0 where that was not measured.
    """

    executor: str
    images: int
    elements: int
    differing: int
    claim: str
    milliseconds: float = 0.0


@dataclass(frozen=True)
class Row:
    """A network for a target. widths: of weights and activations.

    float_accuracy, accuracy: the task's leading metric in per cent, of the float network and the simulation. sqnr_db:
    of the logits. runs: of the executors that are there; absent: why others are not. bytes: of the file that the
    runtime reads. seconds: of all. machine: with the versions of the runtimes. cost: processor time of the simulation's
    forward, in forwards of the float network. commit: of this repository.
    """

    network: str
    target: str
    images: int
    float_accuracy: float
    accuracy: float
    sqnr_db: float
    runs: tuple[Run, ...]
    absent: dict[str, str]
    bytes: int
    seconds: int
    machine: str
    widths: str = "8:8"
    cost: float = 0.0
    commit: str = ""


def measure(title: str, bits: str, config: RunConfig, limit: int | None, slow: int) -> Row:
    """Quantizes for the configuration's target and runs its executors; the project's own ones on `slow` images."""
    started = time.monotonic()
    target = targets.load(config.target)
    job, sim, _ = quantized(start(config, SILENT))
    fitting.require(sim.placement, sim.encodings())
    artifact = sim.export(job.example)
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = onnx_qdq.export_qdq(artifact, Path(folder))
        found = executors(file, None, left_out, target)
        fastest: dict[str, float] = {}
        found = [timed(replace(e, most=slow) if e.name in OWN else e, fastest) for e in found]
        scores = Scores(job.task, (FLOAT, f"custom {SIMULATION}"), limit, job.sample(limit).total)
        agreements = compared(job, sim, artifact, certify(artifact), found, limit, scores)
        _once_more(job, found)
        size = _size(artifact, target, Path(folder))
    simulated = f"custom {SIMULATION}"
    classes = agreements[0].elements // (
        scores.samples if agreements[0].executor not in OWN else min(slow, scores.samples)
    )
    float_accuracy, accuracy = (scores.value(name, job.task.metrics[0]) or 0.0 for name in (FLOAT, simulated))
    return Row(
        network=title,
        target=target.name,
        images=scores.samples,
        float_accuracy=float_accuracy,
        accuracy=accuracy,
        sqnr_db=scores.noise.value() or 0.0,
        runs=tuple(
            Run(a.executor, a.elements // classes, a.elements, a.differing, a.claim, fastest[a.executor])
            for a in agreements
        ),
        absent=left_out,
        bytes=size,
        seconds=round(time.monotonic() - started),
        machine=_machine(),
        widths=bits,
        cost=_cost(job, sim),
        commit=commit(),
    )


def timed(executor: Executor, fastest: dict[str, float]) -> Executor:
    """The executor, which notes under its name the milliseconds that an image took in its fastest batch."""

    def run(batch: Arrays) -> Arrays:
        started = time.perf_counter()
        found = executor.run(batch)
        taken = 1000 * (time.perf_counter() - started) / len(batch[0])
        fastest[executor.name] = round(min(taken, fastest.get(executor.name, taken)), 3)
        return found

    return replace(executor, run=run)


def _once_more(job: Job, executors: Iterable[Executor]) -> None:
    """Runs a batch again, for executors that compile in their first one and ran no other."""
    batch = [x.numpy() for x in inputs(next(iter(job.test(1)))[0])]
    for executor in executors:
        executor.run([x[: executor.most] for x in batch])


def _cost(job: Job, sim: Simulation) -> float:
    """Processor time of the simulation on a batch, in forwards of the float network; the median of five, in turn."""
    batch = [x.numpy() for x in inputs(next(iter(job.test(1)))[0])]
    networks = [runner(network, job.device) for network in (job.model, sim.model)]
    taken: list[list[float]] = [[], []]
    for _ in range(5):
        for run, seconds in zip(networks, taken, strict=True):
            started = time.process_time()
            run(batch)
            seconds.append(time.process_time() - started)
    return round(median(taken[1]) / median(taken[0]), 2)


def _size(artifact: Any, target: targets.Target, folder: Path) -> int:
    """Bytes of the file that the target's first format writes."""
    try:
        written = resolve("exporters", target.formats[0])(artifact, folder / "export")
    except MissingExtraError:
        return 0
    files = [written] if written.is_file() else [p for p in written.iterdir() if p.suffix in (".tflite", ".h", ".c")]
    return sum(path.stat().st_size for path in files)


def _machine() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in RUNTIMES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{environment(1)['processor']}; {', '.join(found)}"


def load(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return [Row(**{**entry, "runs": tuple(Run(**run) for run in entry["runs"])}) for entry in entries]


def save(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows, an entry each."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def summary(rows: Iterable[Row]) -> str:
    """A line for every target, a column for every network: of several rows the one with most images."""
    rows = [row for row in rows if row.widths == "8:8"]
    networks = list(dict.fromkeys(_short(row) for row in rows))
    lines = [f"| target | run in | {' | '.join(networks)} |", "|---" * (2 + len(networks)) + "|"]
    for target in dict.fromkeys(row.target for row in rows):
        own = [row for row in rows if row.target == target]
        names = dict.fromkeys(run.executor for row in own for run in row.runs)
        named = [name for name in names if not name.startswith(("onnxruntime,", *OWN))] or ["onnxruntime, engine, C"]
        cells = []
        for network in networks:
            found = [row for row in own if _short(row) == network]
            cells.append(_cell(max(found, key=lambda row: row.images), rows) if found else "")
        lines.append(f"| `{target}` | {', '.join(named)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _short(row: Row) -> str:
    return row.network.partition(",")[0]


def _cell(row: Row, rows: Iterable[Row]) -> str:
    """Differing elements, images, accuracy, and what the target's rules cost beside the default target."""
    same = (r for r in rows if (r.network, r.images, r.target) == (row.network, row.images, targets.DEFAULT.name))
    cost = next((f" ({row.accuracy - r.accuracy:+.2f})" for r in same if r is not row), "")
    return f"{sum(run.differing for run in row.runs):,} in {row.images:,}; {row.accuracy:.2f} %{cost}"


def rendered(rows: Iterable[Row]) -> str:
    """A table for every network, its targets in the order in which they were measured."""
    rows = list(rows)
    found = []
    for name in dict.fromkeys(row.network for row in rows):
        own = [row for row in rows if row.network == name]
        found.append(
            f"### {name}\n\n"
            f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
            + "\n".join(line for row in own for line in _lines(row))
        )
    machines = dict.fromkeys(part for row in rows for part in row.machine.replace(";", ",").split(", "))
    return "\n\n".join([*found, f"Measured on: {', '.join(machines) or 'nothing yet'}."]) + "\n"


def _lines(row: Row) -> list[str]:
    """A line for the executors of one outcome."""
    lines = []
    weight, _, activation = row.widths.partition(":")
    head = [
        f"`{row.target}`" + f", W{weight}A{activation}" * (row.widths != "8:8"),
        f"{row.float_accuracy:.2f} %",
        f"{row.accuracy:.2f} %",
        f"{row.sqnr_db:.1f}",
        f"{row.cost:.1f}" if row.cost else "",
        f"{row.bytes:,}" if row.bytes else "",
    ]
    for key in dict.fromkeys(_outcome(run) for run in row.runs):
        names = ", ".join(run.executor for run in row.runs if _outcome(run) == key)
        images, elements, differing, claim = key
        times = [run.milliseconds for run in row.runs if _outcome(run) == key]
        cells = [
            *(head if not lines else [""] * len(head)),
            names,
            ", ".join(f"{each:.3g}" for each in times if each),
            f"{images:,}",
            f"{differing:,} of {elements:,}",
            claim.partition(" on ")[0],
            "" if lines else row.commit,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + [f"| | | | | | | {name} | | | *absent* | | |" for name in row.absent]


def _outcome(run: Run) -> tuple[int, int, int, str]:
    return run.images, run.elements, run.differing, run.claim


def put(page: Path, tables: str) -> str:
    """The page with its tables written anew."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + tables + "\n" + END + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network(parser)
    parser.set_defaults(data="digits")
    parser.add_argument("--slow-images", type=int, default=64, help="so many for the integer engine and C")
    parser.add_argument("--targets", nargs="+", default=list(targets.presets()), metavar="TARGET")
    parser.add_argument("--bits", nargs="+", default=["8:8"], metavar="W:A")
    parser.add_argument("--rows", type=Path, default=DOCS / "targets.json")
    parser.add_argument("--page", type=Path, default=DOCS / "targets.md")
    parser.add_argument("--details", type=Path, default=DOCS / "targets-measured.md")
    options = parser.parse_args()
    for name, bits in product(options.targets, options.bits) if options.network else ():
        title = options.title or options.network.rpartition(":")[2]
        if any((row.network, row.target, row.widths) == (title, Path(name).stem, bits) for row in load(options.rows)):
            continue
        weight, activation = widths(bits)
        plan = {"weight": weight, "output": activation, "input": max(8, activation or 8)}
        try:
            widened = {f"quantization.{role}.bitwidth": width for role, width in plan.items()}
            config = with_values(RunConfig(), {"target": name, **widened, **network_values(options)})
            row = measure(title, bits, config, options.test_batches, options.slow_images)
        except Pow2QuantError as error:
            print(f"{title}, {name}, {bits}: {error}", flush=True)
            continue
        print(
            f"{title}, {name}, {bits}: {row.accuracy:.2f} %, {[(r.executor, r.differing) for r in row.runs]}",
            flush=True,
        )
        save(options.rows, [*load(options.rows), row])
    for page, tables in ((options.page, summary), (options.details, rendered)):
        if page.exists():
            page.write_text(put(page, tables(load(options.rows))), encoding="utf-8")


if __name__ == "__main__":
    main()
