"""The two verdicts of a run: do all executors compute the same network, and is it as good as the float one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pow2quant.report.summary import WORDS

if TYPE_CHECKING:
    from pow2quant.artifact import Agreement

NEGLIGIBLE = {"%": 0.5, "dB": 0.1}
"""By unit: a loss that counts as kept, even where many samples make it certain; of other metrics 1 % of the value."""

TOO_WIDE = 10
"""Negligible losses: where the interval reaches further down, too few samples were looked at to say "kept"."""


@dataclass(frozen=True)
class Change:
    """What quantization does to the leading metric, measured on the same samples before and after.

    interval: 95 %, of `after` less `before`, in the metric's unit; None where the metric is no mean over samples.
    constant: the metric of the answer that is most often right, given for every sample. guesses: whether the float
    network is not clearly better than that, or has 0 %. total: of how many samples these were taken.
    """

    metric: str
    unit: str
    higher_is_better: bool
    before: float
    after: float
    interval: tuple[float, float] | None
    samples: int
    constant: float | None = None
    guesses: bool = False
    total: int = 0

    @property
    def gain(self) -> float:
        """By how much the metric became better; below 0: worse."""
        return (self.after - self.before) * self._direction

    @property
    def gain_interval(self) -> tuple[float, float]:
        """The ends of the interval of `gain`; the gain itself where there is none."""
        low, high = self.interval or (self.after - self.before,) * 2
        return (low, high) if self.higher_is_better else (-high, -low)

    @property
    def negligible(self) -> float:
        """A loss that counts as kept."""
        return NEGLIGIBLE.get(self.unit, 0.01 * abs(self.before))

    @property
    def _direction(self) -> int:
        return 1 if self.higher_is_better else -1


def verdict(
    agreements: Sequence[Agreement], change: Change | None = None, advice: str = "", warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """What report.json holds under `verdict`.

    advice: what to try where quality was lost. warnings: what else makes the figures doubtful. change: None where the
    task has no metric.
    """
    quality, sentence = judged(change, advice)
    agreement = agreement_of(agreements)
    return {
        "agrees": all(a.agrees for a in agreements),
        "claim": claim_of(agreements),
        "quality": quality,
        "text": f"{agreement}; quality: {sentence}",
        "agreement": agreement,
        "change": sentence,
        "warnings": [*_doubts(change), *warnings],
    }


def agreement_of(agreements: Sequence[Agreement]) -> str:
    """One sentence over all agreements."""
    wrong = [a for a in agreements if not a.agrees]
    if not wrong:
        most = max(agreements, key=lambda a: a.elements)
        claim = next((a.claim for a in agreements if a.claim != "proved"), "proved")
        names = [a.executor for a in agreements]
        runs = [name for name in names if name.startswith("onnxruntime")]
        if len(runs) > 1:
            names = [f"onnxruntime in {len(runs)} ways", *(name for name in names if name not in runs)]
        others = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        return f"0 of {most.elements:,} output elements differ between {most.against} and {others}: {claim}"
    worst = max(wrong, key=lambda a: a.differing)
    at = f", first at {worst.first_diverging.tensor}" if worst.first_diverging else ""
    why = f" ({worst.first_diverging.cause})" if worst.first_diverging and worst.first_diverging.cause else ""
    return (
        f"DIFFERS: {worst.differing:,} of {worst.elements:,} output elements by up to {worst.max_lsb:g} LSB in "
        f"{worst.executor}{at}{why}"
    )


def claim_of(agreements: Sequence[Agreement]) -> str:
    """`proved` where every agreement is, `differs` where one is not, else `observed`."""
    if not all(a.agrees for a in agreements):
        return "differs"
    return "proved" if all(a.claim == "proved" for a in agreements) else "observed"


def judged(change: Change | None, advice: str = "") -> tuple[str, str]:
    """(`kept`, `lost` or `unknown`, the sentence that says so)."""
    if change is None:
        return "unknown", "not measured"
    if not math.isfinite(change.after - change.before):
        return "unknown", f"{_name(change)} is {change.before:g} before and {change.after:g} after"
    low, high = change.gain_interval
    if change.guesses:
        return "unknown", f"cannot be judged, the float network has none to lose ({_figures(change)})"
    if high < 0 and change.gain < -change.negligible:
        lost = f"lost {_amount(-change.gain, change)} of {_name(change)} ({_noise(change)})"
        return "lost", lost + (f": try {advice}" if advice else "")
    if low < -TOO_WIDE * change.negligible:
        return "unknown", f"too few samples to judge it ({_figures(change)})"
    if high < 0:
        return "kept", f"kept to within {_amount(change.negligible, change)} ({_figures(change)})"
    return "kept", f"{'gained' if low > 0 else 'kept within noise'} ({_figures(change)})"


def _figures(change: Change) -> str:
    points = " points" if change.unit == "%" else f" {change.unit}" if change.unit else ""
    return f"{_name(change)} {_signed(change.after - change.before, change)}{points}, {_noise(change)}"


def _noise(change: Change) -> str:
    of = f" of {change.total:,}" if change.total > change.samples else ""
    samples = f"{change.samples:,}{of} samples"
    if change.interval is None:
        return f"{samples}, no interval: it is no mean over them"
    low, high = (_signed(end, change) for end in change.interval)
    return f"95 % interval {low} to {high}, {samples}"


def _signed(value: float, change: Change) -> str:
    return f"{value:+.2f}" if change.unit else f"{value:+.3g}"


def _amount(value: float, change: Change) -> str:
    return f"{value:.1f} {'points' if change.unit == '%' else change.unit}" if change.unit else f"{value:.3g}"


def _name(change: Change) -> str:
    return WORDS.get(change.metric, change.metric)


def _doubts(change: Change | None) -> list[str]:
    """Why the metric itself says little."""
    if change is None or change.constant is None:
        return []
    if change.constant == 100:
        return [f"all {change.samples:,} evaluated samples have the same label: the accuracy says little"]
    if change.guesses:
        return [
            f"the float network is at chance level: {change.before:.2f} %, and one answer for every sample gets "
            f"{change.constant:.2f} %; are its weights and the normalization of the images those of its training?"
        ]
    return []
