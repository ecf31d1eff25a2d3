"""Places in which every command has to work or say why it cannot: no home, no space, no rights, odd folders."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.attacks.good import copied
from tests.attacks.harness import Case
from tests.attacks.own import BASES

NOBODY = 65534


def places(good: Path) -> Iterator[Case]:
    """Every command in every place."""
    for command, base in BASES.items():
        for name, change in PLACES.items():
            yield Case("place", f"{command}: {name}", partial(_placed, good, command, base, change))


def _placed(good: Path, command: str, base: list[str], change: Callable[[Path], None], folder: Path) -> list[str]:
    copied(good, folder)
    change(folder)
    return [command, *base]


def _without(name: str, folder: Path) -> None:
    os.environ.pop(name, None)


def _set(name: str, value: str, folder: Path) -> None:
    import tempfile

    os.environ[name] = value
    tempfile.tempdir = None


def _moved(name: str, folder: Path) -> None:
    """The same files in a folder of another name."""
    inner = folder / name
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path != inner:
            shutil.move(path, inner / path.name)
    config = inner / "run" / "config.yaml"
    config.write_text(config.read_text().replace("mine.py:", "./mine.py:"))
    os.chdir(inner)


def _unprivileged(owns: bool, folder: Path) -> None:
    """As a user without rights, who owns the files or may only read them."""
    os.environ["HOME"] = "/nonexistent"
    if os.geteuid() or any(not parent.stat().st_mode & 1 for parent in Path(os.__file__).parents):
        return  # no root, or only root reads this Python
    folder.parent.chmod(0o755)
    for path in (folder, *folder.rglob("*")) if owns else ():
        os.chown(path, NOBODY, NOBODY)
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _limited(what: int, value: int, folder: Path) -> None:
    resource.setrlimit(what, (value, value))


def _closed(descriptor: int, folder: Path) -> None:
    os.close(descriptor)


def _full(descriptor: int, folder: Path) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


PLACES: dict[str, Callable[[Path], None]] = {
    "no HOME": partial(_without, "HOME"),
    "HOME that is not there": partial(_set, "HOME", "/nonexistent/home"),
    "TMPDIR that is not there": partial(_set, "TMPDIR", "/nonexistent/tmp"),
    "no PATH": partial(_set, "PATH", ""),
    "language C": partial(_set, "LC_ALL", "C"),
    "spaces": partial(_moved, "a b  c"),
    "a newline": partial(_moved, "a\nb"),
    "Chinese": partial(_moved, "名前 é"),
    "quotes": partial(_moved, "a'b\"c$(touch EXECUTED)`x`"),
    "a long name": partial(_moved, "x" * 200),
    "no rights, own files": partial(_unprivileged, True),
    "no rights, another's files": partial(_unprivileged, False),
    "files of at most 3 kB": partial(_limited, resource.RLIMIT_FSIZE, 3000),
    "files of at most 20 kB": partial(_limited, resource.RLIMIT_FSIZE, 20_000),
    "few open files": partial(_limited, resource.RLIMIT_NOFILE, 24),
    "closed stdout": partial(_closed, 1),
    "closed stderr": partial(_closed, 2),
    "full stdout": partial(_full, 1),
}
