"""Files of users that a configuration names: what they may import, and how they fail."""

from __future__ import annotations

import sys

import pytest

from pow2quant.config import from_file, users_code
from pow2quant.errors import ConfigError, ModelError


def test_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_thing.py").write_text("VALUE = 7\n")
    (tmp_path / "user.py").write_text("from neighbour_of_thing import VALUE\ndef thing(): return VALUE\n")
    before = list(sys.path)
    assert from_file(f"{tmp_path}/user.py:thing")() == 7
    assert sys.path == before


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_file_may_import_as_in_its_package(depth, tmp_path):
    """Relative imports and the package's own name, with and without __init__.py."""
    top = tmp_path / f"package_of_depth_{depth}"
    folder = top / "inner" if depth == 2 else top
    folder.mkdir(parents=True)
    for each in {top, folder} if depth else ():
        (each / "__init__.py").write_text("")
    (folder / "blocks.py").write_text("VALUE = 7\n")
    (top / "common.py").write_text("FACTOR = 2\n")
    lines = ["from .blocks import VALUE", f"from {'..' if depth == 2 else '.'}common import FACTOR"]
    lines += [f"from {top.name}.common import FACTOR as again", "def thing(): return VALUE * FACTOR * again"]
    (folder / "user.py").write_text("\n".join(lines))
    before = list(sys.path)
    assert from_file(f"{folder}/user.py:thing")() == 28
    assert sys.path == before


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path):
    file = tmp_path / "user.py"
    file.write_text("class Thing: pass\nSIZE = 1\n")
    first = from_file(f"{file}:Thing")
    assert from_file(f"{file}:Thing") is first
    file.write_text("class Thing: pass\nSIZE = 22\n")
    assert from_file(f"{file}:SIZE") == 22


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import no_such_module\n", "user.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\ndef thing(:\n", "user.py, line 2: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "user.py, line 2: SystemExit: 3"),
        ("raise ValueError('one\\ntwo')\n", "user.py, line 1: ValueError: one two"),
        ("def other(): pass\nclass Another: pass\ndef _hidden(): pass\n", "has no 'thing'; it has other, Another"),
        ("from os import path\n", "has no 'thing'; it has nothing"),
    ],
)
def test_a_file_that_fails_is_named(text, expected, tmp_path):
    (tmp_path / "user.py").write_text(text)
    before, modules = list(sys.path), set(sys.modules)
    with pytest.raises(ModelError) as raised:
        from_file(f"{tmp_path}/user.py:thing", ModelError)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sys.path == before
    assert len([name for name in set(sys.modules) - modules if name.startswith("pow2quant_file")]) == (
        "has" in expected
    )


@pytest.mark.parametrize("name", ["nowhere.py:thing", "nowhere.py", "nowhere.py:", "thing"])
def test_a_name_that_stands_for_no_file(name):
    with pytest.raises(ConfigError, match=r"nowhere\.py: no such file|expected path/to/file\.py:NAME"):
        from_file(name)


def test_our_own_errors_pass_through_users_code_unchanged():
    with pytest.raises(ModelError, match=r"^ours$"), users_code("user.py:thing", ConfigError):
        raise ModelError("ours")
