"""ExecuTorch: the torch program of `pt2` with int8 tensors, delegated to XNNPACK, as a .pte: exporter and executor.

What cannot be int8 there (other widths, functions, layers whose result is not rounded) is computed in float32, which is
exact for what the certificate proves.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from pow2quant import targets
from pow2quant.errors import MissingExtraError, UnsupportedModelError
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN
from pow2quant.runs import pt2
from pow2quant.saving import write
from pow2quant.validation.files import opened

if TYPE_CHECKING:
    from pow2quant.artifact import Artifact
    from pow2quant.validation.agreement import Executor

FILE = "model.pte"
NAME = "ExecuTorch (XNNPACK)"

LOW, HIGH = -128, 127
ATEN, Q = torch.ops.aten, torch.ops.quantized_decomposed
LAYERS = (ATEN.conv1d.default, ATEN.conv2d.default, ATEN.linear.default)
SUMS = (ATEN.add.Tensor, ATEN.sub.Tensor)
CLIPS = (ATEN.clamp.default, ATEN.relu6.default, ATEN.hardtanh.default)
ACTIVATIONS = (ATEN.relu.default, ATEN.relu6.default, ATEN.hardtanh.default)
LARGEST_RATIO = 128.0
"""XNNPACK takes scales of products below 256 times that of the result."""


def export_executorch(artifact: Artifact, folder: Path, *, batch: int = 1) -> Path:
    """A program for ExecuTorch with XNNPACK, int8 inside and float32 at its ends, in `folder`. Returns the file.

    batch: the size that it takes. Raises MissingExtraError without executorch; UnsupportedModelError for what it does
    not convert.
    """
    _require_known_sums(artifact)
    path = Path(folder) / FILE
    write(path, content(pt2.program(artifact, batch)))
    return path


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The QDQ file as a .pte in ExecuTorch's runtime, one sample at a time.

    Raises MissingExtraError where it is not installed; UnsupportedModelError for a sum over a dimension, and, when it
    is run, for what it cannot convert.
    """
    runtime = _package("executorch.runtime").Runtime.get()
    _require_known_sums(opened(model).network)
    return [pt2.executor(model, NAME, lambda program: _loaded(runtime, content(program)))]


