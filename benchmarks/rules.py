"""Which executors notice a rule of rounding that is wrong, and in how many elements.

    python benchmarks/rules.py --executors litert tract    # measures these anew, and writes the page
    python benchmarks/rules.py                             # only writes the page again

`tests/test_rules.py` asks the same of every executor that is installed, and where the first wrong tensor stands. The
packages of executors have pins that clash, so they may be measured in several environments; rows are kept in `--rows`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from pow2quant import targets  # noqa: E402
from pow2quant.compiled import compiler  # noqa: E402
from pow2quant.validation import onnxruntime_js  # noqa: E402
from tests.wrong_rules import CASES, agreements  # noqa: E402

sys.path.remove(str(ROOT))

BEGIN, END = "<!-- rules: written by benchmarks/rules.py -->\n", "<!-- end of rules -->"
KINDS = tuple(field.name for field in fields(targets.Roundings))
PACKAGES = {
    "engine": "pow2quant",
    "pt2": "torch",
    "litert": "ai-edge-litert",
    "esp-ppq (esp32p4)": "esp-ppq",
    "esp-ppq (esp32s3)": "esp-ppq",
}
"""Whose version counts, where it has not the executor's name."""


@dataclass(frozen=True)
class Row:
    """An executor. version: of what runs. elements: of the outputs; right: how many differ with the right rules.

    wrong: with one wrong rule, by kind of operation; the fewest where the executor runs in several ways.
    """

    executor: str
    version: str
    target: str
    elements: int
    right: int
    wrong: dict[str, int]


def measure(name: str) -> Row:
    """Every rule that the executor's case holds, one after the other."""
    found = {}
    for kind in (None, *CASES[name].nodes):
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = agreements(name, kind, Path(folder))
    return Row(
        executor=name,
        version=version_of(name),
        target=CASES[name].target,
        elements=found[None][0].elements,
        right=max(each.differing for each in found.pop(None)),
        wrong={str(kind): min(each.differing for each in runs) for kind, runs in found.items()},
    )


def version_of(name: str) -> str:
    """Of what runs in an executor."""
    if name in ("onnxruntime-web", "onnxruntime-node"):
        return f"{name} {onnxruntime_js.version(name)}"
    if name == "c" or name.startswith("c-"):
        command = compiler() or "" if name == "c" else f"qemu-{name.removeprefix('c-')}"
        done = subprocess.run([command, "--version"], capture_output=True, encoding="utf-8", check=True)
        return re.sub(r" \(.*?\)", "", done.stdout.splitlines()[0])
    package = PACKAGES.get(name, name)
    return f"{package} {version(package)}"


def rendered(rows: Sequence[Row]) -> str:
    """A line for every executor, in the order of the cases."""
    head = ["executor", "version", "target", "elements", "right rules", *KINDS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda row: list(CASES).index(row.executor)):
        counts = [f"{row.wrong[kind]:,}" if kind in row.wrong else "" for kind in KINDS]
        cells = [f"`{row.executor}`", row.version, f"`{row.target}`", f"{row.elements:,}", f"{row.right:,}", *counts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def put(page: Path, rows: Sequence[Row]) -> str:
    """The page with its table written anew."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{rendered(rows)}\n\n{END}{rest.partition(END)[2]}"


def load(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executors", nargs="+", default=[], choices=CASES, metavar="EXECUTOR")
    parser.add_argument("--rows", type=Path, default=ROOT / "docs" / "rules.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "targets.md")
    options = parser.parse_args()
    for name in options.executors:
        row = measure(name)
        print(row, flush=True)
        rows = [*(each for each in load(options.rows) if each.executor != name), row]
        options.rows.write_text(json.dumps([asdict(each) for each in rows], indent=1) + "\n", encoding="utf-8")
    if options.page.exists():
        options.page.write_text(put(options.page, load(options.rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
