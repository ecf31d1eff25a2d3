"""C as text: numbers, names, indices, and lines that fit."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.integer.program import Tensor

WIDTH = 120
"""Characters of a line."""

NBSP = "\N{NO-BREAK SPACE}"
"""Where a line is not broken."""


def ctype(tensor: Tensor) -> str:
    """The C type of a tensor's codes."""
    return f"{tensor.dtype}_t"


def numbers(values: NDArray[Any]) -> str:
    """Numbers of an initializer, in lines of equal counts."""
    texts = list(map(str, values.reshape(-1).tolist()))
    per_line = (WIDTH - 4) // (max(map(len, texts), default=1) + 2)
    return ",\n".join(f"    {', '.join(texts[i : i + per_line])}" for i in range(0, len(texts), per_line))


def indented(lines: Iterable[str]) -> list[str]:
    """Lines one level further in."""
    return [f"    {line}" for line in lines]


def braced(text: str) -> str:
    """Lines as a block of their own."""
    return "\n".join(["{", *indented(text.splitlines()), "}"])


def total(*terms: str) -> str:
    """Terms added up; empty ones and zeros are left out."""
    return " + ".join(t for t in terms if t not in ("", "0")) or "0"


def times(index: str, stride: int) -> str:
    """index * stride."""
    if stride == 1:
        return index.strip("()")
    return f"{index} * {stride}" if stride > 0 else f"{index} * ({stride})" if stride else ""


def plain(name: str) -> str:
    """What a C identifier can hold of an ONNX name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def comment(name: str) -> str:
    """An ONNX name as it can stand in a comment and in a table."""
    return re.sub(r"\*/|/\*|[^ -{}~]", "_", name)


def shape(tensor: Tensor) -> str:
    """A tensor's shape as text."""
    return f"({', '.join(map(str, tensor.shape))})"


def declared(kind: str, name: str, values: dict[str, Any]) -> str:
    """A constant struct with the names of its members."""
    return f"static const {kind} {name} = {{" + ", ".join(f".{key}{NBSP}={NBSP}{v}" for key, v in values.items()) + "};"


def fitted(text: str) -> list[str]:
    """Lines of C, one level further in, broken where they are too long."""
    lines = []
    for line in text.splitlines():
        inner = line.lstrip()
        indent = "    " + line[: len(line) - len(inner)]
        broken = textwrap.wrap(inner, WIDTH - len(indent), subsequent_indent="    ", break_on_hyphens=False)
        lines += [indent + part.replace(NBSP, " ") for part in broken]
    return lines
