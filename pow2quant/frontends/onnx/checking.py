"""Whether a network that was read from a file computes what onnxruntime computes from the file."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from pow2quant.errors import ModelError, UnsupportedModelError
from pow2quant.frontends.onnx.file import OnnxFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_VALUES = 1 << 26
"""Values of inputs that are made for the check; a network with larger inputs is compared when it is prepared."""

COMPARE = "pow2quant_compare"
"""In a network's `meta`, where no check was possible yet: `compare`, given the file."""

UP_TO_ONE = ("Sigmoid", "Softmax", "Tanh", "HardSigmoid")
"""Functions that onnxruntime computes to about 1e-7, however small the result is."""

APPROXIMATION = 1e-6

ROUNDINGS = 30
"""How many times farther apart two correct computations may be than two whose weights differ by one rounding."""


def examples(file: OnnxFile, batch: int) -> list[Tensor] | None:
    """Random inputs of a batch, or None where the file leaves other sizes than the batch open."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for name, dims in file.inputs:
        size = dims[1:]
        known = [d for d in size if d is not None]
        if len(known) != len(size) or np.prod([batch, *known], dtype=float) > MOST_VALUES:
            return None
        shape = (batch, *known) if dims else ()
        if file.types[name] in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
            made.append(torch.randn(shape, generator=generator))
        else:
            kind = torch.from_numpy(np.empty(0, helper.tensor_dtype_to_np_dtype(file.types[name]))).dtype
            made.append(torch.randint(0, 2, shape, generator=generator).to(kind))
    return made


def check(file: OnnxFile, network: nn.Module) -> bool:
    """Compares on random inputs; where the file fixes the batch size, a batch of twice that size, run in two parts.

    False where it leaves other sizes open: then `compare` has to, once they are known.
    Raises UnsupportedModelError for an output that is farther from onnxruntime's than rounding explains.
    """
    inputs = examples(file, 2 * file.batch if file.batch else 2)
    if inputs is not None:
        compare(file, network, inputs)
    return inputs is not None


def compare(file: OnnxFile, network: nn.Module, inputs: list[Tensor]) -> None:
    """Compares on these inputs, in parts of the batch size that the file fixes. Raises as `check` does."""
    rows = max((len(x) for x in inputs if x.ndim), default=1)
    step = file.batch or rows
    whole = torch.arange(-(-rows // step) * step)
    inputs = [x[whole % len(x)] if x.ndim else x for x in inputs]
    results = _results(network, inputs)
    tolerance = 3e-2 if TensorProto.FLOAT16 in file.types.values() else 1e-4
    for i, (name, wanted) in enumerate(zip(file.outputs, _run(file, inputs, step), strict=True)):
        got = results[i]
        finite = np.abs(wanted[np.isfinite(wanted)], dtype=np.float64)
        producer = file.producers.get(name)
        least = APPROXIMATION if producer is not None and producer.op_type in UP_TO_ONE else 1e-12
        bound = tolerance * float(finite.max(initial=0.0)) + least
        if got.shape == wanted.shape and not _near(got, wanted, bound):
            rounded = _results(_rounded(network), inputs)[i]
            bound += ROUNDINGS * float(np.nan_to_num(np.abs(got - rounded, dtype=np.float64)).max(initial=0.0))
        if got.shape != wanted.shape or not _near(got, wanted, bound):
            why = "the batch size that the file fixes cannot be opened" if file.batch else "a node is not understood"
            raise UnsupportedModelError(f"{file.name}: output {name!r} is not what onnxruntime computes ({why})")


def _near(got: NDArray[Any], wanted: NDArray[Any], bound: float) -> bool:
    return np.allclose(got, wanted, rtol=0, atol=bound, equal_nan=True)


def _results(network: nn.Module, inputs: list[Tensor]) -> list[NDArray[Any]]:
    with torch.no_grad():
        results = network(*inputs)
    return [x.numpy() for x in (results if isinstance(results, (tuple, list)) else [results])]


def _rounded(network: nn.Module) -> nn.Module:
    """A copy with every parameter moved by about one rounding: results that differ much are no better known."""
    generator = torch.Generator().manual_seed(0)
    network = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 2**-23 * torch.randn(parameter.shape, generator=generator))
    return network


def _run(file: OnnxFile, inputs: list[Tensor], step: int) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # beyond it, products with weights of 8 bits round what they are multiplied by, too
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    kinds = [helper.tensor_dtype_to_np_dtype(file.types[name]) for name, _ in file.inputs]
    arrays = [(n, x.numpy().astype(kind)) for (n, _), x, kind in zip(file.inputs, inputs, kinds, strict=True)]
    try:
        session = onnxruntime.InferenceSession(file.model.SerializeToString(), options, ["CPUExecutionProvider"])
        runs = [
            session.run(file.outputs, {name: x[i : i + step] if x.ndim else x for name, x in arrays})
            for i in range(0, max((len(x) for _, x in arrays if x.ndim), default=1), step)
        ]
    except Exception as error:  # onnxruntime's errors share no base
        raise ModelError(f"{file.name}: onnxruntime does not run it: {' '.join(str(error).split())[:200]}") from error
    return [
        np.concatenate(parts).astype(parts[0].dtype) if parts[0].ndim else parts[0] for parts in zip(*runs, strict=True)
    ]
