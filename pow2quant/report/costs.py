"""Which layers cost most, and what to try there: from the statistics of a run.

The noise of a tensor is its noise-to-signal ratio against the float network. What a layer adds is the noise of its
output less that of its noisiest input; its cost is its share of all that is added.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 5
"""So many layers are named."""

CLIPPED = 1.0
"""Per cent of saturated values from which on the range is worth a look."""

ROUNDING = ("gptq", "adaround")
"""Methods that choose how weights are rounded, as they are advised."""

GAIN_DB = 4.0
"""What a free scale gains from which on the constraint is the reason."""


@dataclass(frozen=True)
class Cost:
    """A layer. share: per cent of the noise that all layers add; weight_db, output_db: of its quantizers alone."""

    layer: str
    share: float
    weight_db: float | None
    output_db: float | None
    advice: str


def costly(
    network: Sequence[Mapping[str, Any]], tensors: Mapping[str, Mapping[str, Any]], steps: Collection[str] = ()
) -> list[Cost]:
    """The layers that add most noise, the costliest first; none where nothing was measured.

    network, tensors: as statistics.json has them. steps: what the run did, as in report.json's `pipeline_steps`.
    """
    noise: dict[str, float] = {}
    added: list[tuple[float, Mapping[str, Any]]] = []
    for box in network:
        before = max((noise[name] for name in box["reads"] if name in noise), default=0.0)
        decibels = tensors.get(box["writes"], {}).get("network_sqnr_db")
        noise[box["writes"]] = before if decibels is None else 10 ** (-decibels / 10)
        added.append((max(0.0, noise[box["writes"]] - before), box))
    total = sum(amount for amount, _ in added)
    ranked = sorted((pair for pair in added if pair[0] > 0), key=lambda pair: -pair[0])[:MOST]
    return [_cost(100 * amount / total, box, tensors, steps) for amount, box in ranked]


def _cost(
    share: float, box: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]], steps: Collection[str]
) -> Cost:
    weight, output = tensors.get(box["weight"] or "", {}), tensors.get(box["writes"], {})
    advice = "; ".join(_advice(weight, output, steps)) or "more bits for this layer"
    return Cost(box["name"], share, weight.get("sqnr_db"), output.get("sqnr_db"), advice)


def _advice(weight: Mapping[str, Any], output: Mapping[str, Any], steps: Collection[str]) -> Iterator[str]:
    """What fits the layer's noisier quantizer, and was not done yet."""
    sides = {"weights": weight, "output": output}
    known = {name: side for name, side in sides.items() if side.get("sqnr_db") is not None}
    if not known:
        return
    name = min(known, key=lambda side: known[side]["sqnr_db"])
    worse = known[name]
    if worse.get("clipped", 0.0) >= CLIPPED:
        data = "more calibration data, or " if name == "output" else ""
        yield f"{worse['clipped']:.1f} % of the {name} saturate: {data}range minmax"
    if (worse.get("free_scale_db") or 0.0) - (worse.get("power_of_2_db") or 0.0) >= GAIN_DB:
        yield "its range fits 2^k badly" + ("" if "align" in steps else ": the method align")
    left = [method for method in ROUNDING if method not in steps] if name == "weights" else []
    yield f"more bits for its {name}" + (f", or {' or '.join(left)}" if left else "")
