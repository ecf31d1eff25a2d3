"""What the drop-in writes: the float ONNX and encodings, with AIMET's fields and defaults."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnx
import torch

from pow2quant.adapters import aimet_encodings, onnx_qdq
from pow2quant.adapters.files import GRIDS
from pow2quant.artifact import Artifact, Table
from pow2quant.backends.base import Simulation
from pow2quant.backends.placement import tensor_name
from pow2quant.errors import ConfigError
from pow2quant.frontends.copies import copied
from pow2quant.pow2_constraints import Encoding, IntGrid
from pow2quant.quantsim.opsets import with_opset
from pow2quant.saving import write

if TYPE_CHECKING:
    import os

    from torch import Tensor


class Exported(Protocol):
    """What is written; see `model.QuantizationSimModel`."""

    simulation: Simulation

    @property
    def quant_args(self) -> dict[str, Any]: ...
    def encodings(self) -> Table: ...
    def artifact(self, example: Any) -> Artifact: ...
    def derive_biases(self) -> None: ...


WITHOUT_MEANING = {
    "dynamo",
    "verbose",
    "do_constant_folding",
    "training",
    "export_params",
    "keep_initializers_as_inputs",
    "external_data",
}
"""Arguments of `torch.onnx.export` that change nothing here: the file is written without torch's exporter."""

KNOWN = {"input_names", "output_names", "opset_version", "dynamic_axes", "kwargs", *WITHOUT_MEANING}


def default_version() -> str:
    """The encodings version that AIMET's global variable says, where AIMET is loaded; else 1.0.0."""
    return getattr(sys.modules.get("aimet_torch.common.quantsim"), "encoding_version", "1.0.0")


class OnnxExporter:
    """What `sim.onnx` is."""

    def __init__(self, sim: Exported) -> None:
        self.sim = sim

    def export(
        self,
        args: Tensor | Sequence[Tensor],
        f: str | os.PathLike[str] | io.BytesIO,
        *,
        encoding_version: str | None = None,
        export_int32_bias: bool | None = None,
        force_activation_as: str | None = "unsigned",
        **kwargs: Any,
    ) -> None:
        """Writes the float ONNX (weights on their grids) and, beside it, `.encodings` of a version.

        f: a path, or a buffer, which gets the ONNX alone. encoding_version: None for AIMET's global one.
        export_int32_bias: None for true from 2.0.0 on. force_activation_as: for 2.0.0 and 2.1.0, whether codes of
        activations are signed or unsigned; None leaves them as they are simulated. kwargs: those of
        `torch.onnx.export`; the batch is that of `args` unless `dynamic_axes` frees it.
        Raises ConfigError for what has no meaning here, OutputError.
        """
        version = encoding_version or default_version()
        if force_activation_as not in ("unsigned", "signed", None):
            raise ConfigError(f"force_activation_as: {force_activation_as!r} is not one of unsigned, signed, None")
        unknown = sorted(kwargs.keys() - KNOWN)
        if unknown:
            raise ConfigError(f"{unknown[0]}: has no meaning here; known are {', '.join(sorted(KNOWN))}")
        artifact = as_asked(self.sim.artifact(args), kwargs, _batch(args))
        if version >= "2" and force_activation_as:
            artifact = _with_codes(artifact, signed=force_activation_as == "signed")
        biases = export_int32_bias if export_int32_bias is not None else version >= "2"
        if isinstance(f, io.BytesIO):
            f.write(artifact.model.SerializeToString())
            return
        onnx_qdq.save(artifact.model, Path(f))
        write_encodings(artifact, Path(f).with_suffix(".encodings"), version, biases, self.sim.quant_args)


def pair(
    sim: Exported,
    folder: Path,
    name: str,
    example: Tensor | Sequence[Tensor],
    arguments: Any,
    model: bool,
    encodings: str,
    version: str,
) -> None:
    """`sim.export`: `<name>.pth`, the encodings twice, named after ONNX and after torch, `<name>.onnx` if `model`.

    arguments: a mapping, or AIMET's `OnnxExportApiArgs`.
    """
    artifact = as_asked(sim.artifact(example), dict(getattr(arguments, "kwargs", arguments) or {}), _batch(example))
    write(folder / f"{name}.pth", _pickled(sim.simulation))
    if model:
        onnx_qdq.save(artifact.model, folder / f"{name}.onnx")
    write_encodings(artifact, folder / f"{encodings}.encodings", version, False, sim.quant_args)
    write(folder / f"{encodings}_torch.encodings", torch_named(sim).encode())


def _pickled(simulation: Simulation) -> bytes:
    """The prepared float network, its weights and biases on their grids, as `torch.save` writes it."""
    network, table = copied(simulation.network), simulation.encodings()
    network.meta = {}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            value = simulation.parameter(name).detach().cpu()
            found = table.get(name)
            parameter.copy_(value if found is None else torch.from_numpy(found.fake_quantize(value.numpy())))
    buffer = io.BytesIO()
    torch.save(network, buffer)
    return buffer.getvalue()


