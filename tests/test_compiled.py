"""Libraries that are compiled once, and what may not be taken for one."""

from __future__ import annotations

import os

import numpy as np
import pytest

from pow2quant import compiled
from pow2quant.integer import run as engine
from pow2quant.integer.lower import lower
from pow2quant.integer.pack import sample_codes
from pow2quant.validation import c99
from tests.test_engine import OPERATIONS

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="needs a C compiler")

FLAGS = ("-std=c99", "-O0")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pow2quant" / "c"


@pytest.fixture
def builds(monkeypatch):
    made = []
    build = compiled.build
    monkeypatch.setattr(compiled, "build", lambda *arguments: (made.append(1), build(*arguments)))
    return made


def agrees(name="gemm", flags=FLAGS):
    program = lower(OPERATIONS[name]())
    codes = sample_codes(program, 2)
    pairs = zip(c99.Library(program, flags).run(codes), engine.run(program, codes), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_network_is_compiled_once_for_the_same_flags(cache, builds):
    assert all([agrees(), agrees(), agrees(flags=("-std=c99", "-O1")), agrees("conv"), agrees()])
    assert len(builds) == len(list(cache.iterdir())) == 3


def test_a_damaged_library_is_compiled_anew(cache, builds):
    assert agrees()
    (kept,) = cache.iterdir()
    kept.write_bytes(b"damaged")
    assert agrees()
    assert agrees()
    assert len(builds) == 2


@pytest.mark.parametrize("spoil", ["writable for all", "a file in its place", "no home"])
def test_a_folder_that_is_not_fit_is_not_used(cache, builds, monkeypatch, spoil):
    if spoil == "writable for all":
        cache.mkdir(parents=True)
        cache.chmod(0o777)
    elif spoil == "a file in its place":
        cache.parent.write_text("")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "missing" / "cache"))
    assert agrees()
    assert agrees()
    assert len(builds) == 2
    assert not cache.is_dir() or list(cache.iterdir()) == []


def test_the_oldest_go(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "MOST", 2)
    library = tmp_path / "library"
    library.write_bytes(b"x")
    for age, name in enumerate("abc"):
        compiled.keep(name, library)
        os.utime(cache / name, (age, age))
    assert sorted(path.name for path in cache.iterdir()) == ["b", "c"]
    assert compiled.take("c", tmp_path / "copy")
