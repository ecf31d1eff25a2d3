"""Chains of methods at several widths, and the page of the documentation that shows what they found.

    python benchmarks/methods.py --title "ResNet-20, CIFAR-10" --network models.py:cifar10_resnet20
        --weights resnet20.safetensors --data cifar10 --data-path DIR --widths 4:8 4:4 --seeds 0 1 2
        --chains none output_mse,bias_correction "gpfq: {regularizer: L0}, bias_correction"
    python benchmarks/methods.py    # only writes the page again

A chain is a list as under `ptq.methods`, without its brackets, or `a+b`. `4:float` leaves activations float. Every row
goes to `--rows` as soon as it is measured: what the logits of the test images are worth against the float network's.
Rows that are there are not measured again, so a call that was interrupted continues. Only the simulation runs: that its
bits are those of onnxruntime is what `ptq` and `backends.py` show. Networks, weights and data are your own.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby, islice, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from chains import Chains, auto, methods, written
from torch import Tensor, nn

from pow2quant import datasets, models
from pow2quant.backends.base import Simulation
from pow2quant.config import ROLES, DataConfig, QuantizationConfig, QuantPlan, RunConfig, plan_of
from pow2quant.report.document import environment

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- rows: written by benchmarks/methods.py -->\n", "<!-- end of rows -->"


@dataclass(frozen=True)
class Experiment:
    """What decides a row. chain: as on the command line. range: of all but biases. seed: None where
    nothing depends on it. images: how many. block: inputs that share an exponent, None for all of a channel. overrides:
    `quantization.overrides`, in YAML. sums: `quantization.sums`.
    """

    network: str
    weight_bits: int
    activation_bits: int | None
    chain: str
    range: str = "mse"
    per_tensor: bool = False
    power_of_2: bool = True
    backend: str = "custom"
    seed: int | None = 0
    calibration_images: int = 512
    test_images: int = 10_000
    block: int | None = None
    overrides: str | None = None
    sums: int | None = None

    @property
    def table(self) -> str:
        """The heading of the table it stands in."""
        activations = ", activations float" if self.activation_bits is None else f"A{self.activation_bits}"
        rest = ", per tensor" * self.per_tensor + ", free scales" * (not self.power_of_2)
        rest += f", sums of {self.sums} bits" * (self.sums is not None)
        return f"{self.network}: W{self.weight_bits}{activations}{rest}"

    @property
    def line(self) -> tuple[str, str, str, int, int]:
        """What the seeds of one line of a table have in common."""
        return self.chain, self.range, self.backend, self.calibration_images, self.block or 0

    def plan(self) -> QuantPlan:
        free = not self.power_of_2
        made = plan(self.weight_bits, self.activation_bits, self.per_tensor, free, self.range, self.block)
        overrides = yaml.safe_load(self.overrides or "{}")
        roles = {role: getattr(made, role) for role in ROLES}
        quantization = QuantizationConfig(**roles, overrides=overrides, sums=self.sums)
        return plan_of(replace(RunConfig(), quantization=quantization))


@dataclass(frozen=True)
class Row:
    """A measured experiment. accuracy, float_accuracy, difference, zeros (of the weights): per cent.

    interval: half of the 95 % interval of the paired difference. seconds: of the process, for calibration and methods.
    chosen: the chain that `auto` took.
    """

    experiment: Experiment
    accuracy: float
    float_accuracy: float
    difference: float
    interval: float
    sqnr_db: float
    zeros: float
    seconds: float
    machine: str
    chosen: str | None = None


def widths(text: str) -> tuple[int, int | None]:
    """`4:8` is 4-bit weights and 8-bit activations; `4:float` leaves activations float."""
    weight, _, activation = text.partition(":")
    return int(weight), None if activation == "float" else int(activation)


def plan(
    weight: int, activation: int | None, per_tensor: bool, free: bool, range_: str = "mse", block: int | None = None
) -> QuantPlan:
    made = QuantPlan.default(weight, activation or 8, per_tensor)
    roles = {role: getattr(made, role) for role in ("weight", "input", "output", "bias")}
    specs = {role: replace(spec, power_of_2=not free) for role, spec in roles.items()}
    specs |= {role: replace(specs[role], range=range_) for role in ("weight", "input", "output")}
    specs["weight"] = replace(specs["weight"], block=block)
    return QuantPlan(**(specs if activation else {**dict.fromkeys(roles), "weight": specs["weight"]}))


@torch.inference_mode()
def logits(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([model(x.clone()) for x in batches])


@torch.no_grad()
def zeros(sim: Simulation) -> float:
    """The share of weights that are quantized to 0, per cent."""
    table = sim.encodings()
    sites = [layer.weight for layer in sim.placement.layers if layer.weight is not None]
    quantized = [table[site.name].fake_quantize(sim.parameter(site.name).numpy()) for site in sites]
    return 100 * sum(int((w == 0).sum()) for w in quantized) / sum(w.size for w in quantized)


class Bench:
    """A network, its images, and what it makes of them in float."""

    def __init__(self, options: argparse.Namespace) -> None:
        mean_std = {"mean": options.mean, "std": options.std} if options.mean else {}
        data = datasets.load(DataConfig(options.data, options.data_path, options.batch_size, **mean_std))
        self.model = models.build(options.network, weights=options.weights).eval()
        self.calibration = [x for x, _ in islice(data.calibration, options.calibration_batches)]
        self.chains = Chains(self.model, self.calibration)
        self.test, labels = zip(*islice(data.test, options.test_batches), strict=True)
        self.truth, self.expected = torch.cat(labels), logits(self.model, self.test)
        about = environment(torch.get_num_threads())
        self.machine = f"{about['processor']}, {about['threads']} thread(s), torch {about['torch']}"

    def experiments(self, options: argparse.Namespace) -> Iterator[Experiment]:
        images = sum(len(x) for x in self.calibration)
        for bits, chain, seed, block in product(options.widths, options.chains, options.seeds, options.blocks):
            yield Experiment(
                options.title,
                *widths(bits),
                written(methods(chain)),
                options.range,
                options.per_tensor,
                not options.free_scales,
                options.backend,
                seed,
                images,
                len(self.truth),
                block or None,
                options.overrides,
                options.sums,
            )

    def measure(self, experiment: Experiment) -> Row:
        chain, plan = experiment.chain, experiment.plan()
        chooser, chosen, spent = auto(chain), None, 0.0
        if chooser is not None:
            chosen, spent = self.chains.choice(chooser, plan, experiment.backend, experiment.seed or 0)
        sim, seconds, by_chance = self.chains.simulation(chosen or chain, plan, experiment.backend, experiment.seed)
        got = logits(sim.model, self.test)
        hits, own = ((x.argmax(1) == self.truth).double() * 100 for x in (self.expected, got))
        difference = own - hits
        sqnr = 10 * torch.log10(self.expected.square().sum() / (got - self.expected).square().sum())
        interval = 1.96 * difference.std() / len(difference) ** 0.5
        figures = (own.mean(), hits.mean(), difference.mean(), interval)
        rest = (round(sqnr.item(), 2), round(zeros(sim), 1), round(spent + seconds, 1))
        if not by_chance and chooser is None:
            experiment = replace(experiment, seed=None)
        return Row(experiment, *(round(x.item(), 3) for x in figures), *rest, self.machine, chosen)


def load(path: Path) -> list[Row]:
    """Rows, a JSON object on every line of the file's list."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    names = {f.name for f in fields(Experiment)}
    return [
        Row(Experiment(**{k: v for k, v in x.items() if k in names}), **{k: v for k, v in x.items() if k not in names})
        for x in found
    ]


