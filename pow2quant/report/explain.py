"""How a layer's exponents came about: its values, the exponents that could have been, its accumulator and its shift.

Everything is read from a run's folder. Errors of other exponents are exact for weights whose float values are in the
state. For activations, and for weights that a method has rounded, they are estimated from the histogram, with the
values of a bin spread evenly.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant import run_folder, targets
from pow2quant.errors import ConfigError, FileFormatError
from pow2quant.pow2_constraints.arithmetic import ROUNDINGS, shift_round
from pow2quant.report.page import read
from pow2quant.report.scales import power

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CHANGES = range(2, -4, -1)
"""The candidates: what is added to the exponents in use."""

FINENESS = 16
"""Into so many parts a bin of a histogram is divided."""

EXACT = 2**24
"""Up to here float32 holds every integer."""

SUMS = {"Add", "Sub"}
"""Operations without weights whose sum is shifted."""

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Candidate:
    """Other exponents for a tensor. change: added to those in use.

    clipped: per cent of the values that saturate. rounding, clipping: per cent of the signal's energy that is lost to
    each. sqnr_db: of both; None where nothing is lost.
    """

    change: int
    clipped: float
    rounding: float
    clipping: float
    sqnr_db: float | None


@dataclass(frozen=True)
class Tensor:
    """One quantized tensor. scale: in words; histogram: as statistics.json has it; exact: so are the candidates."""

    name: str
    role: str
    scale: str
    minimum: float
    maximum: float
    histogram: Mapping[str, Any]
    exact: bool
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Explanation:
    """A layer. run: what the run did, in order. accumulator, steps: sentences about its sum and about its shift."""

    layer: str
    operation: str
    run: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    accumulator: tuple[str, ...]
    steps: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same in JSON's types."""
        return asdict(self)


def candidates(steps: Floats, count: Floats, energy: Floats, low: Floats, high: Floats) -> tuple[Candidate, ...]:
    """What coarser and finer exponents would lose.

    steps (n,): values in units of their scale, around the zero point. count (n,): how many each stands for. energy
    (n,): the squared scale of each. low, high (n,) or (): the ends of the grid, less the zero point.
    """
    signal = float(np.sum(count * energy * steps**2))
    found = []
    for change in CHANGES:
        wanted = np.ldexp(steps, -change)
        codes = np.clip(np.rint(wanted), low, high)
        saturates = (np.rint(wanted) < low) | (np.rint(wanted) > high)
        lost = count * energy * np.ldexp(wanted - codes, change) ** 2
        clipping, noise = float(lost[saturates].sum()), float(lost.sum())
        share = 100 / signal if signal else 0.0
        sqnr = 10 * math.log10(signal / noise) if signal and noise else None
        clipped = 100 * float(np.sum(count * saturates) / np.sum(count))
        found.append(Candidate(change, clipped, share * (noise - clipping), share * clipping, sqnr))
    return tuple(found)


