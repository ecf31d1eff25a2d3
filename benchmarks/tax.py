"""The power-of-two tax: what scales of 2^k cost against free ones, on the same images and behind the same methods.

    python benchmarks/tax.py --title ResNet-20 --network models.py:cifar10_resnet20 --weights resnet20.safetensors
        --data cifar10 --data-path DIR [--widths 8:8 4:8] [--chains none auto] [--metric …]
    python benchmarks/tax.py    # only writes the page again

`auto` chooses a chain for each kind of scales by itself, on calibration images. Networks, weights and data are your
own. A row goes to `--rows` as soon as it is measured, and what is there is not measured again. Differences are 2^k less
free scales; their 95 % intervals are those of a jackknife, from what is left without each of 100 parts of the test set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from chains import Chains, auto, methods, written
from methods import DOCS, add_network, logits, network_values, plan, put, widths, write
from numpy.typing import NDArray

from pow2quant.backends.base import SILENT, inputs
from pow2quant.config import RunConfig, with_values
from pow2quant.logits.paired import NORMAL_95
from pow2quant.report.document import environment
from pow2quant.runs.job import Job
from pow2quant.tasks.judging import leading, value_of

PARTS = 100


@dataclass(frozen=True)
class Row:
    """A network at a width behind a chain, with free scales and with 2^k. value, free_value: in the metric's unit.

    difference: value - free_value; interval: half of its 95 %. gain_db, gain_interval: the same of the outputs' SQNR.
    chosen, free_chosen: the chains that `auto` took.
    """

    network: str
    widths: str
    chain: str
    images: int
    calibration: int
    metric: str
    float_value: float
    free_value: float
    value: float
    difference: float
    interval: float
    free_db: float
    sqnr_db: float
    gain_db: float
    gain_interval: float
    free_chosen: str
    chosen: str
    machine: str


def jackknife(statistic: Callable[[NDArray[np.bool_]], float], samples: int) -> tuple[float, float]:
    """A statistic of samples, and half of its 95 % interval. statistic: takes which of them count, (samples,)."""
    part = np.arange(samples) % PARTS
    without = np.array([statistic(part != i) for i in range(min(PARTS, samples))])
    half = NORMAL_95 * np.sqrt((len(without) - 1) * without.var())
    return statistic(part >= 0), float(half)


class Bench:
    """A float network, its images, and how results are judged."""

    def __init__(self, title: str, values: dict[str, object], test_batches: int | None) -> None:
        self.title, self.job = title, Job.start(with_values(RunConfig(), values), SILENT)
        self.metric = leading(self.job.task)
        batches, targets = zip(*self.job.test(test_batches), strict=True)
        self.test, self.targets = [inputs(batch)[0] for batch in batches], torch.cat(targets).numpy()
        self.expected = logits(self.job.model, self.test).numpy()
        self.chains = Chains(self.job.model, list(self.job.calibration()))

    def value(self, outputs: NDArray[np.float32], rows: NDArray[np.bool_]) -> float:
        """The metric of these rows."""
        counter = self.metric.counter()
        counter.add([outputs[rows]], self.targets[rows])
        return value_of(self.metric, counter)

    def sqnr_db(self, outputs: NDArray[np.float32], rows: NDArray[np.bool_]) -> float:
        """Of these rows, against the float network's."""
        exact, got = self.expected[rows].astype(np.float64), outputs[rows]
        return float(10 * np.log10(np.square(exact).sum() / np.square(got - exact).sum()))

    def side(self, chain: str, bits: str, free: bool) -> tuple[NDArray[np.float32], str]:
        """What a simulation makes of the test images, and the chain behind which it does so."""
        chosen = plan(*widths(bits), per_tensor=False, free=free)
        if chooser := auto(chain):
            chain, _ = self.chains.choice(chooser, chosen)
        return logits(self.chains.simulation(chain, chosen)[0].model, self.test).numpy(), chain

    def row(self, chain: str, bits: str) -> Row:
        """Both kinds of scales, and their difference."""
        (free, free_chosen), (own, chosen) = (self.side(chain, bits, free) for free in (True, False))
        count = len(self.expected)
        rows = np.ones(count, dtype=bool)
        difference = jackknife(lambda kept: self.value(own, kept) - self.value(free, kept), count)
        gain = jackknife(lambda kept: self.sqnr_db(own, kept) - self.sqnr_db(free, kept), count)
        about = environment(torch.get_num_threads())
        return Row(
            self.title,
            bits,
            chain,
            count,
            sum(len(x) for x in self.chains.batches),
            self.metric.name,
            *(round(self.value(outputs, rows), 3) for outputs in (self.expected, free, own)),
            *(round(x, 3) for x in difference),
            *(round(self.sqnr_db(outputs, rows), 2) for outputs in (free, own)),
            *(round(x, 2) for x in gain),
            free_chosen,
            chosen,
            f"{about['processor']}, {about['threads']} thread(s), torch {about['torch']}",
        )


def rendered(rows: Sequence[Row]) -> str:
    """One line for every network, width and chain."""
    lines = [
        "| network | widths | methods | float | free scales | 2<sup>k</sup> | difference | difference, dB |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        sides = [
            f"{value:.2f}, {db:.1f} dB" + f": `{chosen}`" * (chosen != row.chain)
            for value, db, chosen in (
                (row.free_value, row.free_db, row.free_chosen),
                (row.value, row.sqnr_db, row.chosen),
            )
        ]
        weight, _, activation = row.widths.partition(":")
        cells = [
            row.network,
            f"W{weight}A{activation}",
            "none" if row.chain == "none" else f"`{row.chain}`",
            f"{row.metric} {row.float_value:.2f} of {row.images:,}",
            *sides,
            f"{row.difference:+.3g} ± {row.interval:.2g}",
            f"{row.gain_db:+.1f} ± {row.gain_interval:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    machines = dict.fromkeys(row.machine for row in rows)
    return "\n".join(lines) + f"\n\nMeasured on: {'; '.join(machines) or 'nothing yet'}.\n"


def load(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network(parser)
    parser.add_argument("--metric")
    parser.add_argument("--widths", nargs="+", default=["8:8", "4:8"], metavar="W:A")
    parser.add_argument("--chains", nargs="+", default=["none", "auto"])
    parser.add_argument("--rows", type=Path, default=DOCS / "tax.json")
    parser.add_argument("--page", type=Path, default=DOCS / "concepts" / "powers-of-two.md")
    options = parser.parse_args()
    if options.network and not options.title:
        parser.error("name the network with --title")
    rows = load(options.rows)
    known = {(row.network, row.widths, row.chain) for row in rows}
    asked = product(options.widths, [written(methods(chain)) for chain in options.chains])
    missing = [(bits, chain) for bits, chain in asked if (options.title, bits, chain) not in known]
    if options.network and missing:
        values = network_values(options) | ({"metric": options.metric} if options.metric else {})
        bench = Bench(options.title, values, options.test_batches)
        for bits, chain in missing:
            rows.append(bench.row(chain, bits))
            print(rows[-1], flush=True)
            write(options.rows, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.page.exists():
        write(options.page, put(options.page, rendered(rows)))


if __name__ == "__main__":
    main()
