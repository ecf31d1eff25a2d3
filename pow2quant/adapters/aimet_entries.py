"""One encoding of AIMET's files, in each version: which fields it has, and what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from pow2quant.errors import FileFormatError
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

Exact = tuple[IntGrid, int | None]
"""The grid and the channel axis, where the file states them under our own key."""

SHAPES = "pow2quant.block_scales"
"""The key, at the top of a 1.0.0 file, of the shapes of the scales of weights with blocks."""

FLOAT32_MAX = float(np.finfo(np.float32).max)


def container(grid: IntGrid) -> IntGrid:
    """The grid that AIMET sees: one width, not narrow."""
    return IntGrid(grid.width, grid.signed)


@dataclass(frozen=True)
class Entry:
    """The fields of one encoding, whose errors name the file, the tensor and the key.

    shape: of the scales of blocks, where the file states it.
    """

    where: str
    fields: Any
    shape: Any = None

    def refuse(self, key: str, problem: str) -> NoReturn:
        raise FileFormatError(f"{self.where}: {key} {problem}")

    def __getitem__(self, key: str) -> Any:
        if not isinstance(self.fields, dict):
            raise FileFormatError(f"{self.where}: expected an object, got {type(self.fields).__name__}")
        if key not in self.fields:
            self.refuse(key, "is missing")
        return self.fields[key]

    def one(self, key: str, kind: type) -> Any:
        if type(self[key]) is not kind:
            self.refuse(key, f"must be of type {kind.__name__}, got {self[key]!r}")
        return self[key]

    def flag(self, key: str) -> bool:
        return self.flags(key, [self[key]]) == {True}

    def flags(self, key: str, values: list[Any]) -> set[bool]:
        texts = set(map(str, values))  # 1.0.0 has true, 0.6.1 "True"
        if not texts <= {"True", "False"}:
            self.refuse(key, f"must be True or False, got {min(texts - {'True', 'False'})!r:.80}")
        return {text == "True" for text in texts}

    def numbers(self, key: str, nested: bool = False) -> NDArray[np.float64]:
        value = self[key]
        for number in _flat(value) if nested else value if isinstance(value, list) else [value]:
            if type(number) not in (int, float) or not abs(number) <= FLOAT32_MAX:
                self.refuse(key, f"must be finite numbers, got {number!r:.80}")
        if value == []:
            self.refuse(key, "is empty")
        try:
            return np.asarray(value, np.float64)
        except ValueError:
            self.refuse(key, "must be lists of equal lengths")

    def integers(self, key: str, nested: bool = False) -> NDArray[np.int64]:
        numbers = self.numbers(key, nested)
        if (numbers != np.rint(numbers)).any() or (np.abs(numbers) > 1 << 32).any():
            self.refuse(key, f"must be whole numbers of at most 32 bits, got {self[key]!r:.80}")
        return numbers.astype(np.int64)

    def integer(self, key: str) -> int:
        value = self.integers(key)
        if value.ndim:
            self.refuse(key, f"must be one number, got {self[key]!r:.80}")
        return int(value)


Reader = Callable[[Entry, "Exact | None", int], "Encoding | None"]
"""(entry, what our own key says, the channel axis where nothing does) -> the encoding; None for a float tensor."""


def _flat(value: Any) -> Iterator[Any]:
    """What nested lists hold."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def from_0_6_1(entry: Entry, exact: Exact | None, axis: int) -> Encoding | None:
    """An entry of 0.6.1: a list, an object for each channel."""
    content = entry.fields if isinstance(entry.fields, list) else [entry.fields]
    if not content:
        entry.refuse("list of encodings", "is empty")
    if _is_float(Entry(entry.where, content[0]), "bitwidth"):
        return None
    channels = _by_key(entry.where, content, ("bitwidth", "scale", "offset", "is_symmetric"))
    unknown = "zero_point_shift", "rows_per_block"
    for fields in (f for f in content if not f.keys().isdisjoint(unknown)):
        _refuse_keys(Entry(entry.where, fields), unknown)
    bits = channels.integers("bitwidth").tolist()
    scale, offset = channels.numbers("scale"), channels.integers("offset")
    return _encoding(
        scale if len(content) > 1 else scale[0],
        offset,
        tuple(bits) if len(set(bits)) > 1 else bits[0],
        channels.flags("is_symmetric", channels["is_symmetric"]) == {True},
        exact,
        axis,
    )


def _by_key(where: str, channels: list[Any], keys: tuple[str, ...]) -> Entry:
    """The fields of several channels as one entry of lists, which are checked at once."""
    try:
        return Entry(where, {key: [fields[key] for fields in channels] for key in keys})
    except (KeyError, TypeError):
        for fields in channels:
            for key in keys:
                Entry(where, fields)[key]  # the error that names what is missing
        raise