class Sources:
    """The files of a run's folder that explanations are made of."""

    FILES = (run_folder.REPORT, run_folder.STATISTICS, run_folder.CERTIFICATE)

    def __init__(self, folder: Path) -> None:
        """Raises FileFormatError where one is missing, or not of pow2quant."""
        self.folder = folder
        self.report, self.statistics, certificate = (_read(folder / name) for name in self.FILES)
        self.bounds: Sequence[Mapping[str, Any]] = certificate["layers"]
        self.parameters, self.table = run_folder.load_state(folder / run_folder.STATE)

    @classmethod
    def there(cls, folder: Path) -> bool:
        """Whether the folder has all of them."""
        return all((folder / name).is_file() for name in (*cls.FILES, run_folder.STATE))

    def tensor(self, name: str) -> Tensor:
        """A tensor that was measured."""
        seen = self.statistics["tensors"][name]
        of_histogram = candidates(*_of_histogram(seen["histogram"]))
        found, exact = of_histogram, False
        if name in self.parameters:
            of_weight = candidates(*_of_weight(self.parameters[name], self.table[name]))
            exact = seen["sqnr_db"] is None or next(c for c in of_weight if c.change == 0).sqnr_db is not None
            found = of_weight if exact else of_histogram
        words = _words(self.report["final_quantization_details"].get(name, {}))
        return Tensor(name, seen["role"], words, seen["minimum"], seen["maximum"], seen["histogram"], exact, found)

    def explained(self, layer: str) -> Explanation:
        """A layer, by its own name or that of its tensor, weight or ONNX node. Raises ConfigError for another name."""
        box = _found(self.statistics.get("network") or [], layer, self.folder)
        details, measured = self.report["final_quantization_details"], self.statistics["tensors"]
        names = dict.fromkeys(name for name in (*box["reads"], box["weight"], box["writes"]) if name in measured)
        bound = next((b for b in self.bounds if b["node"] in box["nodes"]), None)
        steps: tuple[str, ...] = ()
        if bound and (box["weight"] in details or bound["op"] in SUMS) and box["writes"] in details:
            rule = targets.Roundings(**(self.report.get("rounding") or {})).of(bound["op"])
            unit = "s_in · s_w" if box["weight"] else "the finest of its inputs"
            steps = tuple(_steps(bound, details[box["writes"]], measured.get(box["writes"]), rule, unit))
        operation = " ".join(filter(None, (box["op"], box["detail"])))
        done = tuple(self.report.get("pipeline_steps") or ())
        return Explanation(
            box["name"], operation, done, tuple(map(self.tensor, names)), tuple(_accumulator(bound)), steps
        )


def explain(folder: Path, layer: str) -> Explanation:
    """The explanation of a layer of a run's folder. Raises FileFormatError for its files, ConfigError for the name."""
    try:
        return Sources(folder).explained(layer)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        files, what = ", ".join(Sources.FILES), f"{type(error).__name__}: {error}"
        raise FileFormatError(f"{folder}: not the files of one finished run ({files}): {what}") from error


def lines(explained: Explanation) -> Iterator[str]:
    """The explanation for a terminal."""
    yield f"{explained.layer}: {explained.operation}"
    yield f"run: {' → '.join(explained.run)}"
    for tensor in explained.tensors:
        yield ""
        yield f"{tensor.name} ({tensor.role}): {tensor.scale}; values {tensor.minimum:.4g} to {tensor.maximum:.4g}"
        yield f"  {_bars(tensor.histogram)}"
        yield f"  {'exact' if tensor.exact else 'estimated from the histogram'}; all exponents change together"
        yield "  exponent   clipped  lost to rounding  lost to clipping  signal to noise"
        for c in tensor.candidates:
            sqnr = "no loss" if c.sqnr_db is None else f"{c.sqnr_db:.1f} dB"
            change = f"{c.change:+d}" if c.change else "chosen"
            yield f"  {change:8}  {c.clipped:6.2f} %  {c.rounding:14.4f} %  {c.clipping:14.4f} %  {sqnr:>15}"
    yield from ("", "accumulator", *(f"  {sentence}" for sentence in explained.accumulator))
    if explained.steps:
        yield from ("", "one value, step by step", *(f"  {i}. {s}" for i, s in enumerate(explained.steps, 1)))


def _read(path: Path) -> dict[str, Any]:
    try:
        return read(path)
    except FileFormatError as error:
        hint = "; it is written unless report.statistics is false" if path.name == run_folder.STATISTICS else ""
        raise FileFormatError(f"{error}{hint}; give a finished run's folder") from error
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: not a file of pow2quant: {error}") from error


def _found(network: Sequence[Mapping[str, Any]], layer: str, folder: Path) -> Mapping[str, Any]:
    for box in network:
        if layer in (box["name"], box["writes"], box["weight"], *box["nodes"]):
            return box
    known = [box["name"] for box in network]
    near = difflib.get_close_matches(layer, known, 5, 0.4) or known[:10]
    raise ConfigError(f"layer: {layer!r} is not in {folder}; near: {', '.join(near)}")


