"""Parts of report.json: every tensor's encoding, the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pow2quant.artifact import Artifact
    from pow2quant.pow2_constraints import Encoding


def is_power_of_two(encodings: Iterable[Encoding]) -> bool:
    """Whether every scale is exactly 2^k."""
    return all(e.is_power_of_two for e in encodings)


def details(artifact: Artifact) -> dict[str, Any]:
    """Every encoding by tensor; a producer's is repeated as `<module>.input` under each consumer."""
    table = artifact.encodings
    parameters = {t.name for t in artifact.model.graph.initializer}
    found = {name: _detail(encoding) for name, encoding in table.items()}
    for node in artifact.model.graph.node:
        read = [name for name in node.input if name in table and name not in parameters]
        for i, name in enumerate(read):
            found[f"{node.name}.input{f'_{i}' if i else ''}"] = _detail(table[name])
    return found


def _detail(encoding: Encoding) -> dict[str, Any]:
    """Of a weight with blocks the smallest scale of each channel, the size of a block and the number of all scales."""
    blocks, bits = {}, encoding.grid.bits
    if encoding.block is not None:
        blocks = {"block": encoding.block, "scales": encoding.scale.size}
        encoding = encoding.per_channel
    detail = blocks | {
        "scale": encoding.scale.astype(np.float64).tolist(),
        "zero_point": encoding.zero_point.tolist(),
        "bitwidth": bits,
        "symmetric": encoding.symmetric,
        "signed": encoding.grid.signed,
    }
    if encoding.is_power_of_two:
        k = encoding.exponent
        texts = [(f"2^({e})", "x" if e == 0 else f"x >> {-e}" if e < 0 else f"x << {e}") for e in k.ravel().tolist()]
        detail["exponent"] = k.tolist()
        detail["power_of_2"] = [t for t, _ in texts] if k.ndim else texts[0][0]
        detail["hardware_op"] = [t for _, t in texts] if k.ndim else texts[0][1]
    return detail


def environment(threads: int) -> dict[str, Any]:
    """Machine and versions, for report.json; threads: how many PyTorch computes with."""
    packages = ("pow2quant", "torch", "torchvision", "onnx", "onnxruntime", "numpy", "aimet-torch")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
