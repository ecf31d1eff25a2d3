"""A finished run in a further format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pow2quant import run_folder
from pow2quant.adapters import aimet_encodings, onnx_qdq
from pow2quant.artifact import Artifact
from pow2quant.errors import ConfigError, FileFormatError, OutputError
from pow2quant.plugins import resolve


def export(
    source: str | Path | Artifact, form: str, output: str | Path | None = None, *, overwrite: bool = False
) -> list[Path]:
    """Writes a finished run in a further format, into `output` or `<run>/export/<form>`. Returns what was written.

    Raises OutputError when that folder holds something and `overwrite` is not set.

    source: a run's folder; a QDQ file; or an encodings file, which becomes `<output>/<its name>` in another version. Of
    a file, `output` defaults to `<its folder>/<form>`. Or what a simulation's `export` returned, which needs `output`.
    """
    exporter: Callable[[Artifact, Path], Path] = resolve("exporters", form)
    output = None if output is None else Path(output)
    if isinstance(source, Artifact):
        if output is None:
            raise ConfigError("output: needed, as an artifact has no folder of its own")
        return [exporter(source, _free(output, overwrite))]
    source = Path(source)
    if source.is_file() and source.suffix == ".onnx":
        artifact = onnx_qdq.from_qdq(onnx_qdq.load(source))
        return [exporter(artifact, _free(output or source.parent / form, overwrite))]
    if source.is_file():
        if not form.startswith("aimet-"):
            raise ConfigError(f"{source}: an encodings file alone can only become aimet-VERSION, not {form!r}")
        folder = _free(output or source.parent / form, overwrite)
        return [aimet_encodings.convert(source, form.removeprefix("aimet-"), folder / source.name)]
    if not (source / run_folder.QDQ).is_file():
        raise FileFormatError(f"{source}: holds no {run_folder.QDQ}; give the folder of a finished run")
    artifact = onnx_qdq.from_qdq(onnx_qdq.load(source / run_folder.QDQ))
    return [exporter(artifact, _free(output or source / "export" / form, overwrite))]


def _free(folder: Path, overwrite: bool) -> Path:
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder}: holds something already; choose another --output, or add --overwrite")
    return folder
