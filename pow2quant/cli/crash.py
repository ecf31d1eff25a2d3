"""What is said of an error that no module of pow2quant raised on purpose: whose it is, and a file about it to send."""

from __future__ import annotations

import platform
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from uuid import uuid4

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "numpy",
    "pyyaml",
    "pydantic",
    "typer",
    "safetensors",
    "optuna",
)
MOST_FRAMES = 60
"""So many calls, the last ones, are written down: an endless recursion has no end."""


def own_code(error: BaseException) -> str | None:
    """`file, line N: Type: text` where the error comes out of code that is neither pow2quant's nor a library's.

    The last call from pow2quant must lead into that code: what pow2quant itself does wrong later is not meant.
    """
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if _is_below(frame, PACKAGE):
            found = None
        elif _is_users(frame):
            found = f"{frame.f_code.co_filename}, line {line}"
    return found and f"{found}: {type(error).__name__}: {_shortened(str(error))}"


def report(error: BaseException, arguments: Sequence[str]) -> Path | None:
    """Writes `pow2quant-crash-TIME.txt` here, or among the temporary files; None where neither can be done.

    It holds versions, names of flags, and calls inside pow2quant and libraries; no values, no texts, no paths.
    """
    text = _text(error, arguments)
    name = f"pow2quant-crash-{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:4]}.txt"
    for folder in (".", None):
        with suppress(OSError):
            path = Path(tempfile.gettempdir() if folder is None else folder) / name
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return path
    return None


def _text(error: BaseException, arguments: Sequence[str]) -> str:
    from pow2quant import __version__

    flags = [a.partition("=")[0] for a in arguments if a.startswith("-")]
    flags = [flag for flag in flags if flag.lstrip("-").replace("-", "").isalpha() and len(flag) < 40]
    lines = [
        "A defect in pow2quant. Please send this file to its maintainers.",
        "It holds no values, texts or paths of yours; the error's own text is left out, as it may.",
        "",
        f"pow2quant {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        ", ".join(f"{name} {_version(name)}" for name in LIBRARIES),
        f"command: {_command(arguments)} {' '.join(flags)}",
        "",
    ]
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        lines += [f"{type(current).__name__}, from:", *_calls(current), ""]
        current = current.__cause__ or current.__context__
    return "\n".join(lines)


def _command(arguments: Sequence[str]) -> str:
    commands = {"ptq", "qat", "validate", "export", "report", "list", "search", "sweep", "compare", "correct", "logits"}
    return next((a for a in arguments if a in commands), "")


def _calls(error: BaseException) -> list[str]:
    calls = list(traceback.walk_tb(error.__traceback__))
    return [
        "  your own code" if _is_users(frame) else f"  {_place(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}"
        for frame, line in calls[-MOST_FRAMES:]
    ]


def _place(file: str) -> str:
    """A file of a package or of Python, from the package on."""
    path = Path(file)
    for root in (PACKAGE.parent, *_libraries()):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return path.name


def _is_below(frame: FrameType, folder: Path) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(folder)


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if file.startswith("<") or _is_below(frame, PACKAGE):
        return False
    return not any(_is_below(frame, root) for root in _libraries())


def _libraries() -> list[Path]:
    """Where libraries and Python's own modules are, the launcher's folder too."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")}
    paths |= {folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")}
    return [Path(path) for path in paths if path]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."
