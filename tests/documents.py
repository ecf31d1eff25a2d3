"""Runs what a Markdown document shows: its Python, its commands, its configurations; one namespace and folder a page.

A `pyproject.toml` is installed: its entry points are found from then on, until the page ends.

A block whose last line before the fence is `<!-- not executed: REASON -->` is not run, but the flags of its commands
are checked. `<!-- output of: COMMAND -->` before a block says what printed it; only the numbers in it may be others;
`<!-- lines of: COMMAND -->` that it printed each of these lines. A command may say `# exit status 1` behind it, or
`# exit status 0 or 1`. `# name.py` as the first line of a block makes a file of it, which later blocks and commands
use. Of `make` it is checked that the target exists, of `python benchmarks/NAME.py` that it takes these arguments: they
take minutes.
"""

from __future__ import annotations

import math
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Collection, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from pow2quant import config
from pow2quant.cli import main
from pow2quant.study import sweep
from pow2quant.targets import reading

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(
    r"^(?:<!-- (?P<word>not executed|output of|lines of): (?P<what>.+?) -->\n)?"
    r"```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
NUMBER = re.compile(r"[\d.,]+")
RUN = ("python", "bash", "yaml", "toml")


@dataclass(frozen=True)
class Block:
    """A fenced block. skipped: why it is not executed; printed_by: a command; part: of that; snippet: its file."""

    line: int
    language: str
    text: str
    skipped: str | None
    printed_by: str | None
    part: bool
    snippet: str | None


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n```") + text.startswith("```") == 2 * len(FENCE.findall(text)), f"{path}: an odd fence"
    found = []
    for match in FENCE.finditer(text):
        included = SNIPPET.search(match["text"])
        whole = (ROOT / included[1]).read_text(encoding="utf-8") if included else match["text"]
        skipped = match["what"] if match["word"] == "not executed" else None
        printed, part = None if skipped else match["what"], match["word"] == "lines of"
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(line, match["language"], whole, skipped, printed, part, included[1] if included else None))
    return found


def commands(block: Block) -> Iterator[tuple[list[str], set[int]]]:
    """The commands of a shell block and their exit statuses; comments and continuation lines resolved."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            said = re.search(r"# exit status ([\d or]+)", line)
            yield words, set(map(int, said[1].split(" or "))) if said else {0}


@cache
def flags(command: str) -> frozenset[str]:
    """Those that `pow2quant COMMAND --help` shows; none for a command that does not exist."""
    shown = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown):
        patch.setenv("COLUMNS", "200")  # or long flags are cut off
        status = main([command, "--help"])
    found = re.findall(r"^[│\s*]*(?:-\w, )?(--[a-z][a-z-]*)", shown.getvalue(), re.MULTILINE)
    return frozenset(found) if status == 0 else frozenset()


def unknown_flags(words: list[str]) -> list[str]:
    """What of `pow2quant COMMAND --flag …` the command does not know; underscores count as hyphens."""
    command, *rest = words[1:]
    used = [word.partition("=")[0].replace("_", "-") for word in rest if word.startswith("--")]
    return [flag for flag in used if flag not in flags(command)] if flags(command) else [command]


def run(path: Path) -> int:
    """Executes a document in the current folder and returns how many blocks and commands ran."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed: dict[str, str] = {}
    ran = 0
    sys.path.insert(0, str(Path.cwd()))
    modules = set(sys.modules)
    try:
        for block in blocks(path):
            if block.skipped is None and (block.snippet is None or block.language == "yaml"):
                ran += _execute(block, f"{path.name}, line {block.line}", namespace, printed)
    finally:
        sys.path.remove(str(Path.cwd()))
        here = {name for name in sys.modules.keys() - modules if Path(f"{name}.py").exists()}
        for name in here:
            del sys.modules[name]
    return ran


