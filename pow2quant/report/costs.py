"""Which layers cost most, and what to try there: from the statistics of a run.

The noise of a tensor is its noise-to-signal ratio against the float network. What a layer adds is the noise of its
output less that of its noisiest input; its cost is its share of all that is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 5
"""So many layers are named."""

CLIPPED = 1.0
"""Per cent of saturated values from which on the range is worth a look."""

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


def costly(network: Sequence[Mapping[str, Any]], tensors: Mapping[str, Mapping[str, Any]]) -> list[Cost]:
    """The layers that add most noise, the costliest first; none where nothing was measured.

    network, tensors: as statistics.json has them.
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
    return [_cost(100 * amount / total, box, tensors) for amount, box in ranked]


def _cost(share: float, box: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> Cost:
    weight, output = tensors.get(box["weight"] or "", {}), tensors.get(box["writes"], {})
    advice = "; ".join(_advice(weight, output)) or "more bits for this layer"
    return Cost(box["name"], share, weight.get("sqnr_db"), output.get("sqnr_db"), advice)


def _advice(weight: Mapping[str, Any], output: Mapping[str, Any]) -> Iterator[str]:
    """What fits the layer's noisier quantizer."""
    infinite = float("inf")
    sides = {"weights": weight, "output": output}
    known = {name: side for name, side in sides.items() if side.get("sqnr_db") is not None}
    if not known:
        return
    name = min(known, key=lambda side: known[side].get("sqnr_db", infinite))
    worse = known[name]
    if worse.get("clipped", 0.0) >= CLIPPED:
        yield f"{worse['clipped']:.1f} % of the {name} saturate: more calibration data, or range minmax"
    if (worse.get("free_scale_db") or 0.0) - (worse.get("power_of_2_db") or 0.0) >= GAIN_DB:
        yield "its range fits 2^k badly: the method align, or equalize"
    yield f"more bits for its {name}" + (", or a method that rounds (gptq, adaround)" if name == "weights" else "")
