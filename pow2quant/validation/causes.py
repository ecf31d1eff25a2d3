"""Why two executors part at a tensor: hypotheses, each tested on the numbers of the elements that differ.

Both have the same values in front of the tensor, so its exact result follows from these, in float64 (sums of products
of codes are exact up to 2^53), once for each executor's own file. Where these results differ, the files hold different
networks. Otherwise an executor that does not give the exact result is at fault, and the first hypothesis that
reproduces its codes is the cause.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pow2quant.validation.exact import Side, Witness
from pow2quant.validation.hypotheses import HYPOTHESES
from pow2quant.validation.networks import Named, differences

if TYPE_CHECKING:
    from pow2quant.validation.exact import Values
    from pow2quant.validation.hypotheses import Mask


@dataclass(frozen=True)
class Explanation:
    """cause: a sentence, where a hypothesis explains every differing element. account: otherwise, who is wrong."""

    cause: str | None = None
    account: str | None = None


def explain(tensor: str, reference: Witness, other: Witness, known: Values) -> Explanation:
    """Why two executors differ at a tensor, in front of which they agree.

    known: the real values of what stands in front of it; for a graph input its own values before they are quantized.
    Nothing is explained where the exact result cannot be computed or the tensor has no encoding.
    """
    for witness in (other, reference):
        if not np.isfinite(witness.values).all():
            return Explanation(f"{witness.name} gives NaN or infinity")
    try:
        sides = [Side(tensor, witness, known) for witness in (reference, other)]
        exact = [side.witness.network.encodings[tensor].dequantize(side.correct) for side in sides]
    except Exception:  # what the reference evaluator cannot run, it says in many ways
        return Explanation()
    differing = reference.values != other.values
    if (exact[0] != exact[1])[differing].any() and (found := _differences(*sides)):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return Explanation(f"the executors' files hold different networks: {found[0]}{more}")
    for side, opposite in (sides[::-1], sides):
        wrong = differing & (side.codes != side.correct)
        if wrong.any():
            cause = _cause(side, wrong)
            return Explanation(cause) if cause else Explanation(account=_account(side, opposite, wrong))
    return Explanation()


def _differences(a: Side, b: Side) -> list[str]:
    """From the tensor in question backwards to what stands in front of it."""
    first, second = (Named(side.name, side.witness.network) for side in (a, b))
    return list(differences(first, second, [] if a.part.nodes else [a.tensor], reversed(a.part.nodes)))


def _cause(side: Side, wrong: Mask) -> str | None:
    """The first hypothesis that explains the wrong elements."""
    text = next((t for hypothesis in HYPOTHESES if (t := hypothesis(side, wrong))), None)
    if text is None:
        return None
    unfused = side.witness.unfused()
    fused = unfused is not None and (side.coded_as(unfused) == side.correct).all()
    return f"{text}; without graph optimizations the same file is right" if fused else text


def _account(side: Side, opposite: Side, wrong: Mask) -> str:
    """Where an executor is wrong, and whether the other one is right there."""
    channels = np.unique(np.argwhere(wrong)[:, 1]) if wrong.ndim > 1 else np.empty(0)
    where = f" of channel {channels[0]}" if channels.size == 1 and wrong.shape[1] > 1 else ""
    right = "" if (opposite.codes != opposite.correct)[wrong].any() else f", {opposite.name} gives it"
    count = f"{wrong.sum():,} element{'s' if wrong.sum() > 1 else ''}"
    return f"{side.name} does not give the exact result in {count}{where} of {side.tensor}{right}"
