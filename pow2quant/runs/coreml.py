"""Core ML: the torch program of `pt2` as an mlpackage, through coremltools. It is written and read back, not run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from pow2quant.artifact import Artifact
from pow2quant.errors import MissingExtraError, OutputError, UnsupportedModelError
from pow2quant.runs.pt2 import program, require_half_even
from pow2quant.saving import staged

FILE = "model.mlpackage"


def export_coreml(artifact: Artifact, folder: Path, *, batch: int = 1) -> Path:
    """An mlpackage (ML program, iOS 17, float32) in `folder`. Returns `folder`.

    batch: the size that it takes. Raises MissingExtraError without coremltools; UnsupportedModelError for what it does
    not convert; OutputError where the file, read back, does not hold the scales of the network.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports ExecuTorch where that is installed
            coremltools: Any = import_module("coremltools")
    except ImportError as error:
        raise MissingExtraError(f"coremltools is not installed: pip install 'pow2quant[coreml]' ({error})") from error
    require_half_even(artifact)
    made = _converted(coremltools, artifact, batch)
    with staged(folder, FILE) as staging:
        made.save(str(staging / FILE))
        _check(artifact, list(scales(staging / FILE)))
    return folder


def _converted(coremltools: Any, artifact: Artifact, batch: int) -> Any:
    exported = program(artifact, batch).run_decompositions({})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls what it has deprecated itself
        try:
            return coremltools.convert(
                exported,
                minimum_deployment_target=coremltools.target.iOS17,
                compute_precision=coremltools.precision.FLOAT32,
                pass_pipeline=coremltools.PassPipeline.CLEANUP,  # others move scales into weights
                skip_model_load=True,
            )
        except Exception as error:  # whatever its converters raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedModelError(f"Core ML: the network cannot be converted: {reason}") from error


def scales(package: Path) -> Iterator[tuple[float, float]]:
    """Of every quantizer in an mlpackage, in order: the divisor before the rounding, and the factor after it."""
    loaded = import_module("coremltools").models.MLModel(str(package), skip_model_load=True)
    main = loaded.get_spec().mlProgram.functions["main"]
    operations = list(main.block_specializations[main.opset].operations)
    constants = {op.outputs[0].name: op.attributes["val"] for op in operations if op.type == "const"}
    producers = {out.name: op for op in operations for out in op.outputs}
    readers = {op.inputs["x"].arguments[0].name: op for op in operations if "x" in op.inputs and op.type != "const"}
    for op in operations:
        if op.type != "round":
            continue
        behind = op
        while behind.type != "mul":
            behind = readers[behind.outputs[0].name]
        ahead = producers[op.inputs["x"].arguments[0].name]
        first, last = (constants[each.inputs["y"].arguments[0].name] for each in (ahead, behind))
        yield tuple(each.immediateValue.tensor.floats.values[0] for each in (first, last))


def _check(artifact: Artifact, found: list[tuple[float, float]]) -> None:
    parameters = {tensor.name for tensor in artifact.model.graph.initializer}
    wanted = [float(e.scale) for name, e in artifact.encodings.items() if name not in parameters]
    if sorted(found) != sorted((scale, scale) for scale in wanted):
        raise OutputError(f"Core ML: the file, read back, has the scales {found}, not {wanted}")
