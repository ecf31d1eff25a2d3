"""What a verdict costs: the CPU time of each executor of a finished run, side by side, and of what lies around them.

    python benchmarks/verdict_cost.py RUN [--max-eval-batches N]

RUN: a run's folder. Runs `pow2quant validate RUN` with a clock around every executor, on as many threads as
OMP_NUM_THREADS says. An executor's first batch counts apart: files are read, graphs optimized and C compiled in it.
Process CPU time and that of its children (the C compiler). The last line is the whole command over the time of
onnxruntime (both ways to run model.onnx) and of the simulation.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pow2quant import runs
from pow2quant.validation import ort
from pow2quant.validation.agreement import Executor, compare


def seconds() -> float:
    """CPU time so far, also of children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


class Clock:
    """CPU seconds by name: of the first call, and of all others."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.rest = defaultdict[str, float](float)

    def around(self, executor: Executor) -> Executor:
        """The same executor, timed."""

        def run(batch: Any) -> Any:
            start = time.process_time(), seconds()
            try:
                return executor.run(batch)
            finally:
                if executor.name in self.first:
                    self.rest[executor.name] += time.process_time() - start[0]
                else:
                    self.first[executor.name] = seconds() - start[1]

        return replace(executor, run=run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--max-eval-batches", type=int)
    given = parser.parse_args()
    clock, images = Clock(), 0

    def timed(reference: Executor, others: Sequence[Executor], batches: Iterable[Any], *rest: Any, **named: Any) -> Any:
        def counted() -> Iterable[Any]:
            nonlocal images
            for batch in batches:
                images += len(batch[0])
                yield batch

        return compare(clock.around(reference), [clock.around(e) for e in others], counted(), *rest, **named)

    before = seconds()
    with patch("pow2quant.runs.executors.compare", timed):
        found = runs.validate(given.run, max_batches=given.max_eval_batches)
    total = seconds() - before
    print(f"{images:,} images, {sum(a.differing for a in found.agreements)} elements differ\n")
    print("| part | first batch | the others | per image |\n|---|---|---|---|")
    for name, first in clock.first.items():
        print(f"| {name} | {first:.2f} s | {clock.rest[name]:.2f} s | {1000 * clock.rest[name] / images:.2f} ms |")
    around = total - sum(clock.first.values()) - sum(clock.rest.values())
    print(f"| capture, certificate, data, comparison | | {around:.2f} s | {1000 * around / images:.2f} ms |")
    print(f"| the command | | {total:.2f} s | {1000 * total / images:.2f} ms |")
    spent = {name: clock.first[name] + clock.rest[name] for name in clock.first}
    both, simulated = spent[ort.PLAIN] + spent[ort.OPTIMIZED], next(iter(spent.values()))
    parts = f"onnxruntime ({both:.2f} s) and simulation ({simulated:.2f} s)"
    print(f"\nthe command takes {total / (both + simulated):.2f} times as long as {parts}")


if __name__ == "__main__":
    main()
