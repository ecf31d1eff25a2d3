"""YAML as users write it: safe, small, without duplicate keys; and the text that is written back."""

from __future__ import annotations

import re
from typing import Any

import yaml

from pow2quant.errors import ConfigError

MOST_DEPTH, MOST_VALUES = 30, 100_000
"""Of a YAML file: values inside each other, and values altogether, those that aliases repeat counted again."""


class Loader(yaml.SafeLoader):
    """YAML 1.1, in which 1e-4 is a number too. Raises ConfigError for a file that is too deep or has too much in it."""

    depth = count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > MOST_DEPTH:
            raise ConfigError(f"values are more than {MOST_DEPTH} deep")
        if self.count > MOST_VALUES:
            raise ConfigError(f"there are more than {MOST_VALUES:,} values")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Its counterpart: the text "1e-4" is quoted."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse(text: str, source: str) -> Any:
    """YAML -> plain values; an empty file is an empty mapping. Raises ConfigError, naming `source`."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        _reject_what_grows(node, {})
        _reject_duplicates(node, "")
        _reject_other_bases(node)
        return loader.construct_document(node)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{source}: not YAML: {place}{error.problem}") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{source}: not YAML: {reason}") from None


def _reject_what_grows(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values a node has with everything that its aliases repeat. Raises ConfigError for too many, or a circle.

    known: the sizes of nodes by identity; None while one is being counted.
    """
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ConfigError(f"a value contains itself (line {node.start_mark.line + 1})")
        return size
    known[id(node)] = None
    items: list[Any] = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
    parts = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
    size = 1 + sum(_reject_what_grows(part, known) for part in parts)
    if size > MOST_VALUES:
        raise ConfigError(f"with its aliases it has more than {MOST_VALUES:,} values")
    known[id(node)] = size
    return size


def _reject_duplicates(node: yaml.Node | None, path: str) -> None:
    """Raises ConfigError for a key that a mapping has twice (YAML would silently keep the last)."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _reject_duplicates(item, path)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            where = f"{path}.{key.value}".lstrip(".")
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConfigError(f"{one_line(where)}: given twice (line {key.start_mark.line + 1})")
            seen.add(str(key.value))
            _reject_duplicates(value, where)


def _reject_other_bases(node: yaml.Node) -> None:
    """Raises ConfigError for numbers that YAML 1.1 reads in base 8 or 60, such as 010 and 4:8."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in NUMBERS and re.match(r"[-+]?0[0-7_]*[0-7]$|.*:", node.value):
            line = node.start_mark.line + 1
            raise ConfigError(f"{node.value} is a number in another base in YAML (line {line}); for a text, use quotes")
        return
    for item in node.value:
        for part in item if isinstance(item, tuple) else (item,):
            _reject_other_bases(part)


NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
"""YAML's tags of numbers."""


def one_line(text: str) -> str:
    """A text without line breaks, as it can stand in an error."""
    return " ".join(text.split())
