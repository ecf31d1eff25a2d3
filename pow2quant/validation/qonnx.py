"""QONNX as an executor: every Quant by the qonnx package, every other node alone in onnxruntime.

(The package runs whole files too, but writes single nodes in the newest IR version of onnx, which onnxruntime may not
know.)
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from pow2quant.adapters.qonnx import BEHIND, DOMAIN, from_qonnx, to_qonnx
from pow2quant.errors import MissingExtraError
from pow2quant.validation.agreement import Executor
from pow2quant.validation.files import opened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from pow2quant.validation.agreement import Arrays

NAME = "QONNX"


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The file as QONNX.

    Raises MissingExtraError where qonnx is not installed; UnsupportedModelError, naming the tensor, where the network
    cannot be written as QONNX.
    """
    try:
        import_module(DOMAIN)  # where getCustomOp looks; without a package that this needs, it finds no operation
        custom_op = import_module("qonnx.custom_op.registry").getCustomOp
    except ImportError as error:
        raise MissingExtraError(f"qonnx is not installed: pip install 'pow2quant[qonnx]' ({error})") from error
    network = opened(model).network
    graph, file = network.model.graph, File(to_qonnx(network), custom_op)
    inputs = [value.name for value in graph.input]
    activations = network.encodings.keys() - {tensor.name for tensor in graph.initializer}

    def run(batch: Arrays) -> list[NDArray[np.float32]]:
        found = file.run(batch)
        return [found[value.name] for value in graph.output]

    def tensors(batch: Arrays) -> Mapping[str, NDArray[np.float32]]:
        found = file.run(batch)
        return {name: found[name + BEHIND if name in inputs else name] for name in activations}

    return [Executor(NAME, run, tensors, network=lambda: from_qonnx(file.model), measured=True)]


class File:
    """A QONNX file. custom_op: a node -> what qonnx executes it with."""

    def __init__(self, model: onnx.ModelProto, custom_op: Any) -> None:
        self.model, self.custom_op = model, custom_op
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}

    def run(self, batch: Arrays) -> dict[str, NDArray[Any]]:
        """Graph inputs -> every tensor by name."""
        graph = self.model.graph
        given = {value.name: np.asarray(x, np.float32) for value, x in zip(graph.input, batch, strict=True)}
        found: dict[str, NDArray[Any]] = self.constants | given
        for node in graph.node:
            if node.domain == DOMAIN:
                self.custom_op(node).execute_node(found, graph)
            else:
                feeds = {name: found[name] for name in node.input if name}
                found.update(zip(node.output, self._session(node, feeds).run(None, feeds), strict=True))
        return found

    def _session(self, node: onnx.NodeProto, feeds: dict[str, NDArray[Any]]) -> onnxruntime.InferenceSession:
        if node.output[0] not in self.sessions:
            inputs = [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim)
                for name, x in feeds.items()
            ]
            outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
            model = helper.make_model(
                helper.make_graph([node], node.name or node.op_type, inputs, outputs),
                opset_imports=[entry for entry in self.model.opset_import if entry.domain != DOMAIN],
                ir_version=self.model.ir_version,
            )
            self.sessions[node.output[0]] = onnxruntime.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )
        return self.sessions[node.output[0]]
