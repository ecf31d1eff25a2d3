"""A row per operation, and what is drawn of them: the noise along the network, and the network itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pow2quant.report import graph
from pow2quant.report.page import NOTHING
from pow2quant.report.scales import exponents, label, least, shifted

TONES = (30, 20, 12, 6)
"""Signal to noise in dB from which on a box of the graph has the best colour, the second best, and so on."""


class Layer(dict[str, Any]):
    """A row of the table of layers; what is not known of it is None."""

    def __missing__(self, key: str) -> None:
        return None


def rows(report: Mapping[str, Any], statistics: Mapping[str, Any]) -> Iterator[Layer]:
    """A row per operation: the network's where it was measured, else those of the certificate."""
    details = report.get("final_quantization_details") or {}
    tensors = statistics.get("tensors") or {}
    bounds = {bound["node"]: bound for bound in (report.get("certificate") or {}).get("layers") or []}
    boxes = statistics.get("network") or [_alone(bound) for bound in bounds.values()]
    for box in boxes:
        bound = next((bounds[node] for node in box["nodes"] if node in bounds), None)
        output, weight = (details.get(box[key]) or {} for key in ("writes", "weight"))
        measured, of_weight = (tensors.get(box[key]) or {} for key in ("writes", "weight"))
        if bound is None and not measured:
            continue
        shift = (bound or {}).get("shift")
        yield Layer(
            name=box["name"],
            op=" ".join(filter(None, (box["op"], box["detail"]))),
            writes=box["writes"],
            weight=exponents(weight, count=False),
            weight_order=least(weight),
            output=exponents(output),
            output_order=least(output),
            shift=shifted(shift),
            shift_order=min(shift) if isinstance(shift, list) else "" if shift is None else shift,
            weight_db=of_weight.get("sqnr_db"),
            output_db=measured.get("sqnr_db"),
            network_db=measured.get("network_sqnr_db"),
            clipped=measured.get("clipped"),
            largest=(bound or {}).get("accumulator_max"),
            bits=(bound or {}).get("bits"),
            safe=None if bound is None else bound.get("int32_safe"),
            proved=None if bound is None else bool(bound.get("proved")),
            reason=(bound or {}).get("reason"),
        )


def _alone(bound: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of the certificate as a box."""
    node = bound["node"]
    return {
        "name": node,
        "op": bound.get("op", NOTHING),
        "detail": "",
        "nodes": [node],
        "writes": bound.get("tensor"),
        "weight": f"{node}.weight",
    }


def profile(found: Sequence[Layer]) -> Any:
    """The chart of signal to noise along the network, None where there is nothing to draw."""
    from markupsafe import Markup

    from pow2quant.report import figures

    series = {"network so far": "network_db", "this output alone": "output_db", "these weights alone": "weight_db"}
    values = {label: [y[key] for y in found] for label, key in series.items()}
    values = {label: found for label, found in values.items() if any(v is not None for v in found)}
    names = [y["name"] for y in found]
    return Markup(figures.profile(values, "operation (its number in the table)", names)) if values else None


def picture(
    report: Mapping[str, Any], network: Sequence[Mapping[str, Any]], found: Sequence[Layer]
) -> tuple[graph.Strip, ...]:
    """The network as a graph, with exponents, signal to noise and shifts."""
    details = dict(report.get("final_quantization_details") or {})
    for box in network:  # what only moves values has its input's encoding
        if box["writes"] not in details and box["reads"] and box["reads"][0] in details:
            details[box["writes"]] = details[box["reads"][0]]
    by_name = {y["name"]: y for y in found}
    notes = {}
    for box in network:
        row = by_name.get(box["name"], Layer())
        quality = row["network_db"]
        notes[box["name"]] = {
            "weights": f"weights {row['weight']}" if box["weight"] in details else None,
            "quality": "" if quality is None else f"{quality:.1f} dB",
            "tone": None if quality is None else sum(quality < tone for tone in TONES),
            "title": f"shift {row['shift']}" if row["shift"] not in (None, NOTHING) else None,
        }
    return graph.draw(network, {name: label(detail) for name, detail in details.items()}, notes)
