"""Flags that several commands share: they are written down once, and become a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import typer

from pow2quant.cli import options
from pow2quant.cli.console import Console

if TYPE_CHECKING:
    from pow2quant.config import RunConfig

KEYS = {
    "backend": "backend",
    "task": "task",
    "metric": "metric",
    "model": "model.name",
    "weights": "model.weights",
    "num_classes": "model.num_classes",
    "data": "data.dataset",
    "data_path": "data.path",
    "resize": "data.resize",
    "crop": "data.crop",
    "taken": "data.input",
    "weight_bits": "quantization.weight.bitwidth",
    "activation_bits": "quantization.output.bitwidth",
    "max_calibration_batches": "ptq.calibration_batches",
    "max_eval_batches": "ptq.max_eval_batches",
    "target": "target",
    "storage": "quantization.storage",
    "encodings_version": "encodings_version",
    "seed": "seed",
    "device": "device",
}
"""The keys of a configuration that flags set as they are."""

FLAGS = {
    "backend": options.Backend,
    "task": options.Task,
    "metric": options.MetricName,
    "model": options.Model,
    "weights": options.Weights,
    "num_classes": options.Classes,
    "data": options.DataSet,
    "data_path": options.DataPath,
    "resize": options.Resize,
    "crop": options.Crop,
    "mean": options.Mean,
    "std": options.Std,
    "taken": options.Input,
    "weight_bits": options.WeightBits,
    "activation_bits": options.ActivationBits,
    "per_tensor": options.PerTensor,
    "max_calibration_batches": options.CalibrationBatches,
    "max_eval_batches": options.EvalBatches,
    "method": options.Methods,
    "budget": options.Budget,
    "target": options.Target,
    "storage": options.Storage,
    "encodings_version": options.EncodingsVersion,
    "recipe": options.Recipe,
    "config": options.ConfigFile,
    "output": options.Output,
    "overwrite": options.Overwrite,
    "seed": options.Seed,
    "device": options.Device,
    "verbose": options.Verbose,
    "quiet": options.Quiet,
    "as_json": options.AsJson,
}
"""What typer knows of each, in the order of the help."""

NOT_EVERYWHERE = {
    "model",
    "weights",
    "weight_bits",
    "activation_bits",
    "method",
    "budget",
    "target",
    "storage",
    "encodings_version",
    "output",
    "overwrite",
}
"""Flags that only the commands have that name them."""

Command = Callable[..., int]


@dataclass(frozen=True)
class Given:
    """The shared flags of one call, by their names in `FLAGS`."""

    flags: Mapping[str, Any]

    def configured(self, own: Mapping[str, Any]) -> RunConfig:
        """The configuration of the flags; own: what the command's own ones add, by key (None: nothing)."""
        return options.configured(self.flags["config"], {**self._values(), **own}, self.flags["recipe"])

    def console(self, *, quiet: bool = False) -> Console:
        """The console that the flags ask for."""
        return options.console_of(self.flags["verbose"], quiet or self.flags["quiet"], self.flags["as_json"])

    def folder(self, command: str) -> Path:
        """The folder to write."""
        return self.flags["output"] or options.fresh(command)

    def _values(self) -> dict[str, Any]:
        bits, get = self.flags.get("activation_bits"), self.flags.get
        return {
            **{key: get(name) for name, key in KEYS.items()},
            "quantization.input.bitwidth": None if bits is None else max(8, bits),
            "quantization.weight.per_channel": False if get("per_tensor") else None,
            "data.mean": _numbers("--mean", get("mean")),
            "data.std": _numbers("--std", get("std")),
            "ptq.methods": _within(get("budget"), get("method")),
        }


def taking(*names: str) -> Callable[[Command], Command]:
    """Gives a command the flags of every command behind its own, and those with these names.

    The command gets them as its first argument, a `Given`.
    """
    shared = {name: option for name, option in FLAGS.items() if name in names or name not in NOT_EVERYWHERE}

    def decorated(command: Command) -> Command:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        added = [Parameter(n, Parameter.KEYWORD_ONLY, default=_default(o), annotation=o) for n, o in shared.items()]

        @wraps(command)
        def run(**flags: Any) -> int:
            return command(Given({name: flags.pop(name) for name in shared}), **flags)

        known = [*own, *added]
        vars(run)["__signature__"] = inspect.Signature(known)
        run.__annotations__ = {p.name: p.annotation for p in known}
        return run

    return decorated


def _default(option: Any) -> bool | None:
    """A switch is off; of all else nothing is given."""
    return False if get_args(option)[0] is bool else None


def _numbers(flag: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text}: expected numbers, as in 0.5,0.5,0.5", param_hint=f"'{flag}'") from None


def _within(budget: float | None, methods: list[str] | None) -> list[Any] | None:
    """The methods as a configuration has them; `auto` with its budget in minutes. None where none is named."""
    if budget is None:
        return list(methods) if methods else None
    if not methods or "auto" not in methods:
        raise typer.BadParameter("is for --method auto", param_hint="'--budget'")
    return [{"auto": {"minutes": budget}} if name == "auto" else name for name in methods]
