"""Random networks in every executor: whatever is called proved must never differ.

    python benchmarks/fuzz.py --networks 20000 --processes 16
    python benchmarks/fuzz.py --networks 2000 --onnxruntime 1.20.0,1.24.0

Half of the networks are PyTorch modules (prepared, calibrated, exported), half are artifacts, built node by node, with
encodings that no calibration would choose. Each runs in the simulation, in onnxruntime without and with optimizations
and in the integer engine, a share of them in C. Prints what happened, by kind and by operation, and exits with 1 where
something proved differs or cannot be run, or where something crashes. Each such network is written to `--failures`
(model, inputs, and what differs); `--only NUMBER` runs one again.

`--onnxruntime` installs each version into a folder of its own under `--environments` and runs everything there too; the
summary then has one part for each version.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402

from tests.random_checks import KINDS, Outcome, check  # noqa: E402


def run(number: int, seed: int, widths: Sequence[int], c_every: int) -> Outcome:
    """Network `number`: even ones are modules, odd ones artifacts. Every `c_every`-th is compiled as C; 0: none."""
    outcome = check(KINDS[number % 2], seed, number, widths, in_c=bool(c_every) and number // 2 % c_every == 0)
    if not (outcome.wrong or outcome.differs):
        outcome.model, outcome.inputs = b"", ()  # they would only travel between processes
    return outcome


def prepare_process() -> None:
    """One thread; Ctrl-C is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def outcomes(options: argparse.Namespace) -> Iterator[Outcome]:
    """Every network's outcome, as they are done."""
    numbers = [options.only] if options.only is not None else range(options.first, options.first + options.networks)
    work = partial(run, seed=options.seed, widths=options.widths, c_every=options.c_every)
    if options.processes == 1 or len(numbers) == 1:
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        yield from map(work, numbers)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, prepare_process, maxtasksperchild=2000) as pool:
        yield from pool.imap_unordered(work, numbers, chunksize=8)


