"""onnxruntime in JavaScript as executors of the QDQ file: onnxruntime-web (WebAssembly) and onnxruntime-node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from pow2quant.errors import MissingExtraError, UnsupportedModelError
from pow2quant.saving import scratch
from pow2quant.validation import onnx_runtimes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pow2quant.validation.agreement import Executor

SCRIPT = Path(__file__).parent / "templates" / "onnxruntime.js"


def web(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The QDQ file in onnxruntime-web, the build for browsers, under node; see `executor`."""
    return [executor(model, "onnxruntime-web")]


def node(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """The QDQ file in onnxruntime-node; see `executor`."""
    return [executor(model, "onnxruntime-node")]


def executor(model: Path, package: str) -> Executor:
    """The QDQ file in a package of node, on one thread.

    Raises MissingExtraError without node, or without the package in the working folder or along NODE_PATH.
    """
    if shutil.which("node") is None:
        raise MissingExtraError(f"{package} needs node, which is not on the PATH")
    if version(package) is None:
        raise MissingExtraError(f"{package} is not installed: npm install {package}, or set NODE_PATH")
    return onnx_runtimes.executor(model, package, lambda file: loaded(package, file))


def version(package: str) -> str | None:
    """Of onnxruntime in a package of node; None where that is not installed."""
    probe = _node(package)
    return None if probe.returncode else probe.stdout.strip()


def loaded(package: str, model: onnx.ModelProto) -> onnx_runtimes.Run:
    """A model for a package of node; every call starts a process."""
    content, names = model.SerializeToString(), [value.name for value in model.graph.input]

    def run(inputs: Sequence[NDArray[np.float32]]) -> list[NDArray[Any]]:
        with scratch() as place:
            folder = Path(place)
            (folder / "model.onnx").write_bytes(content)
            given = [{"name": name, "shape": list(x.shape)} for name, x in zip(names, inputs, strict=True)]
            (folder / "inputs.json").write_text(json.dumps(given), encoding="utf-8")
            for i, x in enumerate(inputs):
                (folder / f"input{i}.bin").write_bytes(x.tobytes())
            done = _node(package, str(folder))
            if done.returncode:
                raise UnsupportedModelError(f"{package} cannot run the model: {_last_line(done.stderr)}")
            written = json.loads((folder / "outputs.json").read_text(encoding="utf-8"))
            return [
                np.frombuffer((folder / f"output{i}.bin").read_bytes(), entry["type"]).reshape(entry["shape"])
                for i, entry in enumerate(written)
            ]

    return run


def _node(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = ["node", str(SCRIPT), *arguments]
    return subprocess.run(line, capture_output=True, encoding="utf-8", errors="replace", check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1][:300]