def content(program: torch.export.ExportedProgram) -> bytes:
    """The .pte of a program whose quantizers are written as div, round, clamp and mul."""
    exir = _package("executorch.exir")
    xnnpack = _package("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    with_int8 = in_int8(program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls what is deprecated
        try:
            lowered = exir.to_edge_transform_and_lower(with_int8, partitioner=[xnnpack.XnnpackPartitioner()])
            return bytes(lowered.to_executorch().buffer)
        except Exception as error:  # whatever its passes raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedModelError(f"ExecuTorch: the network cannot be converted: {reason}") from error


def _require_known_sums(network: Artifact) -> None:
    """Raises UnsupportedModelError for a sum over a dimension, which float32 kernels round half to even."""
    target = targets.of(network.model)
    for node in network.model.graph.node:
        if node.op_type == "ReduceSum" and (rule := target.rounding.of(node.op_type)) != HALF_EVEN:
            raise UnsupportedModelError(
                f"{node.name or node.output[0]}: ExecuTorch rounds a sum over a dimension {HALF_EVEN}, "
                f"target {target.name} {rule}"
            )


def in_int8(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with quantize and dequantize in place of quantizers of 8 bits, and with int8 weights between them."""
    _package("torch.ao.quantization.fx._decomposed")  # registers the operations
    module = program.module()
    for node in list(module.graph.nodes):
        if node.target == ATEN.mul.Tensor:
            _quantize(module.graph, node)
    module.graph.eliminate_dead_code()
    for node in list(module.graph.nodes):
        if node.target in LAYERS:
            _weights(module, node)
        if node.target in SUMS:
            _constants(module, node)
    module.recompile()
    return torch.export.export(module, program.example_inputs[0])


def _quantize(graph: fx.Graph, last: Any) -> None:
    """In place of `mul(clamp(round(div(x, scale)), low, high), scale)`, where that has 256 codes."""
    nodes = [last]
    for target in (ATEN.clamp.default, ATEN.round.default, ATEN.div.Tensor):
        before = nodes[-1].args[0]
        if getattr(before, "target", None) != target:
            return
        nodes.append(before)
    x, scale = nodes[-1].args
    low, high = nodes[1].args[1:]
    if scale != last.args[1] or not isinstance(scale, float) or high - low != HIGH - LOW:
        return
    grid = (scale, int(LOW - low), LOW, HIGH, torch.int8)
    with graph.inserting_before(last):
        if x.target in CLIPS and x.args[0].target in SUMS:  # only what is rounded at once is added in int8
            codes = graph.call_function(Q.quantize_per_tensor.default, (x.args[0], *grid))
            sums = graph.call_function(Q.dequantize_per_tensor.default, (codes, *grid))
            x = graph.call_function(x.target, (sums, *x.args[1:]))
        codes = graph.call_function(Q.quantize_per_tensor.default, (x, *grid))
    for user in list(last.users):  # XNNPACK takes a dequantize together with the one node that reads it
        with graph.inserting_before(user):
            values = graph.call_function(Q.dequantize_per_tensor.default, (codes, *grid))
        user.replace_input_with(last, values)


def _weights(module: fx.GraphModule, layer: Any) -> None:
    """Gives int8 weights to a layer between int8 tensors."""
    ahead, weight, bias = (*layer.args, None)[:3]
    behind = _quantizer_behind(layer)
    if behind is None or ahead.target != Q.dequantize_per_tensor.default:
        return
    scale = ahead.args[1]
    values = operator.attrgetter(weight.target)(module)
    offsets = None if bias is None else operator.attrgetter(bias.target)(module)
    scales = weight_scales(values, offsets, scale, LARGEST_RATIO * behind.args[1] / scale)
    if scales is None:
        return
    codes = (values / scales.reshape(-1, *[1] * (values.ndim - 1))).to(torch.int8)
    names = [f"{layer.name}_{key}" for key in ("codes", "scales", "zero_points")]
    for name, constant in zip(names, (codes, scales, torch.zeros_like(scales, dtype=torch.int64)), strict=True):
        module.register_buffer(name, constant)
    with module.graph.inserting_before(layer):
        held = [module.graph.get_attr(name) for name in names]
        dequantized = module.graph.call_function(Q.dequantize_per_channel.default, (*held, 0, LOW, HIGH, torch.int8))
    layer.replace_input_with(weight, dequantized)


def _constants(module: fx.GraphModule, add: Any) -> None:
    """Gives int8 codes to a constant operand of a sum that is rounded at once: XNNPACK adds two int8 tensors."""
    behind = _only_user(add)
    if behind is None or behind.target != Q.quantize_per_tensor.default:
        return
    for operand in [x for x in add.args[:2] if getattr(x, "op", None) == "get_attr"]:
        values = operator.attrgetter(operand.target)(module).detach()
        scale = float(units(values.reshape(1, -1)).clamp(max=LARGEST_RATIO * behind.args[1]))
        codes = values.double() / scale
        zero_point = int(max(LOW - codes.min(), 0) + min(HIGH - codes.max(), 0))
        if codes.max() - codes.min() > HIGH - LOW:
            continue
        name = f"{add.name}_{operand.name}_codes"
        module.register_buffer(name, (codes + zero_point).to(torch.int8))
        grid = (scale, zero_point, LOW, HIGH, torch.int8)
        with module.graph.inserting_before(add):
            held = module.graph.get_attr(name)
            dequantized = module.graph.call_function(Q.dequantize_per_tensor.default, (held, *grid))
        add.replace_input_with(operand, dequantized)


def _quantizer_behind(layer: Any) -> Any:
    """The quantize that alone reads a layer, or the one activation behind it, which then gets the name to be fused."""
    behind = _only_user(layer)
    if behind is not None and behind.target == ATEN.clamp.default and None not in behind.args:
        behind.target = ATEN.hardtanh.default
    if behind is not None and behind.target in ACTIVATIONS:
        behind = _only_user(behind)
    return behind if behind is not None and behind.target == Q.quantize_per_tensor.default else None


def weight_scales(weight: Tensor, bias: Tensor | None, input_scale: float, largest: float) -> Tensor | None:
    """The coarsest 2^k of every channel of which its weights, and its bias over `input_scale`, are multiples.

    weight: (O, ...), on a grid of 2^k. bias: (O,). largest: of a scale. Returns (O,), or None where codes are wider
    than 8 bits.
    """
    weights = rows = weight.detach().double().reshape(len(weight), -1)
    if bias is not None:
        rows = torch.cat([rows, bias.detach().double()[:, None] / input_scale], 1)
    scales = units(rows).clamp(max=2.0 ** math.floor(math.log2(largest)))
    codes = weights / scales[:, None]
    return scales.float() if bool(((codes >= LOW) & (codes <= HIGH)).all()) else None


def units(rows: Tensor) -> Tensor:
    """The largest 2^k of which all values of a row are multiples; infinity for zeros. rows: (O, ...). Returns (O,)."""
    mantissas, exponents = torch.frexp(rows.double())
    odd = (mantissas * 2.0**53).long()
    trailing = (odd & -odd).double()
    return torch.where(rows == 0, torch.inf, torch.ldexp(trailing, exponents - 53)).amin(1)


def _only_user(node: Any) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _loaded(runtime: Any, file: bytes) -> Callable[..., Any]:
    """A .pte in the runtime."""
    try:
        program = runtime.load_program(file)
        program.load_method("forward")
    except Exception as error:
        raise UnsupportedModelError(f"ExecuTorch: the program cannot be loaded: {error}") from error

    def run(*inputs: Tensor) -> list[Tensor]:
        method = program.load_method("forward")  # `program` keeps it, and the memory that it reads
        return [found.clone() for found in method.execute(inputs)]

    return run


def _package(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental
            return import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"ExecuTorch is not installed: pip install 'pow2quant[executorch]' ({error})"
        ) from error