def _of_weight(x: NDArray[Any], encoding: Any) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """The arguments of `candidates`, from the float weight itself."""
    scale = np.broadcast_to(encoding.along(encoding.scale, x.shape), x.shape).astype(np.float64)
    grid, zero = encoding.grid, encoding.zero_point
    low, high = (
        np.broadcast_to(encoding.along(np.asarray(end - zero), x.shape), x.shape).astype(np.float64).ravel()
        for end in (grid.qmin, grid.qmax)
    )
    return (x / scale).ravel(), np.ones(x.size), np.square(scale).ravel(), low, high


def _of_histogram(found: Mapping[str, Any]) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """The arguments of `candidates`, with the values of each bin spread evenly."""
    counts = np.asarray(found["counts"], np.float64)
    within = (np.arange(FINENESS) + 0.5) / FINENESS
    steps = found["start"] + found["width"] * (np.arange(len(counts))[:, None] + within)
    low, high = (np.asarray(found[end], np.float64) for end in ("low", "high"))
    return steps.ravel(), np.repeat(counts / FINENESS, FINENESS), np.ones(steps.size), low, high


def _words(detail: Mapping[str, Any]) -> str:
    """`2⁻⁹ … 2⁻⁶, signed 8 bits`."""
    if "exponent" not in detail:
        return "a scale that is no power of two"
    exponents = detail["exponent"] if isinstance(detail["exponent"], list) else [detail["exponent"]]
    ends = [power(k) for k in sorted({min(exponents), max(exponents)})]
    return f"scale {' … '.join(ends)}, {'signed' if detail.get('signed') else 'unsigned'} {detail.get('bitwidth')} bits"


def _accumulator(bound: Mapping[str, Any] | None) -> Iterator[str]:
    if bound is None:
        yield "This operation computes no sum, so there is nothing to bound."
        return
    if bound["accumulator_max"] is not None:
        most = bound["accumulator_max"]
        yield f"For any input, no sum exceeds {most:,} in units of the accumulator: {bound['bits']} bits."
    if bound["proved"]:
        yield f"Float32 holds every integer up to 2^24 = {EXACT:,}, so every executor computes the same sum: proved."
    else:
        yield f"Not proved: {bound['reason'] or 'the sum may exceed 2^24'}."
    yield "It fits in int32." if bound["int32_safe"] else "It may exceed int32."


def _steps(
    bound: Mapping[str, Any], output: Mapping[str, Any], seen: Mapping[str, Any] | None, rule: str, of: str
) -> Iterator[str]:
    """One real value through accumulator, shift and zero point, in the first channel. of: what the sum's unit is."""
    where = "in the first channel" if isinstance(bound["shift"], list) else "in every channel"
    shift = bound["shift"][0] if isinstance(bound["shift"], list) else bound["shift"]
    k = output.get("exponent")
    if shift is None or not isinstance(k, int):
        return
    unit, zero, bits = k - shift, output["zero_point"], output["bitwidth"]
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if output.get("signed") else (0, 2**bits - 1)
    real = 0.6 * seen["maximum"] if seen else 2.0**k * high / 3
    total = round(math.ldexp(real, -unit))
    rounded = int(shift_round(total, shift, rule))
    code = min(max(rounded + zero, low), high)
    back = math.ldexp(code - zero, k)
    yield f"A real sum of {real:.6g} is {total:,} in the accumulator, whose unit is {power(unit)} ({of}, {where})."
    yield f"The output's unit is {power(k)}, so the accumulator is shifted by {k} - ({unit}) = {shift} bits."
    yield f"{total:,} / 2^{shift} = {math.ldexp(total, -shift):.6g} is rounded to {rounded:,} ({ROUNDINGS[rule]})."
    yield f"Adding the zero point {zero} and clamping to {low} … {high} gives the code {code}."
    error = f"an error of {back - real:+.3g}, where half a step is {2.0 ** (k - 1):.3g}"
    yield f"The code stands for {code - zero} · {power(k)} = {back:.6g}: {error}."


def _bars(found: Mapping[str, Any]) -> str:
    """The histogram in one line; heights are square roots of the counts."""
    counts = found["counts"]
    top = math.sqrt(max(counts) or 1)
    return "".join(" " if not c else BARS[min(7, int(8 * math.sqrt(c) / top))] for c in counts)
