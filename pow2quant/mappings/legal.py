"""What the values of a key may be, in words for the user and as a check, and the error for what is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pow2quant.errors import ConfigError
from pow2quant.yaml_text import one_line

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


@dataclass(frozen=True)
class Legal:
    """In a field's annotation: what its values may be. pydantic reads it there.

    words: for the user. accepts: whether a value of the right type is legal. read, write: for values that are written
    differently in YAML; `read` raises TypeError, ValueError, KeyError or AttributeError for what it cannot read.
    """

    words: Callable[[], str]
    accepts: Callable[[Any], bool] = lambda value: True
    read: Callable[[Any], Any] | None = None
    write: Callable[[Any], Any] | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The type's own check, or `read`, and then `accepts`."""
        from pydantic_core import core_schema

        if (read := self.read) is not None:
            return core_schema.no_info_plain_validator_function(lambda value: self._accepted(read(value)))
        return core_schema.no_info_after_validator_function(self._accepted, handler(source))

    def _accepted(self, value: Any) -> Any:
        if not self.accepts(value):
            raise ValueError(self.words())
        return value


def integer(low: int, high: float = math.inf) -> Legal:
    """Integers from `low` to `high`, both included."""
    words = f"an integer from {low} {'up, below 2^31' if high == math.inf else f'to {high}'}"
    most = 2**31 - 1 if high == math.inf else high
    return Legal(lambda: words, lambda v: low <= v <= most)


def finite(words: str, accepts: Callable[[float], bool] = lambda v: True) -> Legal:
    """Finite numbers that `accepts` takes; `words` say so."""
    return Legal(lambda: words, lambda v: math.isfinite(v) and accepts(v))


ABOVE_ZERO = finite("a number above 0", lambda v: v > 0)
FROM_ZERO = finite("a number from 0 up", lambda v: v >= 0)
SHARE = finite("a number from 0 to 1", lambda v: 0 <= v <= 1)


def one_of(options: Callable[[], Any]) -> Legal:
    """What `options()` holds."""
    return Legal(lambda: f"one of {', '.join(sorted(options()))}", lambda v: v in options())


def illegal(path: str, value: Any, words: str) -> ConfigError:
    """The error for a value that a key cannot have; `words` say what it can."""
    try:
        text = json.dumps(value) if isinstance(value, bool | int | float | str | None) else one_line(repr(value))
    except ValueError:
        text = "an integer of thousands of digits"
    return ConfigError(
        f"{one_line(path)}: {text if len(text) <= 60 else text[:57] + '...'} is not legal; legal: {words}"
    )


def unknown(path: str, key: str, known: Iterable[str]) -> ConfigError:
    """The error for a key that there is not."""
    nearest = [f", did you mean {match}?" for match in get_close_matches(key, known, n=1, cutoff=0.5)]
    return ConfigError(f"{one_line(path)}: unknown key{''.join(nearest)}; known: {', '.join(known)}")
