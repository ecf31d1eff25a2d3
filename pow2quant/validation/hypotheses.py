"""Why an executor's codes are not the exact ones: hypotheses, each a prediction of its codes.

A hypothesis takes a `Side` and the elements that are wrong, and gives a sentence where its prediction is right in every
element, or in those that it speaks of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.integer.nodes import Window, attribute, axes_of
from pow2quant.operators import MOVES, Values, values
from pow2quant.validation.exact import LINEAR, Side, grid_ends

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from pow2quant.validation.exact import Floats, Ints

    Mask = NDArray[np.bool_]
    Hypothesis = Callable[[Side, Mask], str | None]

ENOUGH = 16
"""A channel's constant explains fewer elements too easily, unless something else speaks for the bias."""

MOST = 256
"""Sums of products are followed product by product for at most so many elements."""


def _ties(side: Side, wrong: Mask) -> str | None:
    u, zero, core = side.u, side.zero, side.part.core
    exact = (*MOVES, Values.CLIPPED, Values.JOINED)
    if core is not None and core.op_type not in LINEAR and values(core.op_type) not in exact:
        return None  # a function's result lies halfway by chance only
    if (np.abs(u - np.rint(u)) != 0.5)[wrong].any():
        return None
    halfway = f"the exact result lies halfway between two codes in {_all(wrong)}"
    if (zero % 2).all() and side.gives(np.rint(u + zero) - zero):
        odd = int(np.ravel(zero)[0])
        return f"{halfway}, and the zero point {odd} is odd: {side.name} adds it before rounding half to even"
    rules = {
        "away from zero": np.copysign(np.floor(np.abs(u) + 0.5), u),
        "up": np.floor(u + 0.5),
        "down": np.ceil(u - 0.5),
        "towards zero": np.copysign(np.ceil(np.abs(u) - 0.5), u),
    }
    found = [rule for rule, rounded in rules.items() if side.gives(rounded)]
    how = f"rounds ties {' or '.join(found)}, not to even" if found else "does not round all ties to even"
    return f"{halfway}, and {side.name} {how}{_because(side)}"


def _saturates(side: Side, wrong: Mask) -> str | None:
    rounded = np.rint(side.u) + side.zero
    low, high = side.codes.min(), side.codes.max()
    if (np.clip(rounded, low, high) == side.codes).all():
        ends = [
            f"{end} instead of {int(np.ravel(right)[0])}"
            for end, right in ((low, side.low), (high, side.high))
            if (side.codes == end)[wrong].any()
        ]
        return f"{side.name} ends at code {' and '.join(ends)} in {_all(wrong)}"
    qmin, qmax = grid_ends(side.encoding)
    wrapped = np.mod(np.clip(rounded, *side.ends) - qmin, qmax - qmin + 1) + qmin
    if (wrapped == side.codes).all():
        return f"{side.name} wraps around instead of saturating in {_all(wrong)}"
    return None


def _shifted(side: Side, wrong: Mask) -> str | None:
    inner = wrong & (side.codes > side.low) & (side.codes < side.high)
    steps = np.unique((side.codes - side.correct)[inner if inner.any() else wrong])
    if steps.size == 1 and side.gives(np.rint(side.u) + steps[0]):
        zero = int(np.ravel(side.zero)[0])
        step = int(steps[0])
        return f"all codes of {side.name} are shifted by {step:+d}: it adds {zero + step} as zero point, not {zero}"
    return None


def _scaled(side: Side, wrong: Mask) -> str | None:
    for k in (k for n in range(1, 17) for k in (n, -n)):
        if side.gives(np.rint(np.ldexp(side.u, k))):
            return f"{side.name} gives 2^{k} times the exact result: a scale or a shift is off by {abs(k)}"
    return None


