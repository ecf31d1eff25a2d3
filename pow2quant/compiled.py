"""C that becomes a shared library: compiled, or taken from an earlier run.

Libraries are kept in the user's cache folder: `$XDG_CACHE_HOME/pow2quant/c`, or under `~/.cache`. A library is known
by its sources, the flags and every macro that the compiler defines, which tell its version and the processor. Where the
folder cannot be written or is not the user's alone, nothing is kept and nothing is taken.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pow2quant.errors import MissingExtraError, UnsupportedModelError
from pow2quant.saving import scratch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MOST = 64
"""So many libraries are kept; the ones not used for longest go."""


def unavailable() -> str | None:
    """Why there is no C compiler; None where there is one."""
    return None if compiler() else "no C compiler: neither $CC nor cc, gcc or clang is on the PATH"


def compiler() -> str | None:
    """The command of the C compiler."""
    return next(
        (name for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name and shutil.which(name)), None
    )


def library(texts: Mapping[str, str], source: str, flags: Sequence[str]) -> ctypes.CDLL:
    """The file `source` among texts, by name, as a shared library. Raises what `build` raises."""
    flags = (*flags, "-shared", "-fPIC")
    name = key(texts, compiler() or "", flags) if compiler() else ""
    with scratch() as folder:
        target = Path(folder, "library.so")
        if take(name, target):
            with suppress(OSError):  # damaged: compiled anew
                return ctypes.CDLL(str(target))
        for file, text in texts.items():
            Path(folder, file).write_text(text, encoding="utf-8")
        build(Path(folder, source), target, flags)
        try:
            loaded = ctypes.CDLL(str(target))
        except OSError:  # a compiler for another machine
            raise UnsupportedModelError(
                f"{compiler()} makes no library that this machine can load; set CC to another compiler"
            ) from None
        keep(name, target)
        return loaded


def build(source: Path, target: Path, flags: Sequence[str]) -> None:
    """Compiles one file. Raises MissingExtraError without a compiler, UnsupportedModelError where it fails."""
    command = compiler()
    if command is None:
        raise MissingExtraError(unavailable() or "")
    done = None
    for tried in (flags, [flag for flag in flags if flag != "-march=native"]):
        line = [command, *tried, "-o", str(target), str(source)]
        done = subprocess.run(line, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode == 0:
            return
    assert done is not None
    lines = done.stderr.strip().splitlines() or [""]
    error = next((line for line in lines if "error" in line), lines[0])
    raise UnsupportedModelError(f"{command} cannot compile {source.name}: {error}")


def key(texts: Mapping[str, str], command: str, flags: Sequence[str]) -> str:
    """The name of what `command` makes of these sources; empty where the compiler does not say what it defines."""
    line = [command, *flags, "-dM", "-E", "-x", "c", os.devnull]
    macros = subprocess.run(line, capture_output=True, check=False)
    if macros.returncode or not macros.stdout:
        return ""
    digest = hashlib.sha256(macros.stdout)
    digest.update(repr((command, list(flags), sorted(texts.items()))).encode())
    return digest.hexdigest()


def take(name: str, target: Path) -> bool:
    """Copies a library that was kept to `target`; whether there was one."""
    if not name or (folder := _folder()) is None:
        return False
    try:
        shutil.copyfile(folder / name, target)
        os.utime(folder / name)
    except OSError:
        return False
    return True


def keep(name: str, library: Path) -> None:
    """Keeps a library, whole or not at all, also beside other processes."""
    if not name or (folder := _folder()) is None:
        return
    with suppress(OSError):
        handle, beside = tempfile.mkstemp(dir=folder)
        os.close(handle)
        try:
            shutil.copyfile(library, beside)
            Path(beside).replace(folder / name)
        finally:
            Path(beside).unlink(missing_ok=True)
        for old in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-MOST]:
            old.unlink(missing_ok=True)


def _folder() -> Path | None:
    try:
        named = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
        if not base.parent.is_dir():
            return None
        folder = base / "pow2quant" / "c"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    mine = not hasattr(os, "getuid") or (
        found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )
    return folder if mine else None