def save(path: Path, rows: Iterable[Row]) -> None:
    lines = []
    for row in rows:
        measured = asdict(row)
        lines.append(json.dumps(measured.pop("experiment") | measured))
    write(path, "[\n" + ",\n".join(lines) + "\n]\n")


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def rendered(rows: Iterable[Row]) -> str:
    """A table for every network and width, in the order in which they were first measured; the least accurate first."""
    rows = list(rows)
    found = []
    for name in dict.fromkeys(row.experiment.table for row in rows):
        own = [row for row in rows if row.experiment.table == name]
        first, images = own[0], own[0].experiment.calibration_images
        sparse = any("regularizer" in row.experiment.chain for row in own)
        lines = [list(same) for _, same in groupby(sorted(own, key=by_line), by_line)]
        lines.sort(key=lambda same: mean(row.accuracy for row in same))
        found.append(
            f"## {name}\n\nFloat: {first.float_accuracy:.2f} % of {first.experiment.test_images:,} images. "
            f"Calibration: {images:,} images.\n\n"
            f"| methods | seeds | accuracy | difference | SQNR dB |{' zeros |' * sparse} seconds |\n"
            f"|---|---|---|---|---|{'---|' * sparse}---|\n" + "\n".join(_line(same, images, sparse) for same in lines)
        )
    machines = dict.fromkeys(row.machine for row in rows)
    return "\n\n".join([*found, f"Measured on: {'; '.join(machines) or 'nothing yet'}."]) + "\n"