@dataclass(frozen=True, eq=False)
class _Terms:
    """The products behind some elements of a convolution or matrix product, the input's channels innermost.

    codes, weight: (P, K), as they are stored. zero: the input's zero point. unit: (P,), one product in LSB of the
    result. at: where in the stored weight the k-th weight of an output channel lies.
    """

    codes: Ints
    weight: Ints
    zero: int
    unit: Floats
    at: Callable[[int, int], tuple[int, ...]]

    @classmethod
    def of(cls, side: Side, places: Ints) -> _Terms | None:
        """Of the elements at `places` (P, dimensions); None for other operations."""
        core, part, table = side.part.core, side.part, side.witness.network.encodings
        if core is None or core.op_type not in ("Conv", "Gemm", "MatMul") or core.input[1] not in part.constants:
            return None
        x, w = (table.get(name) for name in core.input[:2])
        weight = part.constant(core.input[1])
        if x is None or w is None or x.axis is not None or side.scale.ndim or weight.ndim > 4:
            return None
        codes, weight = x.quantize(part.value(core.input[0])), w.quantize(weight)
        find = _patches if core.op_type == "Conv" else _rows
        rows, matrix, at = find(core, codes, weight, int(x.zero_point), places)
        channels = places[:, 1 if core.op_type == "Conv" else -1]
        unit = x.scale.astype(np.float64) * np.broadcast_to(w.scale, len(matrix))[channels] / side.scale
        return cls(rows, matrix[channels], int(x.zero_point), unit, at)


Found = tuple["Ints", "Ints", Callable[[int, int], tuple[int, ...]]]
"""Codes (P, K), the weight (C_out, K), and where an entry of it lies in the file's."""


