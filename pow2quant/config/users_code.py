"""Objects from the user's own files: `path/to/file.py:thing`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from pow2quant.errors import ConfigError, Pow2QuantError
from pow2quant.yaml_text import one_line


def is_in_file(name: str) -> bool:
    """Whether a name is written as `path/to/file.py:thing`."""
    return name.endswith(".py") or ".py:" in name


def from_file(name: str, error: type[Pow2QuantError] = ConfigError) -> Any:
    """The object that `path/to/file.py:thing` stands for. The file may import its neighbours, and as in its package.

    Raises `error`, naming the file, when it is not there or fails, or has no such thing (then with what it has).
    """
    file, _, thing = name.rpartition(":")
    path = Path(file).resolve()
    if not file.endswith(".py") or not thing:
        raise error(f"{name}: expected path/to/file.py:NAME")
    if not path.is_file():
        raise error(f"{file}: no such file")
    module = _module(path, error)
    if not hasattr(module, thing):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise error(f"{file}: has no {thing!r}; it has {', '.join(key for key in own if key[0] != '_') or 'nothing'}")
    return getattr(module, thing)


@contextmanager
def users_code(name: str, error: type[Pow2QuantError]) -> Iterator[None]:
    """Around calls into `file.py:thing`: what it raises becomes `error`.

    Neighbours of the file can be imported, and its package, from the folder in which that lies.
    """
    path = Path(name.partition(".py:")[0] + ".py" if ".py:" in name else name).resolve()
    before = list(sys.path)
    sys.path[:] = [str(path.parent), *before, str(_package_of(path)[1])]
    try:
        yield
    except Pow2QuantError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as raised:
        frames = [f.lineno for f in traceback.extract_tb(raised.__traceback__) if f.filename == str(path)]
        line = raised.lineno if isinstance(raised, SyntaxError) else frames[-1] if frames else None
        place = f"{path}, line {line}" if line else str(path)
        raise error(f"{place}: {type(raised).__name__}: {one_line(str(raised))}") from raised
    finally:
        sys.path[:] = before


def _package_of(path: Path) -> tuple[str, Path]:
    """The package that a file belongs to, as relative imports need it, and the folder in which the package lies."""
    top = path.parent
    while (top / "__init__.py").is_file() and (top.parent / "__init__.py").is_file():
        top = top.parent
    return ".".join(path.parent.relative_to(top.parent).parts), top.parent


def _module(path: Path, error: type[Pow2QuantError]) -> ModuleType:
    """The module in a file, executed once for each version of the file."""
    version = f"{path}:{path.stat().st_mtime_ns}"
    name = f"pow2quant_file_{sha256(version.encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)
        module.__file__, module.__package__ = str(path), _package_of(path)[0]
        try:
            with users_code(str(path), error):
                exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
