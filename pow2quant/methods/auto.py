"""Choosing a chain of methods by trying: cheap chains first, costlier ones on top of the best, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from pow2quant.config import ABOVE_ZERO, Choice, finite, integer

Chain = tuple[Choice, ...]

LEAD = 2.0
"""A chain is clearly better than another when it is closer to float by so many standard errors."""

ALIGN = Choice("align", {"rounds": 1})
HEADROOM = Choice("align", {"rounds": 1, "headroom": 1.1})
MORE_HEADROOM = Choice("align", {"rounds": 1, "headroom": 1.25})
EQUALIZE = Choice("equalize")
BIAS = Choice("bias_correction")
NOISE = Choice("output_mse")
SQUARES = (Choice("gptq"), BIAS)
CORRECTED = (Choice("gptq", {"correction": 1.0}), BIAS)
STEPS = 400
"""Of methods that learn, at first; LONGER times as many where they have won."""

LONGER = 5

CHEAP = 0.5
"""Share of the budget beyond which no trial of a cheap chain goes, so that the others get theirs."""

ROUND = Choice("adaround", {"iterations": STEPS})
EXPONENTS = Choice("lapq", {"bias_correction": False})
BLOCKS = Choice("qdrop", {"iterations": STEPS})

COST = {
    "bias_correction": 1,
    "align": 6,
    "equalize": 1,
    "output_mse": 4,
    "gptq": 8,
    "adaround": 25,
    "lapq": 35,
    "qdrop": 40,
}
"""Roughly what a method takes, in times of a plain calibration; it only decides what still fits into the budget."""


@dataclass(frozen=True)
class Facts:
    """What decides which chains are worth a trial.

    weight_bits, activation_bits: None where they are float. depthwise: some convolution has one input per group.
    default: the chain of a run that names none.
    """

    weight_bits: int | None
    activation_bits: int | None
    depthwise: bool
    default: Chain


@dataclass(frozen=True)
class Trial:
    """A chain and what it gave on images that it did not see.

    noise: per image, the energy of the outputs' error by that of the outputs; of two trials the first images are the
    same. seconds: for calibration and methods. parts: of the calibration images, that have judged it.
    """

    chain: Chain
    noise: NDArray[np.float64]
    seconds: float
    parts: int = 1

    @property
    def sqnr_db(self) -> float:
        """Of the outputs against the float network's."""
        return float(-10 * np.log10(max(self.noise.mean(), np.finfo(float).tiny)))

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        chain = [{c.name: dict(c.parameters)} if c.parameters else c.name for c in self.chain]
        return {
            "methods": chain,
            "sqnr_db": round(self.sqnr_db, 3),
            "images": len(self.noise),
            "seconds": round(self.seconds, 2),
        }

    def gain_over(self, other: Trial) -> tuple[float, float]:
        """How much closer to float than another trial, in dB, with its standard error (jackknife); on common images."""
        n = min(len(self.noise), len(other.noise))
        theirs, own = other.noise[:n], self.noise[:n]
        ratio = np.log10(max(theirs.sum(), 1e-300) / max(own.sum(), 1e-300)) * 10
        if n < 2:
            return float(ratio), 0.0
        without = [np.maximum(x.sum() - x, 1e-300) for x in (theirs, own)]
        left = 10 * np.log10(without[0] / without[1])
        return float(ratio), float(np.sqrt((n - 1) * np.square(left - left.mean()).mean()))

    def clearly_beats(self, other: Trial) -> bool:
        """By more than chance, as far as the common images say."""
        gain, error = self.gain_over(other)
        return gain > LEAD * error

    def then(self, other: Trial) -> Trial:
        """This trial and that of the same chain on further images."""
        noise = np.concatenate([self.noise, other.noise])
        return replace(self, noise=noise, seconds=self.seconds + other.seconds, parts=self.parts + other.parts)


