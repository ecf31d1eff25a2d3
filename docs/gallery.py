"""Builds the gallery: `python docs/gallery.py [--files FOLDER] [NAME …]` runs the commands of docs/gallery.md.

All of them, or the named ones. The page that a command writes becomes docs/gallery/NAME.html. Files that commands need
are blocks of the pages FILES, or lie in FOLDER; without it, commands that need files of it are left out.
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
FILES = ("gallery.md", "howto/tasks.md", "howto/ternary.md")
PAGES = ("search.html", "report.html")


def commands() -> Iterator[tuple[str, list[str]]]:
    """(name, words) of each command; its name is that of its output."""
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if (words := shlex.split(line, comments=True))[:1] == ["pow2quant"]:
                yield Path(words[words.index("--output") + 1]).name, words


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


def main(names: list[str], given: Path | None = None) -> None:
    """Builds the named studies, or all. given: a folder of further files."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder).resolve()
        for path in given.resolve().iterdir() if given else ():
            (where / path.name).symlink_to(path)
        for name, text in files():
            (where / name).write_text(text, encoding="utf-8")
        for name, words in commands():
            missing = [file for file in needed(words) if not (where / file).exists()]
            if missing and not names:
                print(f"{name}: left out, it needs {', '.join(missing)} (--files)", file=sys.stderr)
            elif not names or name in names:
                build(name, words, where)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--files", type=Path, metavar="FOLDER", help="holds the networks, weights and data of yours")
    options = parser.parse_args()
    main(options.names, options.files)
