"""Reading files that may come from strangers: what is no file is not opened, and every size and depth has a bound."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from pow2quant.errors import FileFormatError, Pow2QuantError

MOST_TEXT = 1 << 20
"""Bytes of a configuration, a study or a chip's table: a thousand layers with settings of their own need a tenth."""

MOST_JSON = 1 << 28
"""Bytes of encodings, reports and statistics; those of a hundred million scales."""

MOST_DEPTH = 100
"""Lists and objects inside each other, in JSON; ours have ten."""


def check_is_file(path: str | os.PathLike[str], error: type[Pow2QuantError] = FileFormatError) -> Path:
    """The path of a regular file that holds something, or of a link to one. Raises `error` for everything else.

    A pipe would wait for ever, a device has no end, and files of /proc, which call themselves empty, may do either.
    """
    if not _size(path, error):
        raise error(f"{path}: cannot be read: is empty")
    return Path(path)


def _size(path: str | os.PathLike[str], error: type[Pow2QuantError]) -> int:
    try:
        found = os.stat(path)
    except (OSError, ValueError) as reason:  # ValueError: a null byte
        what = "no such file" if isinstance(reason, FileNotFoundError) else getattr(reason, "strerror", None) or reason
        raise error(f"{path}: cannot be read: {what}") from None
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no file, but a pipe or a device"
        raise error(f"{path}: cannot be read: is {what}")
    return found.st_size


def text(path: str | os.PathLike[str], most: int, error: type[Pow2QuantError] = FileFormatError) -> str:
    """A file of at most so many bytes as UTF-8 text. Raises `error`, naming the file, for everything else."""
    if not _size(path, error):
        return ""
    try:
        with open(path, "rb") as opened:
            content = opened.read(most + 1)
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}") from None
    if len(content) > most:
        raise error(f"{path}: is larger than {most:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise error(f"{path}: not UTF-8 text") from None


def parsed(content: str | bytes, nan: bool = True) -> Any:
    """What JSON says. Raises ValueError for what is none, and for lists and objects more than `MOST_DEPTH` deep.

    nan: whether NaN and infinity may be in it, which Python writes and JSON does not know.
    """
    try:
        found = json.loads(content, parse_constant=None if nan else _no_number)
    except RecursionError:
        raise ValueError(f"lists or objects are more than {MOST_DEPTH} deep") from None
    _check_depth(found)
    return found


def _check_depth(value: Any) -> None:
    level: list[Any] = [[value]]
    for _ in range(MOST_DEPTH + 1):
        items = (item for each in level for item in (each.values() if type(each) is dict else each))
        level = [item for item in items if type(item) in (dict, list)]
        if not level:
            return
    raise ValueError(f"lists or objects are more than {MOST_DEPTH} deep")


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")
