"""Choosing a chain of methods by trying: cheap chains first, costlier ones on top of the best, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from pow2quant.config import ABOVE_ZERO, Choice, finite

Chain = tuple[Choice, ...]

LEAD = 2.0
"""A chain takes the place of a cheaper one when it is closer to float by so many standard errors."""

ALIGN = Choice("align", {"rounds": 1})
HEADROOM = Choice("align", {"rounds": 1, "headroom": 1.1})
EQUALIZE = Choice("equalize")
BIAS = Choice("bias_correction")
NOISE = Choice("output_mse")
SQUARES = (Choice("gptq"), BIAS)
CORRECTED = (Choice("gptq", {"correction": 1.0}), BIAS)
STEPS = 400
"""Of methods that learn, at first; LONGER times as many where they have won."""

LONGER = 5
ROUND = Choice("adaround", {"iterations": STEPS})
EXPONENTS = Choice("lapq", {"bias_correction": False})
BLOCKS = Choice("qdrop", {"iterations": STEPS})

COST = {
    "bias_correction": 1,
    "align": 2,
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

    noise: per image, the energy of the outputs' error by that of the outputs. seconds: for calibration and methods.
    """

    chain: Chain
    noise: NDArray[np.float64]
    seconds: float

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
        """How much closer to float than another trial, in dB, and its standard error over images (jackknife)."""
        n = len(self.noise)
        ratio = np.log10(max(other.noise.sum(), 1e-300) / max(self.noise.sum(), 1e-300)) * 10
        if n < 2:
            return float(ratio), 0.0
        without = [np.maximum(x.sum() - x, 1e-300) for x in (other.noise, self.noise)]
        left = 10 * np.log10(without[0] / without[1])
        return float(ratio), float(np.sqrt((n - 1) * np.square(left - left.mean()).mean()))


@dataclass(frozen=True)
class Auto:
    """Tries chains of methods by stages and keeps the one whose outputs are closest to float on images held back.

    First cheap chains; on top of the best of them rounding that is learned (`gptq`, `adaround`); for activations below
    8 bits then exponents by the loss and rounding by blocks (`lapq`, `qdrop`). Where learning has won, it is tried with
    more steps. A costlier chain must win by twice the standard error. The images held back are calibration images,
    never test images; the chain that is chosen then sees all of them, and is what config.yaml keeps.

    minutes: no trial begins that would take their sum beyond. held_back: share of the calibration images that judges.
    """

    minutes: Annotated[float, ABOVE_ZERO] = 10.0
    held_back: Annotated[float, finite("a number above 0 and below 1", lambda v: 0 < v < 1)] = 0.25

    def choose(self, facts: Facts, attempt: Callable[[Chain], Trial], note: Callable[[str], None]) -> list[Trial]:
        """All trials, in order; `best` says which is the choice. attempt: quantizes by a chain and judges the result.

        note: takes a line on every trial.
        """
        tried: list[Trial] = []
        for stage in (usual, cheap, learned, blocks, longer):
            for chain in stage(facts, best(tried).chain if tried else ()):
                if chain in [t.chain for t in tried]:
                    continue
                needs = expected(chain, tried)
                if sum(t.seconds for t in tried) + needs > self.minutes * 60:
                    note(f"auto: {named(chain)}: left out, it would take about {needs / 60:.1f} min")
                    continue
                before = best(tried) if tried else None
                tried.append(attempt(chain))
                note(_line(tried[-1], before))
        return tried


def usual(facts: Facts, _: Chain) -> list[Chain]:
    """What a run does that names no method: nothing that is chosen is clearly worse."""
    return [facts.default]


def cheap(facts: Facts, _: Chain) -> list[Chain]:
    """What costs no more than a few calibrations."""
    chains: list[Chain] = [(BIAS,), (ALIGN, BIAS), (ALIGN, NOISE), (HEADROOM, BIAS)]
    return chains + [(EQUALIZE, BIAS), (EQUALIZE, ALIGN, BIAS), (EQUALIZE, ALIGN, NOISE)] * facts.depthwise


def learned(facts: Facts, start: Chain) -> list[Chain]:
    """Rounding that is chosen layer by layer, behind the rewrites of the best cheap chain."""
    if facts.weight_bits is None or facts.weight_bits > 8:
        return []
    rewrites = tuple(c for c in start if c.name in ("align", "equalize"))
    chains = [SQUARES, (*rewrites, *SQUARES), (*rewrites, *CORRECTED)]
    return chains + [(*rewrites, NOISE, ROUND)] * (facts.weight_bits < 8)


def blocks(facts: Facts, start: Chain) -> list[Chain]:
    """Exponents by the network's loss and rounding by blocks: for narrow activations."""
    if facts.weight_bits is None or facts.activation_bits is None or facts.activation_bits >= 8:
        return []
    rewrites = tuple(c for c in start if c.name in ("align", "equalize"))
    return [(*rewrites, NOISE, BLOCKS), (*rewrites, EXPONENTS, BLOCKS), (*rewrites, EXPONENTS, *SQUARES)]


def longer(_: Facts, start: Chain) -> list[Chain]:
    """The best chain with more steps, where it learns."""
    if all(c.parameters.get("iterations") != STEPS for c in start):
        return []
    more = {"iterations": LONGER * STEPS}
    return [
        tuple(c._replace(parameters={**c.parameters, **more}) if "iterations" in c.parameters else c for c in start)
    ]


def best(tried: Sequence[Trial]) -> Trial:
    """The trial that is the choice: each takes the place of those before it where it clearly wins."""
    found = tried[0]
    for trial in tried[1:]:
        gain, error = trial.gain_over(found)
        found = trial if gain > LEAD * error else found
    return found


def expected(chain: Chain, tried: Sequence[Trial]) -> float:
    """About how many seconds a trial takes, judged by those before it; 0 for the first."""
    paces = [t.seconds / _cost(t.chain) for t in tried]
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