def by_line(row: Row) -> tuple[str, str, str, int, int]:
    return row.experiment.line


def _line(same: Sequence[Row], images: int, sparse: bool) -> str:
    first = same[0].experiment
    label = "no method" if first.chain == "none" else f"`{first.chain}`"
    label += f": `{same[0].chosen}`" * (same[0].chosen is not None)
    label += f", range `{first.range}`" * (first.range != "mse")
    label += f", blocks of {first.block}" * (first.block is not None)
    label += f", on `{first.backend}`" * (first.backend != "custom")
    label += f", {first.calibration_images:,} calibration images" * (first.calibration_images != images)
    accuracy = f"{mean(row.accuracy for row in same):.2f} %"
    if len(same) > 1:
        accuracy += f" (sd {stdev(row.accuracy for row in same):.2f})"
    difference, interval = (mean(getattr(row, key) for row in same) for key in ("difference", "interval"))
    seeds = ", ".join(str(row.experiment.seed) for row in same if row.experiment.seed is not None)
    sqnr = mean(row.sqnr_db for row in same)
    cells = [label, seeds or "any", accuracy, f"{difference:+.2f} ± {interval:.2f}", f"{sqnr:.1f}"]
    cells += [f"{mean(row.zeros for row in same):.0f} %"] * sparse
    return f"| {' | '.join(cells)} | {mean(row.seconds for row in same):.0f} |"


def put(page: Path, tables: str) -> str:
    """The page with its tables written anew."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + tables + "\n" + END + rest.partition(END)[2]


def add_network(parser: argparse.ArgumentParser) -> None:
    """Which network, on which images."""
    parser.add_argument("--title", help="the network and its data, for people")
    parser.add_argument("--network", help="without it, only the page is written")
    parser.add_argument("--weights")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-path")
    parser.add_argument("--mean", type=float, nargs=3)
    parser.add_argument("--std", type=float, nargs=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--calibration-batches", type=int, default=8)
    parser.add_argument("--test-batches", type=int)


def network_values(options: argparse.Namespace) -> dict[str, Any]:
    """The same as values of a configuration, those that are given."""
    values = {
        "model.name": options.network,
        "model.weights": options.weights,
        "data.dataset": options.data,
        "data.path": options.data_path,
        "data.mean": options.mean,
        "data.std": options.std,
        "data.batch_size": options.batch_size,
        "ptq.calibration_batches": options.calibration_batches,
    }
    return {key: value for key, value in values.items() if value is not None}


def measured(bench: Bench, experiments: Iterable[Experiment], file: Path) -> None:
    """Measures what the file has no row of yet, and adds each row as soon as it is there."""
    for experiment in experiments:
        rows = {row.experiment for row in load(file)}
        if rows.isdisjoint({experiment, replace(experiment, seed=None)}):
            row = bench.measure(experiment)
            print(f"{experiment.table}, {experiment.chain}, seed {experiment.seed}: {row.accuracy:.2f} %", flush=True)
            save(file, [*load(file), row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network(parser)
    parser.add_argument("--chains", nargs="+", default=["none"], metavar="CHAIN")
    parser.add_argument("--widths", nargs="+", default=["4:4"], metavar="W:A")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--range", default="mse", help="chooser of the exponents of weights and activations")
    parser.add_argument("--per-tensor", action="store_true")
    parser.add_argument("--free-scales", action="store_true")
    parser.add_argument("--blocks", nargs="+", type=int, default=[0], help="inputs that share an exponent; 0: all")
    parser.add_argument("--overrides", metavar="YAML", help="`quantization.overrides`; name them in the title")
    parser.add_argument("--sums", type=int, help="`quantization.sums`")
    parser.add_argument("--backend", default="custom")
    parser.add_argument("--rows", type=Path, default=DOCS / "results.json")
    parser.add_argument("--page", type=Path, default=DOCS / "results.md")
    options = parser.parse_args()
    if options.network:
        options.title = options.title or options.network.rpartition(":")[2]
        bench = Bench(options)
        measured(bench, bench.experiments(options), options.rows)
    if options.page.exists():
        write(options.page, put(options.page, rendered(load(options.rows))))


if __name__ == "__main__":
    main()
