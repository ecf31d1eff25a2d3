"""One trial: a configuration in, a row of the results out."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pow2quant import config as configuration
from pow2quant.backends.base import SILENT, Progress
from pow2quant.config import Choice, RunConfig
from pow2quant.errors import OutputError, Pow2QuantError
from pow2quant.plugins import resolve
from pow2quant.progress import Within
from pow2quant.report import summary
from pow2quant.runs import unfinished
from pow2quant.runs.chains import with_chain
from pow2quant.study.ledger import Claim, Plan
from pow2quant.study.space import Combination, applied, settings
from pow2quant.tasks.judging import EQUAL_DB, SQNR

RUNS = ("ptq", "qat")

Row = dict[str, Any]


@dataclass(frozen=True)
class Trials:
    """What every trial of a study has in common.

    base: what the settings of a trial are laid over. runs: `ptq` or `qat` makes a whole run of every trial, exported
    and validated, in `folder`; None: networks are quantized and their simulation is evaluated. In `folder` is also what
    a trial on its way has computed, so that another worker continues one whose worker was killed.
    """

    base: RunConfig
    plan: Plan
    folder: Path
    runs: str | None = None

    def config(self, grid: int, combination: Combination) -> RunConfig:
        """The configuration of a trial. Raises ConfigError for one that is not legal."""
        return applied(self.base, settings(self.plan.grids[grid], combination))

    def run(self, claim: Claim, progress: Progress = SILENT) -> tuple[Row, float | None, str]:
        """The trial's columns, its leading metric so that more is better (None: failed), and why it failed.

        What is no error of the configuration, such as a full disk for a moment, is tried once more.
        """
        row, value, error, again = self._tried(claim, progress)
        if again:
            progress.note(f"trial {claim.number + 1} failed ({error}) and is tried once more")
            row, value, error, again = self._tried(claim, progress)
            error += " (tried twice)" if again else ""
        return row, value, error

    def _tried(self, claim: Claim, progress: Progress) -> tuple[Row, float | None, str, bool]:
        """The same, and whether trying again may help."""
        started, again = time.monotonic(), False
        row: Row = {}
        try:
            config = self.config(claim.grid, claim.combination)
            row = described(config)
            found = self._quantized(config, claim, progress)
            row |= measured(found)
            value, error = quality(row), ""
        except Pow2QuantError as raised:
            value, error, again = None, str(raised), isinstance(raised, OutputError)
        except KeyboardInterrupt:
            raise
        except BaseException as raised:  # a network, a plug-in or a library may raise anything; the others go on
            value, error, again = None, f"{type(raised).__name__}: {raised}", True
        row["duration_seconds"] = round(time.monotonic() - started, 2)
        return row, value, " ".join(error.split()), again

    def _quantized(self, config: RunConfig, claim: Claim, progress: Progress) -> dict[str, Any]:
        from pow2quant import runs, three_steps

        progress = Within(progress.note, f"trial {claim.number + 1} of {len(self.plan)}")
        labels = "-".join(re.sub(r"[^\w.+]+", "_", str(label), flags=re.ASCII) for label in claim.combination.values())
        folder = self.folder / f"{claim.number:04}-{labels[:80]}"
        if self.runs is None:
            with unfinished.beside(folder) as kept:
                return runs.score(config, progress, kept)
        make = runs.ptq if self.runs == "ptq" else partial(three_steps.qat, resume=True)
        result = make(config, folder, overwrite=True, progress=progress)
        if result is None:
            raise OutputError(f"{folder}: another process of torchrun's leads")
        return {**result.report, "run": str(folder), "agrees": result.agrees}

    def clear(self) -> None:
        """Removes what trials have computed that failed, or that another worker finished elsewhere."""
        for left in self.folder.glob("[0-9]*-*.unfinished"):
            unfinished.remove(left)


def described(config: RunConfig) -> Row:
    """What a configuration says of a trial: network, data, bits, methods and each of their parameters, seed."""
    weight, output = config.quantization.weight, config.quantization.output
    methods = with_chain(config, configuration.default_methods(config)).ptq.applied
    row: Row = {
        "network": Path(config.model.name.rpartition("/")[2]).name.rpartition(":")[2],
        "dataset": config.data.dataset,
        "backend": config.backend,
        "weight_bits": weight and weight.bits,
        "activation_bits": output and output.bits,
        "methods": "+".join(method.name for method in methods) or "none",
        "seed": config.seed,
    }
    for method in methods:
        row |= {f"{method.name}.{key}": value for key, value in _parameters(method).items()}
    return row


def _parameters(method: Choice) -> dict[str, Any]:
    """A method's parameters, those too that are not given. Raises ConfigError for one that it does not have."""
    cls = resolve("methods", method.name)
    configuration.parameters(cls, method.parameters, f"ptq.methods.{method.name}")
    return {**configuration.defaults(cls), **method.parameters}


def measured(report: Mapping[str, Any]) -> Row:
    """What a report, or `runs.score`, says of a trial, by the task's leading metric.

    metric, unit, higher_is_better: what it is; original, quantized: of the float network and the quantized one; where
    there are no targets, the SQNR of the outputs. change: of the metric, with its 95 % interval; images, of_images,
    classes, sample: on what it was measured. Top-1 and top-5 beside them, in per cent, for classification. Of whole
    runs agrees, run (the folder) and file_bytes, the size of its ONNX file.
    """
    evaluation = report["evaluation"]
    name, values = summary.leading(report)
    first, final = values["float"], values["quantized"]
    if name == SQNR.name and final is None:
        final = EQUAL_DB
    low, high = evaluation["interval"] or (None, None)
    row: Row = {
        "metric": name,
        "unit": values["unit"],
        "higher_is_better": values["higher_is_better"],
        "original": first,
        "quantized": final,
        "original_top1": report.get("initial_accuracy"),
        "original_top5": report.get("initial_accuracy_top5"),
        "quantized_top1": report.get("final_accuracy"),
        "quantized_top5": report.get("final_accuracy_top5"),
        "sqnr_db": report["final_sqnr_db"],
        "images": evaluation["images"],
        "of_images": evaluation["of"],
        "classes": evaluation["classes"],
        "sample": evaluation["sample"],
        "preprocessing": "; ".join(evaluation["preprocessing"]) or None,
        "change": None if first is None or final is None else round(final - first, 4),
        "change_low": low,
        "change_high": high,
    }
    if "run" in report:
        row |= {"agrees": report["agrees"], "run": report["run"], "file_bytes": report["model_size_bytes"]["quantized"]}
    return row


def quality(row: Row, column: str = "quantized") -> float | None:
    """A column of the leading metric (`quantized`, `change`) so that more is better; None where it has no value."""
    value: float | None = row[column]
    return value if value is None or row["higher_is_better"] else -value
