"""Runs the commands behind the documentation: `python docs/gallery.py [--files FOLDER] [NAME …]`.

A NAME is a study of docs/gallery.md, whose page becomes docs/gallery/NAME.html, or a page of docs/figures.md, whose
tables are measured again; without names, all studies are built. Files that commands need are blocks of the pages FILES,
or lie in FOLDER. Without it, studies that need files of it are left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parent
FILES = ("gallery.md", "howto/tasks.md", "howto/ternary.md", "howto/training.md")
PAGES = ("search.html", "report.html")


def commands() -> Iterator[tuple[str, list[str]]]:
    """(name, words) of the command of each study; its name is that of its output."""
    for words in _shell((DOCS / "gallery.md").read_text(encoding="utf-8")):
        if words[0] == "pow2quant":
            yield Path(words[words.index("--output") + 1]).name, words


def measurements() -> Iterator[tuple[str, list[list[str]]]]:
    """(page, words of its commands), for each page of figures.md; pages that stand together have the same commands."""
    text = (DOCS / "figures.md").read_text(encoding="utf-8")
    for heading, section in re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", text, re.MULTILINE):
        for page in re.findall(r"\[(.+?)\]\(\1\.md\)", heading):
            yield page, list(_shell(section))


def _shell(text: str) -> Iterator[list[str]]:
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def files() -> Iterator[tuple[str, str]]:
    """(name, text) of the files in the pages: blocks that begin with `# NAME`."""
    for page in FILES:
        text = (DOCS / page).read_text(encoding="utf-8")
        for block in re.findall(r"^```(?:python|yaml)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if named := re.match(r"# (\S+\.(?:py|yaml))\n", block):
                yield named[1], block


def needed(words: list[str]) -> list[str]:
    """The files that a command names."""
    return re.findall(r"[\w./-]+\.(?:py|yaml|safetensors)\b", " ".join(words))


def build(name: str, words: list[str], folder: Path) -> None:
    """Runs a command in a folder and keeps the page that it writes, without the names of that folder and machine."""
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, check=True)
    output = folder / words[words.index("--output") + 1]
    page = next(output / page for page in PAGES if (output / page).is_file())
    text = page.read_text(encoding="utf-8").replace(f"{folder}/", "")
    text = text.replace(platform.platform(), f"{platform.system()} {platform.machine()}")
    (DOCS / "gallery" / f"{name}.html").write_text(text, encoding="utf-8")


def measure(words: list[str], folder: Path) -> None:
    """Runs a command of figures.md in a folder. What belongs to the project is found from there."""
    here = re.compile(r"(benchmarks|docs|configs)/")
    words = [str(DOCS.parent / word) if here.match(word) else word for word in words]
    start = ["-m"] if words[0] == "pow2quant" else []
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    subprocess.run([sys.executable, *start, *words[not start :]], cwd=folder, env=environment, check=True)


def main(names: list[str], given: Path | None = None) -> None:
    """Builds the named studies and measures the named pages, or builds all studies. given: a folder of files."""
    studies, pages = dict(commands()), dict(measurements())
    if unknown := set(names) - studies.keys() - pages.keys():
        sys.exit(f"{', '.join(sorted(unknown))}: legal names: {', '.join([*studies, *pages])}")
    if given and pages.keys() & names:
        (given / "runs").mkdir(exist_ok=True)  # trainings that are interrupted continue there
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder).resolve()
        for path in given.resolve().iterdir() if given else ():
            (where / path.name).symlink_to(path)
        for name, text in files():
            (where / name).write_text(text, encoding="utf-8")
        for name, words in studies.items():
            missing = [file for file in needed(words) if not (where / file).exists()]
            if missing and not names:
                print(f"{name}: left out, it needs {', '.join(missing)} (--files)", file=sys.stderr)
            elif not names or name in names:
                build(name, words, where)
        for words in [words for name in names for words in pages.get(name, [])]:
            measure(words, where)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--files", type=Path, metavar="FOLDER", help="holds the networks, weights and data of yours")
    options = parser.parse_args()
    main(options.names, options.files)
