"""What `ptq` does by default, beside no method and beside `bias_correction` alone: the table of docs/accuracy.md.

    python benchmarks/defaults.py --title ResNet-20 --network models.py:cifar10_resnet20 --weights resnet20.safetensors
        --data cifar10 --data-path DIR
    python benchmarks/defaults.py    # only writes the page again

Widths are W8A8 per channel and per tensor, W4A8 and W4A4. Rows are those of `methods.py`, in a file of their own: what
is there is not measured again. Exit status 1 where a default is worse than `bias_correction` alone beyond the 95 %
intervals of both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from chains import written
from methods import DOCS, Bench, Experiment, Row, add_network, load, measured, put, write

from pow2quant.config import RunConfig, default_methods, with_values

WIDTHS = {
    "W8A8": (8, 8, False),
    "W8A8, per tensor": (8, 8, True),
    "W4A8": (4, 8, False),
    "W4A4": (4, 4, False),
}
ALONE = "bias_correction"


def default(weight: int, per_tensor: bool) -> str:
    """The chain of a run that names no method."""
    values = {"quantization.weight.bitwidth": weight, "quantization.weight.per_channel": not per_tensor}
    return written(default_methods(with_values(RunConfig(), values)))


def experiments(title: str, bench: Bench) -> Iterator[Experiment]:
    """No method, `bias_correction` and the default, at every width."""
    images = sum(len(x) for x in bench.calibration)
    for weight, activation, per_tensor in WIDTHS.values():
        for chain in dict.fromkeys(["none", ALONE, default(weight, per_tensor)]):
            yield Experiment(
                title,
                weight,
                activation,
                chain,
                per_tensor=per_tensor,
                calibration_images=images,
                test_images=len(bench.truth),
            )


def rendered(rows: Sequence[Row]) -> str:
    """One line for every network and width."""
    head = "| network | widths | images | float | no method | `bias_correction` | default |"
    lines = [head, "|---" * 7 + "|"]
    for network in dict.fromkeys(row.experiment.network for row in rows):
        for name, (weight, _, per_tensor) in WIDTHS.items():
            own = {r.experiment.chain: r for r in rows if r.experiment.table == f"{network}: {name}"}
            if own:
                first = next(iter(own.values()))
                cells = [_cell(own.get(chain)) for chain in ("none", ALONE, default(weight, per_tensor))]
                first_cells = [network, name, f"{first.experiment.test_images:,}", f"{first.float_accuracy:.2f} %"]
                lines.append(f"| {' | '.join([*first_cells, *cells])} |")
    machines = dict.fromkeys(row.machine for row in rows)
    return "\n".join(lines) + f"\n\nMeasured on: {'; '.join(machines) or 'nothing yet'}.\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return f"{row.accuracy:.2f} % ({row.difference:+.2f} ± {row.interval:.2f}), {row.sqnr_db:.1f} dB"


def worse(rows: Iterable[Row]) -> list[str]:
    """Tables in which the default is below `bias_correction` alone beyond both intervals."""
    found = []
    own = {(row.experiment.table, row.experiment.chain): row for row in rows}
    for (table, chain), row in own.items():
        alone = own.get((table, ALONE))
        is_default = chain == default(row.experiment.weight_bits, row.experiment.per_tensor)
        if is_default and alone and row.accuracy + row.interval < alone.accuracy - alone.interval:
            found.append(f"{table}: {chain} {row.accuracy:.2f} %, {ALONE} {alone.accuracy:.2f} %")
    return found


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network(parser)
    parser.add_argument("--rows", type=Path, default=DOCS / "accuracy.json")
    parser.add_argument("--page", type=Path, default=DOCS / "accuracy.md")
    options = parser.parse_args()
    if options.network:
        bench = Bench(options)
        measured(bench, experiments(options.title or options.network.rpartition(":")[2], bench), options.rows)
    rows = load(options.rows)
    write(options.page, put(options.page, rendered(rows)))
    for line in worse(rows):
        print(f"worse: {line}")
    return 1 if worse(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