def _execute(block: Block, place: str, namespace: dict[str, Any], printed: dict[str, str]) -> int:
    if block.printed_by:
        words = shlex.split(block.printed_by)
        again = ["--overwrite"] if "--output" in words else []
        _compare(block, place, printed.get(shlex.join(words)) or _printed([*words, *again]))
    elif block.language == "python":
        if named := re.match(r"# (\S+\.py)\n", block.text):
            Path(named[1]).write_text(block.text, encoding="utf-8")
            runpy.run_path(named[1])
        else:
            exec(compile(block.text, place, "exec"), namespace)
    elif block.language == "bash":
        for words, statuses in commands(block):
            printed[shlex.join(words)] = _call(words, statuses, place)
    elif block.language == "yaml":
        if named := re.match(r"# (\S+\.yaml)\n", block.text):
            Path(named[1]).write_text(block.text, encoding="utf-8")
        _check(yaml.safe_load(block.text), block.text, place, named[1] if named else "")
    elif block.language == "toml":
        install(block.text, Path.cwd())
    return block.language in RUN or block.printed_by is not None


def _check(mapping: dict[str, Any], text: str, place: str, name: str) -> None:
    """YAML of a study, of a target, or of a configuration."""
    if "grids" in mapping:
        sweep.read(Path(name), config.RunConfig())
    elif "base" in mapping:
        reading.parse(text, place)
    else:
        config.plan_of(config.from_mapping(mapping, source=place))


def install(pyproject: str, folder: Path) -> None:
    """Writes what `pip install` would, for the entry points to be found: nothing where it declares no project."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads(pyproject).get("project", {})
    if "name" not in project:
        return
    installed = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    installed.mkdir()
    about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (installed / "METADATA").write_text(about, encoding="utf-8")
    lines = [
        f"[{group}]\n{name} = {value}" for group, p in project["entry-points"].items() for name, value in p.items()
    ]
    (installed / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def _call(words: list[str], statuses: set[int], place: str) -> str:
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        goals = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{goal}:", makefile, re.MULTILINE) for goal in goals), f"{place}: {words}"
        return ""
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        assert (ROOT / words[1]).is_file(), f"{place}: {words[1]}"
        assert takes(words), f"{place}: {words}"
        return ""
    assert words[0] == "pow2quant", f"{place}: {words[0]} is not run here; say `<!-- not executed: … -->`"
    return _printed(words, statuses, place)


def takes(words: list[str]) -> bool:
    """Whether a benchmark parses these arguments; it is stopped behind that."""

    parsed = []

    def stop(parse: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: parsed.append(parse(*arguments)) or sys.exit()

    modules = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch, suppress(SystemExit):
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(ArgumentParser, method, stop(getattr(ArgumentParser, method)))
        patch.setattr(sys, "argv", words[1:])
        patch.syspath_prepend(ROOT / "benchmarks")
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    for name in sys.modules.keys() - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]
    return bool(parsed)


def _printed(words: list[str], statuses: Collection[int] = (0,), place: str = "") -> str:
    """What `pow2quant …` prints to stdout, without progress."""
    shown = StringIO()
    with redirect_stdout(shown):
        assert main([*words[1:], *([] if "--quiet" in words else ["--quiet"])]) in statuses, f"{place}: {words}"
    return shown.getvalue()


def _compare(block: Block, place: str, printed: str) -> None:
    """Trained on another machine, the last digits of an accuracy may move; the shape and the verdict may not."""
    shown, known = (NUMBER.sub("#", text) for text in (block.text, printed))
    if block.part:
        lines = [line.split() for line in known.splitlines()]
        assert [line for line in shown.splitlines() if line.split() not in lines] == [], place
        return
    assert known.split() == shown.split(), place
    for said, today in zip(_numbers(block.text), _numbers(printed), strict=True):
        assert math.isclose(said, today, rel_tol=0.01), f"{place}: says {said}, today {today}"
    assert re.search(r"verdict: 0 of 4,500 output elements differ .* proved", printed), place


def _numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


if __name__ == "__main__":  # python -m tests.documents FILE.md …: shows what the commands print today
    for argument in sys.argv[1:]:
        document = Path(argument)
        text = document.read_text(encoding="utf-8")
        for shown in (block for block in blocks(document) if block.printed_by and not block.part):
            text = text.replace(shown.text, _printed([*shlex.split(shown.printed_by or ""), "--overwrite"]))
        document.write_text(text, encoding="utf-8")
