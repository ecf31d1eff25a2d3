"""What to try where a run lost accuracy: what fits its widths and methods and was not done yet."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain, islice

from pow2quant.config import RunConfig, default_methods

MOST = 2
"""Suggestions in a sentence: the first ones, which cost least."""

ROUNDING = {"adaround", "qdrop", "gpfq", "gptq"}
"""Methods that choose how each weight is rounded."""

ROUNDABLE = 4
"""Bits from which on other methods are worth a try before training."""


def advice(config: RunConfig, steps: Collection[str], pixels: bool = False, tried: bool = False) -> str:
    """The first suggestions, `A, or B`.

    steps: what the run did, as in report.json's `pipeline_steps`. pixels: whether `--input pixels` would work and win.
    tried: whether the methods were chosen by trying.
    """
    first = ["--input pixels"] if pixels else []
    return ", or ".join(islice(chain(first, _suggestions(config, set(steps), tried)), MOST))


def _suggestions(config: RunConfig, used: set[str], tried: bool) -> Iterator[str]:
    weight, output = config.quantization.weight, config.quantization.output
    trained = any(step.startswith("qat") for step in used)
    weight_bits = weight.bits if weight else 32
    output_bits = output.bits if output else 32
    missing = [choice.name for choice in default_methods(config) if choice.name not in used]
    if missing and not tried and not used & ROUNDING:
        yield f"the default methods ({', '.join(choice.name for choice in default_methods(config))})"
    if weight and not weight.per_channel:
        yield "one weight scale per channel (without --per-tensor)"
    training = _training(config, output_bits, trained)
    if min(weight_bits, output_bits) < ROUNDABLE:
        yield training
    if weight_bits <= 8 and not tried and not trained:
        yield "--method auto"
    if min(weight_bits, output_bits) >= ROUNDABLE:
        yield training
    if weight_bits < 8 or output_bits < 8:
        yield "pow2quant search, which gives the tensors that need it more bits"


def _training(config: RunConfig, output_bits: int, trained: bool) -> str:
    if not trained:
        return "pow2quant qat" + (" --mode full" if output_bits < 8 else "")
    return "more --epochs" if config.training.mode == "full" or output_bits >= 8 else "--mode full"
