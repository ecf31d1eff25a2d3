"""Writing that loses nothing: a file or a folder is written beside its place and takes it in one step.

What is being written has a name of its own, `.NAME.<hex>.partial`, and its writer holds a lock on it, which the kernel
frees with the process. So the next run that writes into the same folder knows what a killed one has left, and removes
it, whichever process numbers the two have (in a container, both are 1).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from uuid import uuid4

from pow2quant.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and nothing cleared up
    fcntl = None  # type: ignore[assignment]

_LEFT = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.(?P<kind>partial|old)", re.DOTALL)
"""Names of what is being written, and of what is being replaced where the system cannot exchange two folders."""

_OUTPUT_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ENOTEMPTY,
    errno.EEXIST,
}


def write(path: Path, content: bytes) -> None:
    """Writes a file; its folder is made if need be. A reader sees the old file or the new one.

    Raises OutputError, and leaves no other file, when the folder or the disk does not allow it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path.parent)
        temporary, lock = _made(path, lambda beside: beside.touch(exist_ok=False))
        try:
            with lock, temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path that no system knows, with a null byte
        raise _unwritable(path, error) from error


@contextmanager
def staged(target: Path, mark: str, *, overwrite: bool = True) -> Iterator[Path]:
    """A folder to write into that becomes `target` when all went well, and vanishes otherwise.

    mark: a pattern of a file in `target` that says it is of the same kind and may be replaced where `overwrite` is set,
    with everything in it; an empty folder always may be, one with another of its kind inside may not.
    Raises OutputError when `target` may not be replaced, or the folder or the disk does not allow writing; `target` is
    then still as it was.
    """
    with _staging(target, lambda there: _check_free(there, mark, overwrite)) as (staging, there):
        yield staging
        _check_free(there, mark, overwrite)  # another run may have come first


@contextmanager
def added(target: Path, names: Collection[str]) -> Iterator[Path]:
    """A folder to write files into that come into the folder `target` together when all went well.

    names: of files in `target` that these replace; those that are not written again vanish. Everything else stays.
    Raises OutputError as `staged` does.
    """
    with _staging(target, _check_is_folder) as (staging, there):
        yield staging
        if there.exists():
            _link(there, staging, names)


@contextmanager
def _staging(target: Path, check: Callable[[Path], None]) -> Iterator[tuple[Path, Path]]:
    """The folder to write into, and the resolved target that it becomes."""
    try:
        target = target.resolve()
        check(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target.parent)
        staging, lock = _made(target, Path.mkdir)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that go round, before Python 3.13
        raise _unwritable(target, error) from error
    try:
        with lock:
            yield staging, target
            _flush(staging)
            _swap(staging, target)
    except OSError as error:
        here = error.filename is None or str(error.filename).startswith((str(staging), str(target)))
        if error.errno not in _OUTPUT_ERRORS or not here:
            raise
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for files that are read by other programs, gone afterwards. Raises OutputError where none can be made.

    Those of killed runs go too.
    """
    try:
        folder = Path(tempfile.gettempdir()).resolve()
        _clear(folder)
        made, lock = _made(folder / "pow2quant", lambda beside: beside.mkdir(mode=0o700))
    except OSError as error:
        raise OutputError(f"no folder for temporary files (TMPDIR): {error.strerror or error}") from error
    try:
        with lock:
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}.{kind}")


def _unwritable(path: Path, error: Exception) -> OutputError:
    return OutputError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def _check_is_folder(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; the output must be a folder")


def _check_free(target: Path, mark: str, overwrite: bool) -> None:
    _check_is_folder(target)
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"{target}: exists already; choose another output, or replace it: --overwrite, in Python overwrite=True"
        )
    if not any(target.glob(mark)):
        raise OutputError(f"{target}: holds no {mark}, so it is not what would be written, and is not overwritten")
    inner = next((file.parent for depth in ("*", "*/*") for file in target.glob(f"{depth}/{mark}")), None)
    if inner is not None:
        raise OutputError(f"{target}: holds another of its kind, {inner.name}, which would be lost; move it elsewhere")


def _made(target: Path, make: Callable[[Path], object]) -> tuple[Path, _Held]:
    """A file or folder beside the target, locked; made again where another run has cleared it up between the two."""
    while True:
        path = _beside(target, "partial")
        make(path)
        held = _Held.take(path)
        if held is not None:
            return path, held


class _Held:
    """A lock on a file or folder as long as the `with` lasts."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path) -> _Held | None:
        """None where another holds it, or it is no longer there."""
        if fcntl is None:
            return cls(None)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return cls(descriptor)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                os.close(descriptor)
                return cls(None)
        os.close(descriptor)
        return None

    @property
    def sure(self) -> bool:
        """Whether the system can say that no other process holds it."""
        return self._descriptor is not None

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor is not None:
            with suppress(OSError):  # a process forked from this one may have it too: closing would not be enough
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)


def _clear(folder: Path) -> None:
    """Removes what killed runs have left in a folder, and puts back what one was about to replace."""
    with suppress(OSError):  # a folder that cannot be read is no reason to fail
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            found = _LEFT.fullmatch(entry.name)
            if found and not entry.is_symlink() and entry.stat().st_uid == _user(entry):
                _clear_one(folder / entry.name, folder / found["name"], found["kind"])


def _user(entry: os.DirEntry[str]) -> int:
    return os.getuid() if hasattr(os, "getuid") else entry.stat().st_uid


def _clear_one(left: Path, target: Path, kind: str) -> None:
    held = _Held.take(left)
    if held is None:
        return
    with held:
        if not held.sure:
            return
        if kind == "old" and not target.exists():
            left.rename(target)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _link(target: Path, staging: Path, but: Collection[str]) -> None:
    """Takes into `staging` what `target` has and it has not, but for these names."""

    def link(source: str, copy: str) -> None:
        try:
            os.link(source, copy, follow_symlinks=False)
        except OSError:  # a file system without links
            shutil.copy2(source, copy, follow_symlinks=False)

    for entry in target.iterdir():
        copy = staging / entry.name
        if copy.exists() or entry.name in but or _LEFT.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, copy, symlinks=True, copy_function=link)
        else:
            link(str(entry), str(copy))


def _flush(folder: Path) -> None:
    """Has everything in a folder on the disk before it takes another's place."""
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    os.fsync(file.fileno())


def _swap(staging: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.replace(staging, target)
        return
    if _exchanged(staging, target):
        return
    old = _beside(target, "old")
    with _Held.take(target) or nullcontext():
        target.rename(old)
        try:
            staging.rename(target)
        except BaseException:
            old.rename(target)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step. Linux can, on most file systems; False elsewhere, and nothing has changed."""
    if not sys.platform.startswith("linux"):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h>
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return int(call(here, os.fsencode(one), here, os.fsencode(other), exchange)) == 0