@dataclass(frozen=True)
class Auto:
    """Tries chains of methods by stages and keeps the one whose outputs are closest to float on images it did not see.

    First the default and cheap chains; behind the rewrites of the best cheap one rounding that is learned (`gptq`,
    `adaround`); for activations below 8 bits also exponents by the loss and rounding by blocks (`lapq`, `qdrop`). Where
    learning has won, it is tried with more steps.

    Calibration images judge, never test images: a part is held back and the others calibrate. Chains that are not
    clearly worse than the best, by twice the standard error, are calibrated again with another part held back, until
    every part has judged them. Then the best mean wins. A run with the chosen chain sees all calibration images; the
    chain is what config.yaml keeps.

    minutes: no trial begins that would take their sum beyond; cheap chains get half of them at most.
    images: about so many of the calibration images are for the trials. held_back: share of these that is held back at
    once.
    """

    minutes: Annotated[float, ABOVE_ZERO] = 10.0
    images: Annotated[int, integer(2)] = 512
    held_back: Annotated[float, finite("a number above 0 and below 1", lambda v: 0 < v < 1)] = 0.25

    @property
    def parts(self) -> int:
        """How often other images can be held back."""
        return int(1 / self.held_back)

    def choose(self, facts: Facts, attempt: Callable[[Chain, int], Trial], note: Callable[[str], None]) -> list[Trial]:
        """All trials, in order; `best` says which is the choice.

        attempt: quantizes by a chain with a part of the images held back, by its number, and judges the result by them.
        note: takes a line on every trial.
        """
        tried: list[Trial] = []

        def affords(chain: Chain, share: float) -> bool:
            return sum(t.seconds for t in tried) + expected(chain, tried) <= share * self.minutes * 60

        def judge(chains: Sequence[Chain], share: float) -> None:
            """By further parts, as long as more than one is not clearly worse than the best."""
            for part in range(1, self.parts):
                rivals = [t for t in tried if t.chain in chains]
                lead = best(rivals or tried)
                close = [t for t in rivals if not lead.clearly_beats(t)]
                if len(close) == 1 or (lead.parts == part and not affords(lead.chain, share)):
                    return
                close.sort(key=lambda t: t is not lead)  # others are compared with it
                for trial in close:
                    if trial.parts == part and affords(trial.chain, share):
                        more = trial.then(attempt(trial.chain, part))
                        tried[[t.chain for t in tried].index(trial.chain)] = more
                        note(_line(more, lead))

        def attempted(chains: Sequence[Chain], share: float) -> None:
            for chain in chains:
                if chain in [t.chain for t in tried]:
                    continue
                if not affords(chain, share):
                    note(f"auto: {named(chain)}: left out, it would take about {expected(chain, tried) / 60:.1f} min")
                    continue
                before = best(tried) if tried else None
                tried.append(attempt(chain, 0))
                note(_line(tried[-1], before))

        attempted([facts.default, *cheap(facts)], CHEAP)
        judge(cheap(facts), CHEAP)
        for stage in (learned, longer):
            attempted(stage(facts, tried), 1.0)
            judge([t.chain for t in tried], 1.0)
        return tried


def cheap(facts: Facts) -> list[Chain]:
    """What costs no more than a few calibrations; what the budget may leave out comes last."""
    chains: list[Chain] = [(BIAS,), (ALIGN, BIAS), (ALIGN, NOISE), (HEADROOM, BIAS)]
    if facts.depthwise:
        chains = [some for chain in chains for some in (chain, (EQUALIZE, *chain))]
    return [*chains, (MORE_HEADROOM, BIAS)]


def learned(facts: Facts, tried: Sequence[Trial]) -> list[Chain]:
    """Rounding that is chosen layer by layer, behind the rewrites of the best cheap chain.

    For narrow activations also exponents by the network's loss, and rounding by blocks, before the costly rounding of
    single layers.
    """
    if facts.weight_bits is None or facts.weight_bits > 8:
        return []
    rewrites = _rewrites(facts, tried)
    chains: list[Chain] = [SQUARES, (*rewrites, *SQUARES), (*rewrites, *CORRECTED)]
    if facts.activation_bits is not None and facts.activation_bits < 8:
        chains += [(*rewrites, NOISE, BLOCKS), (*rewrites, EXPONENTS, BLOCKS), (*rewrites, EXPONENTS, *SQUARES)]
    return chains + [(*rewrites, NOISE, ROUND)] * (facts.weight_bits < 8)


def longer(_: Facts, tried: Sequence[Trial]) -> list[Chain]:
    """The best chain with more steps, where it learns."""
    start = best(tried).chain
    if all(c.parameters.get("iterations") != STEPS for c in start):
        return []
    more = {"iterations": LONGER * STEPS}
    return [
        tuple(c._replace(parameters={**c.parameters, **more}) if "iterations" in c.parameters else c for c in start)
    ]


def _rewrites(facts: Facts, tried: Sequence[Trial]) -> Chain:
    """Those of the best cheap chain, whether or not the default, which may learn, is better than all of them."""
    chains = cheap(facts)
    start = best([t for t in tried if t.chain in chains] or tried)
    return tuple(c for c in start.chain if c.name in ("align", "equalize"))


def best(tried: Sequence[Trial]) -> Trial:
    """The choice: the least error among those that most images judged, unless another beats it clearly; then that."""
    most = max(len(t.noise) for t in tried)
    found = min((t for t in tried if len(t.noise) == most), key=lambda t: t.noise.mean())
    for trial in tried:
        if len(trial.noise) < most and trial.clearly_beats(found):
            found = trial
    return found


def expected(chain: Chain, tried: Sequence[Trial]) -> float:
    """About how many seconds a trial takes, by those of the same methods or else of others; 0 for the first."""
    same = [t for t in tried if [c.name for c in t.chain] == [c.name for c in chain]]
    paces = [t.seconds / t.parts / _cost(t.chain) for t in same or tried]
    return max(paces, default=0.0) * _cost(chain)


def named(chain: Chain) -> str:
    """In one line, with the parameters that are no defaults."""

    def one(choice: Choice) -> str:
        values = ", ".join(f"{key}={value}" for key, value in choice.parameters.items())
        return f"{choice.name}({values})" if values else choice.name

    return " + ".join(map(one, chain)) or "none"


def _cost(chain: Chain) -> float:
    times = [float(c.parameters.get("iterations", STEPS)) / STEPS for c in chain]
    return 1 + sum(COST.get(c.name, max(COST.values())) * n for c, n in zip(chain, times, strict=True))


def _line(trial: Trial, before: Trial | None) -> str:
    text = f"auto: {named(trial.chain)}: {trial.sqnr_db:.2f} dB"
    if before is not None:
        gain, error = trial.gain_over(before)
        text += f" ({gain:+.2f} ± {LEAD * error:.2f} against {named(before.chain)})"
    return f"{text}, {trial.seconds:.0f} s"
