"""What every page is made with: the templates, and how numbers are written in them."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pow2quant import foreign
from pow2quant.errors import FileFormatError

T = TypeVar("T")

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

NOTHING = "\u2013"
"""Stands where a report does not say."""

TEMPLATES = Path(__file__).parent / "templates"


def page(template: str, **values: Any) -> str:
    """A template of this package, rendered."""
    from markupsafe import Markup

    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Figures and script are this package's own; everything else is escaped.
    return _environment().get_template(template).render(values, script=Markup(script), script_hash=f"sha256-{digest}")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, Undefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)

    def stated(filter: Callable[..., str], otherwise: str = NOTHING) -> Callable[..., str]:
        return lambda v, *options: otherwise if v is None or isinstance(v, Undefined) else filter(v, *options)

    filters = {
        "number": _number,
        "percent": "{:.2f}\u00a0%".format,
        "size": _size,
        "duration": _duration,
        "milliseconds": _milliseconds,
        "signed": "{:+.4g}".format,
    }
    environment.filters |= {name: stated(filter) for name, filter in filters.items()}
    environment.filters |= {"plain": stated(repr, ""), "shortened": shortened, "stem": stem, "breakable": _breakable}
    return environment


def guarded(source: Path, make: Callable[[], T]) -> T:
    """What `make` makes of a file; its errors become a FileFormatError that names the file."""
    try:
        return make()
    except FileFormatError:
        raise
    except OSError as error:
        raise FileFormatError(f"{source}: cannot be read: {error.strerror}; give a finished run's folder") from error
    except Exception as error:  # rendering trips over a foreign document in every way there is
        raise FileFormatError(f"{source}: not a report of pow2quant, or a file beside it is none: {error}") from error


def read(path: Path) -> dict[str, Any]:
    """A JSON object."""
    found = foreign.parsed(foreign.text(path, foreign.MOST_JSON))
    if not isinstance(found, dict):
        raise TypeError(f"expected an object, got {type(found).__name__}")
    return found


def stem(model: str) -> str:
    """A model's name without the folders of its file."""
    return model.replace("\\", "/").rpartition("/")[2]


def shortened(text: str, most: int) -> str:
    """Its beginning and its end, where it is longer than `most`."""
    head = most // 3
    return text if len(text) <= most else f"{text[:head]}…{text[head + 1 - most :]}"


def _breakable(name: str) -> Markup:
    """A name that may be broken behind dots, underscores and plus signs."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([._+])", r"\1<wbr>", str(escape(name))))


def _number(value: Any, digits: int | None = None) -> str:
    """`1,234` or `12.5`; `digits` decimals where they are given."""
    if isinstance(value, float) and not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    return f"{value:,.{digits}f}" if digits is not None else f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _duration(seconds: Any) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _milliseconds(seconds: Any) -> str:
    return f"{1000 * seconds:.3g} ms"


def _size(value: Any) -> str:
    """Bytes in binary units."""
    power = min(3, int(math.log2(value)) // 10) if value >= 1 else 0
    return f"{value / 1024**power:.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
