"""One call from a network and data to a quantized network and its verdict."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from pow2quant import config as configuration
from pow2quant.backends.base import Progress
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError
from pow2quant.frontends.export import module_of
from pow2quant.models import PYTHON
from pow2quant.runs.chosen import config_of, methods_of_argument, shown
from pow2quant.runs.computing import own_numbers
from pow2quant.runs.job import Given
from pow2quant.runs.result import Result
from pow2quant.runs.writing import ptq


def quantize(
    model: nn.Module | ExportedProgram | str | os.PathLike[str] | None = None,
    data: Any = None,
    bits: str | None = None,
    methods: Any = None,
    metric: Any = None,
    task: str | None = None,
    backend: str | None = None,
    target: str | None = None,
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool | Progress = True,
    *,
    overwrite: bool = False,
) -> Result:
    """Quantizes a network so that every scale is 2^k, and checks in every executor that the result is the same.

    `pow2quant ptq` is a configuration and this call: both give the same bits.

    Args:
        model: an `nn.Module` (left as it is), an `ExportedProgram`, the path of a float ONNX file, or a name as for
            `--model`. Default: the embedded network, on its own data.
        data: a DataLoader or another iterable of batches, a Dataset, arrays `(X, y)`, a name as for `--data`, or a pair
            (calibration, evaluation) of these. A batch is a tensor or an array, `(x, y)`, or a dictionary; targets are
            only needed for a metric.
        bits: of weights and activations, from `w2a2` to `w16a16`, by default `w8a8`; the network's input keeps at least
            8.
        methods: names, objects such as `AdaRound(iterations=100)`, or `{"adaround": {"iterations": 100}}`, applied in
            order; `"none"` for plain rounding. Default: what is good for the bits. It stands in front of methods that
            build on exponents which others chose (`adaround`, `gpfq`), unless the first name is `"none"`.
        metric: what to judge by first: one of the task's own by name, `torchmetrics:NAME`, `file.py:function`, a
            function of all outputs and all targets, or an object with `update` and `compute`.
        task: classification, multi-label, segmentation, regression, image-to-image, detection, or none. Default: what
            the data look like.
        backend: custom (pure PyTorch, the default) or aimet.
        target: the runtime or chip whose arithmetic is meant, by name (`pow2quant targets`) or a YAML file; default:
            onnxruntime.
        config: everything else: a `RunConfig`, its values as nested dictionaries, or a YAML file. What it says of bits
            and backend holds unless these are given too.
        output: the run's folder; default: a temporary one, which goes with the result. `result.save(folder)` keeps it.
        progress: show bars; or an object with `track` and `note`.
        overwrite: replace an existing run in `output`.

    PyTorch's random numbers go on as before. Its flags stay those of exact sums (no TF32, deterministic cuDNN), so that
    what is returned keeps its bits.
    Raises Pow2QuantError, one line, for everything that can be fixed.
    """
    base, given, bars = requested(model, data, bits, methods, metric, task, backend, target, config, progress)
    with own_numbers():
        if output is not None:
            return ptq(base, output, overwrite=overwrite, progress=bars, given=given)
        folder = Temporary()
        return replace(ptq(base, folder.path / "run", progress=bars, given=given), keeps=folder)


def requested(
    model: Any,
    data: Any,
    bits: Any,
    methods: Any,
    metric: Any,
    task: str | None,
    backend: str | None,
    target: str | None,
    config: Any,
    progress: bool | Progress,
) -> tuple[RunConfig, Given, Progress]:
    """What the arguments of `quantize` ask for: a configuration, objects in place of what it names, and progress.

    Raises ConfigError for what is not legal.
    """
    model = module_of(model)
    chosen, own = methods_of_argument(methods)
    base = config_of(config)
    values = _model_values(model, data) | _bits_of(bits) | {"task": task, "ptq.methods": chosen, "target": target}
    values["backend"] = backend
    values["metric"] = metric if isinstance(metric, str) else None
    base = configuration.with_values(base, {key: value for key, value in values.items() if value is not None})
    given = Given(
        model=model if isinstance(model, nn.Module) else None,
        data=None if data is None or _is_name(data) else data,
        methods=own,
        metric=None if isinstance(metric, str) else metric,
    )
    return base, given, shown(progress)


class Temporary:
    """A folder that goes when this object goes."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="pow2quant-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _is_name(data: Any) -> bool:
    return isinstance(data, (str, os.PathLike))


def _model_values(model: Any, data: Any) -> dict[str, Any]:
    """The keys of the configuration that say which network and which data."""
    values: dict[str, Any] = {}
    if isinstance(model, nn.Module):
        values["model.name"] = f"{PYTHON}{type(model).__name__}"
        if data is None:
            raise ConfigError("data: needed for calibration; give a DataLoader, arrays, or a name such as 'digits'")
    elif _is_name(model):
        values["model.name"] = os.fspath(model)
    elif model is not None:
        what = f"the class {model.__name__}; make one" if isinstance(model, type) else f"a {type(model).__name__}"
        what += "; load a state dict into the network" if isinstance(model, Mapping) else ""
        what += "; call it, if it makes one" if inspect.isroutine(model) else ""
        raise ConfigError(f"model: expected an nn.Module, a name or a path, got {what}")
    if _is_name(data):
        folder = Path(data).is_dir()
        values |= {"data.dataset": "imagefolder", "data.path": str(data)} if folder else {"data.dataset": str(data)}
    elif data is not None:
        values["data.dataset"] = f"{PYTHON}{type(data).__name__}"
    return values


def _bits_of(bits: Any) -> dict[str, Any]:
    """The keys of the configuration that say how many bits."""
    if bits is None:
        return {}
    found = re.fullmatch(r"w(\d+)a(\d+)", bits.lower()) if isinstance(bits, str) else None
    if found is None:
        raise ConfigError(f"bits: {bits!r} is not legal; legal: wNaM, such as 'w8a8' or 'w4a8', N and M from 2 to 16")
    weight, activation = map(int, found.groups())
    return {
        "quantization.weight.bitwidth": weight,
        "quantization.output.bitwidth": activation,
        "quantization.input.bitwidth": max(8, activation),
    }
