"""The exporter: an artifact as a TFLite file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pow2quant.integer.lower import lower
from pow2quant.integer.tflite.graph import Graph
from pow2quant.integer.tflite.steps import write
from pow2quant.saving import staged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pow2quant.artifact import Artifact
    from pow2quant.integer.program import Program

FILE = "model.tflite"


def export_tflite(artifact: Artifact, folder: Path) -> Path:
    """TFLite, int8 and channels last, for LiteRT and TensorFlow Lite Micro, in `folder`. Returns it.

    Raises what `lower` raises; MissingExtraError without ai-edge-litert; UnsupportedModelError, naming the node, for
    what TFLite does not have.
    """
    content = to_tflite(lower(artifact))
    with staged(folder, FILE) as staging:
        (staging / FILE).write_bytes(content)
    return folder


def to_tflite(program: Program, outputs: Sequence[str] | None = None) -> bytes:
    """The file of a program. outputs: names of tensors to give in place of the network's outputs."""
    graph = Graph(program)
    for name in program.inputs:
        graph.activation(name)
    for step in program.steps:
        write(graph, step)
    return graph.file(program.outputs if outputs is None else outputs)
