"""The verdicts of a run, from what was measured and what is known of its network and files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from pow2quant.artifact import Agreement, Table
from pow2quant.backends.pixels import fold_normalization
from pow2quant.errors import Pow2QuantError
from pow2quant.frontends.copies import copied
from pow2quant.frontends.modules import Real
from pow2quant.frontends.operators import called
from pow2quant.logits.paired import NORMAL_95, interval, paired
from pow2quant.models import TORCHVISION
from pow2quant.report.advice import advice
from pow2quant.report.verdict import Change, verdict
from pow2quant.runs.job import Job
from pow2quant.runs.pixels import Pixels
from pow2quant.runs.scores import FLOAT, Scores
from pow2quant.tasks.base import ONE_ANSWER, Averaged, Counter, Metric, OneAnswer, in_unit
from pow2quant.tasks.judging import leading


def judge(
    job: Job,
    agreements: Sequence[Agreement],
    change: Change | None,
    sizes: Mapping[str, int],
    steps: Collection[str],
    table: Table,
) -> dict[str, Any]:
    """`verdict` of report.json. sizes: of the files `float` and `quantized`, in bytes. steps: what the run did."""
    advised = advice(job.config, steps, _would_win_on_pixels(job), tried=bool(job.trials))
    warnings = [*job.data.warnings, *_guessed(job), *_unloaded(job), *_coarse(job.network, table), *_grown(sizes)]
    return verdict(agreements, change, advised, warnings)


def _guessed(job: Job) -> list[str]:
    """That nothing says which way the metric is good."""
    metric = leading(job.task)
    text = f"metric {metric.name}: a larger value is taken as better; give it the attribute higher_is_better to say so"
    return [text] if metric.guessed else []


def _would_win_on_pixels(job: Job) -> bool:
    """Whether `--input pixels` spares a rounding of the input that matters, and the network and its data can take it.

    It matters from 8 bits on; images that are normalized with 0.5 and 0.5 lie on the grid of half pixels anyway.
    """
    config, weight = job.config, job.config.quantization.weight
    values = {*(config.data.mean or ()), *(config.data.std or ())}
    output = config.quantization.output
    narrow = any(spec is not None and spec.bits < 8 for spec in (weight, output))
    if config.data.input == "pixels" or narrow or not values or values <= {0.0, 0.5, 1.0}:
        return False
    try:
        how = Pixels.of(config)
        how.pixels(next(iter(job.data.test))[0], "")
        fold_normalization(copied(job.network), how.mean, how.std, how.white)
    except Pow2QuantError:
        return False
    return True


def change_of(scores: Scores, executor: str) -> Change | None:
    """What became of the task's leading metric in an executor that ran on all samples; None where none was counted."""
    if not scores.task.metrics:
        return None
    metric = scores.task.metrics[0]
    before, after = (scores.value(name, metric) for name in (FLOAT, executor))
    one, other = (scores.per_sample(name) for name in (FLOAT, executor))
    if before is None or after is None:
        return None
    answer = scores.counters[FLOAT].get(ONE_ANSWER)
    constant = answer.per_sample() if isinstance(answer, OneAnswer) else None
    return Change(
        metric=metric.name,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        before=before,
        after=after,
        interval=None if one is None or other is None else _interval(other - one, scores.hits),
        samples=scores.samples,
        total=scores.total or scores.samples,
        constant=None if constant is None else 100 * float(constant.mean()),
        guesses=(before == 0 and metric.higher_is_better and metric.unit == "%")
        or (constant is not None and one is not None and _interval(one - 100 * constant, True)[0] <= 0),
    )


def interval_of_change(before: Counter, after: Counter, metric: Metric) -> tuple[float, float] | None:
    """95 % of the change of a metric that was counted on the same samples; None where it is no mean over them."""
    one, other = in_unit(before), in_unit(after)
    if one is None or other is None:
        return None
    return _interval(other - one, isinstance(after, Averaged) and metric.unit == "%")


def _interval(differences: NDArray[np.float64], hits: bool) -> tuple[float, float]:
    """Of the mean, 95 %. hits: whether they are shares of samples, at most 100 %, not numbers of any size."""
    if hits:
        low, high = interval(differences / 100)
        return round(100 * low, 4), round(100 * high, 4)
    mean, error = paired(differences)
    return mean - NORMAL_95 * error, mean + NORMAL_95 * error


def _unloaded(job: Job) -> Iterator[str]:
    """That the weights may be those of an untrained network."""
    name = job.config.model.name
    if job.config.model.weights is None and name.startswith(TORCHVISION):
        yield f"the weights of {name} are random: give trained ones with --weights"
    elif untrained(job.model):
        yield "the network looks untrained: every batch norm holds the statistics that it is made with"


def untrained(model: nn.Module) -> bool:
    """Whether there are batch norms, and all of them still hold the statistics they are made with."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(m.running_mean, m.running_var) for m in norms if m.running_mean is not None and m.running_var is not None]
    return bool(kept) and not any(bool(mean.any()) or bool(variance.ne(1).any()) for mean, variance in kept)


def _coarse(network: fx.GraphModule, table: Table) -> Iterator[str]:
    """That numbers are no longer told apart: integers that became real ones, or what a softmax reads."""
    steps = {name.removesuffix(".output"): float(encoding.scale.max()) for name, encoding in table.items()}
    for node in network.graph.nodes:
        module, step = called(network, node), steps.get(str(node.target), 0.0)
        read = max((steps.get(str(x.target), 0.0) for x in node.all_input_nodes), default=0.0)
        if isinstance(module, nn.Softmax) and read >= 1:
            yield (
                f"{node.target}: its input has steps of {read:g}, so that few scores are told apart; a mask that is "
                "added as large numbers is better given as integers or truth values"
            )
        if isinstance(module, Real) and step > 1:
            yield (
                f"{node.target}: integers become real numbers in steps of {step:g}; more bits, there and where they "
                "are computed with, tell them apart (quantization.overrides)"
            )


def _grown(sizes: Mapping[str, int]) -> Iterator[str]:
    if sizes["quantized"] > sizes["float"]:
        yield (
            f"the quantized file is larger than the float one ({sizes['quantized']:,} and {sizes['float']:,} bytes): "
            "the network is so small that scales and Q/DQ nodes outweigh its weights"
        )