def _patches(core: onnx.NodeProto, codes: Ints, weight: Ints, zero: int, places: Ints) -> Found:
    window = Window.along(axes_of(core, weight.shape[2:], codes.shape[2:]))
    patches = window.patches(codes.reshape(*codes.shape[:2], *window.size), zero)
    count, size = weight.shape[1], len(weight) // attribute(core, "group", 1)
    rows = [
        patches[(p[0], slice(p[1] // size * count, (p[1] // size + 1) * count), *([0] * (4 - len(p))), *p[2:])]
        for p in places
    ]

    def at(channel: int, k: int) -> tuple[int, ...]:
        *tap, source = np.unravel_index(k, (*weight.shape[2:], count))
        return (channel, int(source), *map(int, tap))

    return (
        np.stack([np.moveaxis(row, 0, -1).ravel() for row in rows]),
        np.moveaxis(weight, 1, -1).reshape(len(weight), -1),
        at,
    )


def _rows(core: onnx.NodeProto, codes: Ints, weight: Ints, zero: int, places: Ints) -> Found:
    transposed = bool(attribute(core, "transB", 0))
    matrix = weight if transposed else weight.T
    return codes[tuple(places[:, :-1].T)], matrix, lambda m, k: (m, k) if transposed else (k, m)


def _sixteen_bits(side: Side, wrong: Mask) -> str | None:
    """Sums of two neighbouring products of unsigned and signed 8-bit codes that saturate at 16 bits (VPMADDUBSW)."""
    places = np.argwhere(wrong)[:MOST]
    terms = _Terms.of(side, places)
    if terms is None or terms.codes.min() < 0 or terms.codes.max() > 255 or np.abs(terms.weight).max() > 128:
        return None
    products = np.pad(terms.codes * terms.weight, ((0, 0), (0, terms.codes.shape[1] % 2)))
    pairs = products[:, 0::2] + products[:, 1::2]
    lost = (pairs - np.clip(pairs, -(2**15), 2**15 - 1)).sum(1)
    rounded = np.rint(side.u[tuple(places.T)] - lost * terms.unit) + side.zero
    if (np.clip(rounded, side.low, side.high) != side.codes[tuple(places.T)]).any():
        return None
    return f"{side.name} lets sums of two u8 x s8 products saturate at 16 bits: this processor's kernels lack VNNI"


def _weight(side: Side, wrong: Mask) -> str | None:
    """One integer of the weight that is another: the only one whose change all elements of the channel allow."""
    axis = 1 if side.part.core is not None and side.part.core.op_type == "Conv" else wrong.ndim - 1
    channels = np.unique(np.argwhere(wrong)[:, axis])
    if len(channels) != 1:
        return None
    same = np.argwhere(~wrong)
    places = np.concatenate([np.argwhere(wrong)[:MOST], same[same[:, axis] == channels[0]][:MOST]])
    terms = _Terms.of(side, places)
    if terms is None:
        return None
    least, most = (bound[tuple(places.T)][:, None] for bound in _allowed(side))
    adds = (terms.codes - terms.zero) * terms.unit[:, None]  # per unit of the weight
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = least / adds, most / adds
    idle = np.where((least <= 0) & (most >= 0), -np.inf, np.inf)
    bottom = np.ceil(np.where(adds == 0, idle, np.where(adds > 0, *ends)).max(0) - 1e-9)
    top = np.floor(np.where(adds == 0, -idle, np.where(adds > 0, *ends[::-1])).min(0) + 1e-9)
    fits = np.flatnonzero(bottom <= top)
    if len(fits) != 1:
        return None
    k, old = int(fits[0]), int(terms.weight[0, fits[0]])
    new = str(int(old + top[k])) if top[k] == bottom[k] else "another value"
    core = side.part.core
    name = f"{core.input[1] if core else ''}[{', '.join(map(str, terms.at(int(channels[0]), k)))}]"
    return f"{side.name} computes with {new} instead of {old} as {name}: that explains {_all(wrong)}"


def _float32(side: Side, wrong: Mask) -> str | None:
    """Rounding of float32 sums and functions: only where the certificate does not exclude it."""
    if not side.reason:
        return None
    missed = np.maximum(np.abs(side.u - (side.codes - side.zero)) - 0.5, 0)  # what rounding does not explain
    if (missed > np.ldexp(side.part.magnitude(), -22) / side.scale)[wrong].any():
        return None
    off = f", at most {missed[wrong].max():.1g} LSB before the last rounding" if missed[wrong].any() else ""
    return f"the rounding of float32 explains {_all(wrong)} in {side.name}{off}: {side.reason}"


def _offset(side: Side, wrong: Mask) -> str | None:
    """A constant b per channel with codes = round(u + b): the interval of every element, intersected."""
    axis = min(1, wrong.ndim - 1)
    least, most = _allowed(side)
    others = tuple(a for a in range(wrong.ndim) if a != axis)
    channels = np.flatnonzero(wrong.any(others))
    bottom, top = least.max(others), most.min(others)
    if (bottom > top).any() or not np.isfinite([bottom, top])[:, channels].any(0).all():
        return None
    if not side.reason.startswith("bias") and wrong.size // wrong.shape[axis] < ENOUGH:
        return None
    middle = np.where(np.isinf(bottom), top, np.where(np.isinf(top), bottom, (bottom + top) / 2))
    c = channels[np.argmax(np.abs(middle[channels]))]
    more = f" and others in {len(channels) - 1} more" if len(channels) > 1 else ""
    core = side.part.core
    biased = core is not None and core.op_type in ("Conv", "ConvTranspose", "Gemm") and len(core.input) > 2
    because = _because(side) or (f": it does not add {core.input[2]} as the file has it" if core and biased else "")
    return (
        f"one constant per channel explains {_all(wrong)}: {side.name} adds "
        f"{middle[c]:+.3g} LSB too much in channel {c}{more}{because}"
    )


HYPOTHESES: tuple[Hypothesis, ...] = (
    *(_ties, _saturates, _shifted, _scaled, _sixteen_bits, _float32, _offset, _weight),
)
"""In the order in which they are tried: the sharpest first."""


def _allowed(side: Side) -> tuple[Floats, Floats]:
    """From where to where something may be added to the exact results, for their codes to be the executor's."""
    nearest = side.codes - side.zero - side.u
    least = np.where(side.codes > side.low, nearest - 0.5, -np.inf)
    return least, np.where(side.codes < side.high, nearest + 0.5, np.inf)


def _because(side: Side) -> str:
    return f": {side.reason}" if side.reason else ""


def _all(wrong: Mask) -> str:
    n = int(wrong.sum())
    return f"all {n:,} differing elements" if n > 1 else "the only differing element"