def write_encodings(artifact: Artifact, path: Path, version: str, biases: bool, arguments: dict[str, Any]) -> None:
    """Writes an encodings file; `arguments` stand in it as `quantizer_args`, before 2.0.0."""
    parameters = {tensor.name for tensor in artifact.model.graph.initializer}
    table = artifact.encodings if biases else without_biases(artifact.encodings, parameters)
    text = aimet_encodings.dumps(table, parameters, version)
    document = json.loads(text)
    if "quantizer_args" in document:
        document["quantizer_args"] |= arguments
        text = json.dumps(document, indent=2) + "\n"
    write(path, text.encode())


def without_biases(table: Table, parameters: Collection[str]) -> Table:
    """The table without the parameters of 32 bits."""
    return {name: e for name, e in table.items() if not (name in parameters and e.grid.width == 32)}


def torch_named(sim: Exported) -> str:
    """The encodings as AIMET names them (0.6.1): by module, an input of the network where it is read; no biases."""
    sim.derive_biases()
    placement = sim.simulation.placement
    parameters = {s.name for s in placement.sites if s.role in ("weight", "bias")}
    table = without_biases(sim.encodings(), parameters)
    plain = json.loads(aimet_encodings.dumps(table, parameters & table.keys(), "0.6.1"))
    activations: dict[str, dict[str, dict[str, Any]]] = {}
    for node in sim.simulation.network.graph.nodes:
        if node.op != "call_module":
            continue
        module: dict[str, dict[str, Any]] = {}
        for index, source in enumerate(node.args):
            if getattr(source, "op", "") == "placeholder" and source.target in plain["activation_encodings"]:
                (entry,) = plain["activation_encodings"][source.target]
                module.setdefault("input", {})[str(index)] = entry
        if tensor_name(node) in plain["activation_encodings"]:
            module["output"] = {"0": plain["activation_encodings"][tensor_name(node)][0]}
        if module:
            activations[str(node.target)] = module
    document = {
        "version": "0.6.1",
        "activation_encodings": activations,
        "param_encodings": plain["param_encodings"],
        "excluded_layers": [],
        "quantizer_args": plain["quantizer_args"] | sim.quant_args,
        "producer": aimet_encodings.PRODUCER,
    }
    document |= {GRIDS: plain[GRIDS]} if GRIDS in plain else {}
    return json.dumps(document, indent=2) + "\n"


def as_asked(artifact: Artifact, arguments: Mapping[str, Any], batch: int | None) -> Artifact:
    """The artifact with the names, the opset and the batch that torch's exporter was asked for.

    batch: what the first dimension of inputs and outputs is, unless `dynamic_axes` speaks of it.
    """
    graph = artifact.model.graph
    renamed: dict[str, str] = {}
    for key, values in (("input_names", graph.input), ("output_names", graph.output)):
        names = arguments.get(key) or [v.name for v in values]
        if len(names) != len(values):
            raise ConfigError(f"{key}: {len(names)} names for {len(values)} tensors")
        renamed |= {value.name: name for value, name in zip(values, names, strict=True)}
    for value in (*graph.input, *graph.output):
        value.name = renamed[value.name]
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    model = with_opset(artifact.model, arguments.get("opset_version"))
    _set_batch(model.graph, arguments.get("dynamic_axes") or {}, batch)
    return Artifact(model, {renamed.get(name, name): e for name, e in artifact.encodings.items()})


def _set_batch(graph: onnx.GraphProto, dynamic: Mapping[str, Any], batch: int | None) -> None:
    """Fixes the free first dimension, or gives it the name that `dynamic_axes` has for it."""
    for value in (*graph.input, *graph.output):
        axes = dynamic.get(value.name, {})
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if not dimension.HasField("dim_param"):
                continue
            if axis in axes:
                dimension.dim_param = axes[axis] if isinstance(axes, Mapping) else f"{value.name}_dynamic_axes_{axis}"
            elif batch is not None:
                dimension.dim_value = batch


def _batch(example: Tensor | Sequence[Tensor]) -> int | None:
    tensors = example if isinstance(example, (tuple, list)) else (example,)
    sizes = {int(x.shape[0]) for x in tensors if getattr(x, "ndim", 0)}
    return sizes.pop() if len(sizes) == 1 else None


def _with_codes(artifact: Artifact, signed: bool) -> Artifact:
    """The same values of activations in signed or unsigned codes: the zero point moves with the grid."""
    parameters = {tensor.name for tensor in artifact.model.graph.initializer}
    table = dict(artifact.encodings)
    for name, e in artifact.encodings.items():
        if name not in parameters and e.grid.signed != signed and isinstance(e.grid.bits, int) and not e.grid.narrow:
            grid = IntGrid(e.grid.bits, signed)
            table[name] = Encoding(e.scale, e.zero_point + grid.qmin - e.grid.qmin, grid, e.axis)
    return Artifact(artifact.model, table)
