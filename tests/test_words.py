"""The words of what users read: no metaphors. The list is CONTRIBUTING.md's."""

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = re.compile(
    r"\b(hous(?:e|es|ed|ing)|rooms?|waists?|mend(?:s|ed|ing)?|furnish\w*|nobody|whoever)\b", re.IGNORECASE
)
WRITTEN = {".md", ".yaml", ".yml", ".toml", ".sh", ".j2", ".html", ".css", ".svg", ".ipynb"}
NAMED = {"Makefile", "Dockerfile"}
LISTS_THEM = "CONTRIBUTING.md"


def texts(source: str) -> list[tuple[int, str]]:
    """The comments and strings of Python's `source`, with their lines; names in code are no text."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in kinds]


def found(path: Path) -> list[str]:
    """`line: word` for every word of the list in what the file says."""
    source = path.read_text(encoding="utf-8")
    pieces = texts(source) if path.suffix == ".py" else list(enumerate(source.splitlines(), 1))
    if path.name == LISTS_THEM:
        pieces = [(line, text) for line, text in pieces if not text.startswith("|")]
    return [f"{line}: {word}" for line, text in pieces for word in FORBIDDEN.findall(text)]


def test_what_users_read_is_written_in_plain_words() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    paths = [ROOT / name for name in listed.stdout.splitlines() if not name.startswith("tests/")]
    read = [p for p in paths if p.is_file() and (p.suffix in WRITTEN | {".py"} or p.name in NAMED)]
    assert len(read) > 100
    assert {p.relative_to(ROOT).as_posix(): words for p in read if (words := found(p))} == {}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.py", '"""The waist."""\n', ["1: waist"]),
        ("a.py", "x = 1\nroom = 2  # Mends it\n", ["2: Mends"]),
        ("a.py", "y = f'{x} that nobody reads'\n", ["1: nobody"]),
        ("a.md", "# Rooms\n\nThe recommended warehouse.\n", ["1: Rooms"]),
    ],
)
def test_a_word_of_the_list_is_found(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert found(tmp_path / name) == expected
