"""esp-ppq, which simulates ESP-DL, as an executor: the float network with the scales of the QDQ file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from pow2quant import targets
from pow2quant.errors import MissingExtraError, UnsupportedModelError
from pow2quant.saving import scratch
from pow2quant.validation.agreement import Executor
from pow2quant.validation.files import opened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact
    from pow2quant.pow2_constraints import Encoding

    Arrays = Sequence[NDArray[np.float32]]

STEPS = 8
"""Batches of noise that it calibrates with, before its scales are replaced; fewer it refuses."""


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The QDQ file in esp-ppq's simulation: of the ESP32-S3 where the target's weights have one scale, else of the P4.

    Raises MissingExtraError where esp-ppq is not installed; UnsupportedModelError, naming the tensor, for an encoding
    that ESP-DL does not have.
    """
    require()
    file = File(opened(model).network)
    return [Executor(f"esp-ppq ({file.chip})", file.run, file.tensors, network=lambda: file.network, measured=True)]


def require() -> None:
    """Raises MissingExtraError where esp-ppq is not installed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it greets
            import_module("esp_ppq.api")
    except ImportError as error:
        raise MissingExtraError(f"esp-ppq is not installed: pip install 'pow2quant[esp-ppq]' ({error})") from error


class File:
    """A network in esp-ppq. batch: that it is traced with; it runs others too. chip: as it calls it.

    Raises UnsupportedModelError, naming the tensor, for an encoding that ESP-DL does not have.
    """

    def __init__(self, network: Artifact, batch: int = 2) -> None:
        self.network, self.batch = network.per_channel(), batch
        self.chip = "esp32s3" if targets.of(network.model).limits.per_tensor else "esp32p4"
        parameters = {tensor.name for tensor in network.model.graph.initializer}
        for name, encoding in network.encodings.items():
            if name not in parameters and (encoding.zero_point.any() or not encoding.grid.signed):
                raise UnsupportedModelError(f"{name}: ESP-DL has signed codes with zero point 0 (--target esp32-p4)")
        computed = {name for node in network.model.graph.node for name in node.output}
        self.activations = sorted(network.encodings.keys() & computed)

    def run(self, batch: Arrays) -> list[NDArray[np.float32]]:
        """Graph inputs -> graph outputs."""
        return self._forward(batch, None)

    def tensors(self, batch: Arrays) -> Mapping[str, NDArray[np.float32]]:
        """Graph inputs -> every quantized tensor that is computed."""
        return dict(zip(self.activations, self._forward(batch, self.activations), strict=True))

    def _forward(self, batch: Arrays, names: list[str] | None) -> list[NDArray[np.float32]]:
        inputs = [torch.from_numpy(np.ascontiguousarray(x, np.float32)) for x in batch]
        return [x.numpy() for x in self._executor.forward(inputs, output_names=names)]

    @cached_property
    def _executor(self) -> Any:
        executor: Any = import_module("esp_ppq.executor").TorchExecutor(self.graph, device="cpu")
        return executor

    @cached_property
    def graph(self) -> Any:
        """The quantized graph, with this project's scales."""
        api: Any = import_module("esp_ppq.api")
        setting = import_module("esp_ppq.api.setting").QuantizationSettingFactory.espdl_setting()
        shapes = [
            [d.dim_value or self.batch for d in v.type.tensor_type.shape.dim] for v in self.network.model.graph.input
        ]
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
        with scratch() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            onnx.save(self.network.model, folder / "model.onnx")
            try:
                graph = api.quantize_onnx_model(
                    str(folder / "model.onnx"),
                    [noise] * STEPS,
                    STEPS,
                    None,
                    api.get_target_platform(self.chip, "w8a8"),
                    inputs=noise,
                    setting=setting,
                    collate_fn=list,
                    device="cpu",
                )
            except Exception as error:  # whatever its passes raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UnsupportedModelError(f"esp-ppq: the network cannot be quantized: {reason}") from error
        self._put_scales(graph)
        return graph

    def _put_scales(self, graph: Any) -> None:
        """Replaces what was calibrated. A configuration that another one dominates has the other's scale."""
        encodings = self._encodings(graph)
        configurations = [
            (configuration, variable.name)
            for operation in graph.operations.values()
            for configuration, variable in getattr(operation, "config_with_variable", ())
            if variable.name in encodings
        ]
        own = [pair for pair in configurations if pair[0].dominated_by is pair[0]]
        for configuration, name in [*configurations, *own]:  # a tensor's own encoding counts
            scale = torch.tensor(encodings[name].scale, dtype=torch.float32)
            if (scale == scale.max()).all():  # a bias for each channel, where ESP-DL has one for all
                scale = scale.max().expand_as(configuration.dominated_by.scale).clone()
            configuration.dominated_by.scale = scale
            configuration.dominated_by.offset = torch.zeros_like(scale)

    def _encodings(self, graph: Any) -> dict[str, Encoding]:
        """The network's, and those of what esp-ppq puts in (zeros between the inputs of a transposed convolution)."""
        known = {name for node in self.network.model.graph.node for name in node.output}
        found = dict(self.network.encodings)
        for operation in graph.topological_sort():
            source = operation.inputs[0].name if operation.inputs else ""
            found |= {
                result.name: found[source]
                for result in operation.outputs
                if result.name not in known and source in found
            }
        return found