def from_1_0_0(entry: Entry, exact: Exact | None, axis: int) -> Encoding | None:
    """An entry of 1.0.0: lists of scales and offsets."""
    kind = entry.one("enc_type", str)
    if _is_float(entry, "bw"):
        return None
    _refuse_keys(entry, ("zero_point_shift", "per_block_int_scale"))
    if kind == "PER_BLOCK":
        return _blocks(entry, exact, axis)
    _refuse_keys(entry, ("block_size",))
    if kind not in ("PER_TENSOR", "PER_CHANNEL"):
        entry.refuse("enc_type", f"must be PER_TENSOR, PER_CHANNEL or PER_BLOCK, got {kind!r}")
    scale, offset = np.atleast_1d(entry.numbers("scale")), np.atleast_1d(entry.integers("offset"))
    if scale.shape != offset.shape or (kind == "PER_TENSOR" and scale.size != 1):
        entry.refuse("scale", f"has {scale.size} values for {offset.size} offsets and enc_type {kind}")
    bits = entry.integer("bw")
    return _encoding(scale if kind == "PER_CHANNEL" else scale[0], offset, bits, entry.flag("is_sym"), exact, axis)


def _blocks(entry: Entry, exact: Exact | None, axis: int) -> Encoding:
    scale, offset, bits = entry.numbers("scale"), entry.integers("offset"), entry.integer("bw")
    shape = entry.shape
    if not (isinstance(shape, list) and all(type(n) is int for n in shape) and math.prod(shape) == scale.size):
        entry.refuse("block_size", f"needs the shape of {scale.size} scales under {SHAPES!r}; version 2.0.0 states it")
    narrow = bool((offset == 1 - (1 << (bits - 1))).all())
    grid, own = exact or (IntGrid(bits, True, narrow), axis)
    if not entry.flag("is_sym") or (offset != container(grid).qmin).any():
        entry.refuse("offset", f"must be {container(grid).qmin} with is_sym True where there are blocks")
    zero = np.zeros((), np.int64)
    return Encoding(scale.astype(np.float32).reshape(shape), zero, grid, own, entry.integer("block_size"))


def from_2_0_0(entry: Entry, exact: Exact | None, _: int) -> Encoding | None:
    """An entry of 2.x, which states its axis."""
    _refuse_keys(entry, ("per_block_int_scale",))
    unsigned, is_integer, bits = entry.one("output_dtype", str).partition("int")
    if not is_integer or unsigned not in ("", "u") or not bits.isdecimal() or len(bits) > 3:
        entry.refuse("output_dtype", f"must be an integer type such as uint8, got {entry['output_dtype']!r}")
    grid, axis = exact or (IntGrid(int(bits), not unsigned), None)
    blocks = bool(entry.fields.get("block_size"))
    scale = entry.numbers("y_scale", nested=blocks)
    if "axis" in entry.fields:
        axis = entry.one("axis", int)
        if axis < 0:
            entry.refuse("axis", f"must not be negative, got {axis}")
    elif scale.size == 1:
        scale = scale.reshape(())
    if blocks:
        stated = "y_zero_point" in entry.fields
        zero_point = entry.integers("y_zero_point", nested=True) if stated else np.zeros((), np.int64)
        channels = None if axis is None else 1 - axis
        return Encoding(scale.astype(np.float32), zero_point, grid, channels, entry.integer("block_size"))
    zero_point = entry.integers("y_zero_point") if "y_zero_point" in entry.fields else np.zeros_like(scale, np.int64)
    if zero_point.size not in (1, scale.size):
        entry.refuse("y_zero_point", f"has {zero_point.size} values for {scale.size} scales")
    return Encoding(scale.astype(np.float32), zero_point.reshape(-1 if scale.ndim else ()), grid, axis)


def _is_float(entry: Entry, width: str) -> bool:
    """Whether the entry says that its tensor stays float16 or float32."""
    kind = entry.one("dtype", str).lower()
    if kind == "float" and entry.integer(width) not in (16, 32):
        entry.refuse(width, f"must be 16 or 32 for dtype float, got {entry[width]!r}")
    if kind not in ("int", "float"):
        entry.refuse("dtype", f"must be int or float, got {entry['dtype']!r}")
    return bool(kind == "float")


def _refuse_keys(entry: Entry, keys: tuple[str, ...]) -> None:
    """Block-wise, vector and half-shifted grids have no counterpart here."""
    for key in keys:
        if isinstance(entry.fields, dict) and entry.fields.get(key):
            entry.refuse(key, "is not supported: only per-tensor and per-channel integer encodings are")


def _encoding(
    scale: NDArray[np.float64],
    offset: NDArray[np.int64],
    bits: int | tuple[int, ...],
    symmetric: bool,
    exact: Exact | None,
    axis: int,
) -> Encoding:
    """scale: () or (C,); offset: (C,) = qmin - zero point. Without `exact`, AIMET's own rules tell the grid.

    A symmetric grid from -2^(bits-1) on is signed, from one above it signed and narrow, from 0 on unsigned; everything
    else that is flagged symmetric is signed with a zero point, and what is not is unsigned.
    """
    half = np.int64(1) << (np.asarray(bits, np.int64) - 1)
    narrow = symmetric and bool((offset == 1 - half).all())
    grid = exact[0] if exact else IntGrid(bits, signed=symmetric and bool(offset.any()), narrow=narrow)
    lowest = grid.qmin if exact is None else container(grid).qmin
    channel_axis = exact[1] if exact else axis if scale.ndim else None
    shape = scale.shape if channel_axis is None else (-1,)
    return Encoding(scale.astype(np.float32).reshape(shape), (lowest - offset).reshape(shape), grid, channel_axis)