class Tally:
    """Counts outcomes, shows progress on stderr, and writes what is wrong."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.total = options, 1 if options.only is not None else options.networks
        self.done = 0
        self.counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.operations: dict[str, Counter[str]] = {}
        self.refusals: Counter[str] = Counter()
        self.wrong: list[Outcome] = []
        self.started = self.shown = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        """Counts one."""
        self.done += 1
        words = _words(outcome)
        self.counts[outcome.kind].update(words)
        for operation in outcome.operations:
            self.operations.setdefault(operation, Counter()).update(["networks", *words])
        if outcome.refused:
            self.refusals[outcome.refused.partition(":")[0]] += 1
        if outcome.wrong:
            self.wrong.append(outcome)
            self._write(outcome)
        if time.monotonic() - self.shown > 5:
            self.shown = time.monotonic()
            rate = self.done / (self.shown - self.started)
            print(
                f"{self.done:,} of {self.total:,}, {len(self.wrong)} wrong, {rate:.0f}/s", file=sys.stderr, flush=True
            )

    def _write(self, outcome: Outcome) -> None:
        folder = self.options.failures / f"{onnxruntime.__version__}-{self.options.seed}-{outcome.number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx").write_bytes(outcome.model)
        np.savez(folder / "inputs.npz", *outcome.inputs)
        found = {
            "command": self._command(outcome),
            "onnxruntime": onnxruntime.__version__,
            **{key: getattr(outcome, key) for key in ("kind", "operations", "proved", "differing", "failed")},
        }
        (folder / "found.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def _command(self, outcome: Outcome) -> str:
        widths = ",".join(map(str, self.options.widths))
        more = f"--widths {widths} --c-every {self.options.c_every}"
        return f"python benchmarks/fuzz.py --seed {self.options.seed} --only {outcome.number} {more}"

    def show(self) -> None:
        """Prints the summary."""
        seconds = time.monotonic() - self.started
        version, seed = onnxruntime.__version__, self.options.seed
        print(f"onnxruntime {version}: {self.done:,} networks in {seconds:.0f} s, seed {seed}")
        for kind, counts in self.counts.items():
            compared = counts["proved"] + counts["not proved"]
            share = f"{100 * counts['proved'] / compared:.1f} %" if compared else "-"
            print(
                f"  {kind}: {compared:,} compared, {counts['proved']:,} proved ({share}), of these "
                f"{counts['proved, differs']} differ and {counts['proved, cannot be run']} cannot be run; "
                f"not proved {counts['not proved']:,}, of these {counts['not proved, differs']:,} differ and "
                f"{counts['not proved, cannot be run']:,} cannot be run; "
                f"{counts['in C']:,} also in C; {counts['refused']:,} refused; {counts['crashed']} crashed"
            )
        print("  refused: " + (", ".join(f"{n:,} {name}" for name, n in self.refusals.most_common()) or "none"))
        for operation, counts in sorted(self.operations.items()):
            print(
                f"  {operation:20s} in {counts['networks']:6,} networks, {counts['proved']:6,} of them proved; "
                f"{counts['proved, differs']} of the proved and {counts['not proved, differs']:,} of the others differ"
            )
        for outcome in self.wrong[:20]:
            found = {name: n for name, n in outcome.differing.items() if n} | {
                name: text.strip().splitlines()[-1] for name, text in outcome.failed.items()
            }
            print(f"  WRONG: {self._command(outcome)}\n    {outcome.kind}, {', '.join(outcome.operations)}: {found}")


def _words(outcome: Outcome) -> list[str]:
    if outcome.refused:
        return ["refused"]
    if "pow2quant" in outcome.failed:
        return ["crashed"]
    claim = "proved" if outcome.proved else "not proved"
    more = {f"{claim}, differs": outcome.differs, f"{claim}, cannot be run": bool(outcome.failed)}
    more["in C"] = any("generated C" in name for name in outcome.differing)
    return [claim, *(word for word, true in more.items() if true)]


def environment(version: str, folder: Path) -> Path:
    """A folder with that onnxruntime alone; everything else comes from the running environment."""
    target = folder / f"onnxruntime-{version}"
    if not (target / "onnxruntime").is_dir():
        installer = (
            ["uv", "pip", "install", "--python", sys.executable]
            if shutil.which("uv")
            else [sys.executable, "-m", "pip", "install"]
        )
        command = [*installer, "--quiet", "--no-deps", "--target", str(target), f"onnxruntime=={version}"]
        subprocess.run(command, check=True)
    return target


def in_versions(options: argparse.Namespace) -> int:
    """Runs this program once for each version, one after another; the largest exit status."""
    left = [a for i, a in enumerate(sys.argv[1:]) if not _is_version_option(i)]
    status = 0
    for version in options.onnxruntime.split(","):
        target = environment(version, options.environments)
        paths = [str(target), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, str(Path(__file__).resolve()), *left]
        found = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False)
        status = max(status, found.returncode)
    return status


def _is_version_option(index: int) -> bool:
    """Whether an argument is `--onnxruntime`, or what follows it."""
    arguments = sys.argv[1:]
    return arguments[index].startswith("--onnxruntime") or (index > 0 and arguments[index - 1] == "--onnxruntime")


def _widths(text: str) -> tuple[int, ...]:
    """`8`, `2,4,8` or `2-16`."""
    parts = [part.partition("-") for part in text.split(",")]
    return tuple(sorted({w for low, _, high in parts for w in range(int(low), int(high or low) + 1)}))


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first network")
    parser.add_argument("--only", type=int, help="run this network alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--widths", type=_widths, default=tuple(range(2, 17)), help="of activations: 8, 2,4,8 or 2-16")
    parser.add_argument("--c-every", type=int, default=50, help="compile every so many networks as C; 0: none")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--onnxruntime", help="versions, separated by commas; default: the installed one")
    parser.add_argument("--environments", type=Path, default=Path("fuzz-environments"))
    options = parser.parse_args()
    if options.onnxruntime:
        return in_versions(options)
    tally = Tally(options)
    try:
        for outcome in outcomes(options):
            tally.add(outcome)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        tally.show()
        return 130
    tally.show()
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
