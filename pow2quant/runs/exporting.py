"""A finished run in a further format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path

from pow2quant import run_folder
from pow2quant.adapters import aimet_encodings, onnx_qdq
from pow2quant.artifact import Artifact
from pow2quant.errors import ConfigError, FileFormatError, OutputError, naming
from pow2quant.integer.certificate import Certificate, certify
from pow2quant.integer.resources import resources
from pow2quant.plugins import resolve
from pow2quant.runs.simulating import Simulated


def export(
    source: str | Path | Artifact | Simulated,
    form: str,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    **options: str | int,
) -> list[Path]:
    """Writes a finished run in a further format, into `output` or `<run>/export/<form>`. Returns what was written.

    options: what the format takes besides, such as `layout="nhwc"` for `c`, `opset=17` for `qdq`.
    Raises OutputError when that folder holds something and `overwrite` is not set, ConfigError for a format that does
    not take an option.

    source: a run's folder; a QDQ file; or an encodings file, which becomes `<output>/<its name>` in another version. Of
    a file, `output` defaults to `<its folder>/<form>`. Or what a simulation's `export` returned, which needs `output`.
    """
    exporter: Callable[[Artifact, Path], Path] = resolve("exporters", form)
    for key in options:
        if key not in signature(exporter).parameters:
            raise ConfigError(f"{key}: the format {form} has no such option")
    exporter = partial(exporter, **options) if options else exporter
    output = None if output is None else run_folder.path_of(output)
    if isinstance(source, (Artifact, Simulated)):
        source = source.export() if isinstance(source, Simulated) else source
        if output is None:
            raise ConfigError("output: needed, as what was made in Python has no folder of its own")
        return [exporter(source, _free(output, overwrite))]
    source = run_folder.path_of(source, "source")
    if source.is_file() and source.suffix == ".onnx":
        return [exporter(artifact_of(source), _free(output or source.parent / form, overwrite))]
    if source.is_file():
        if not form.startswith("aimet-"):
            raise ConfigError(f"{source}: an encodings file alone can only become aimet-VERSION, not {form!r}")
        folder = _free(output or source.parent / form, overwrite)
        return [aimet_encodings.convert(source, form.removeprefix("aimet-"), folder / source.name)]
    return [exporter(artifact_of(source), _free(output or source / "export" / form, overwrite))]


def certificate(source: str | Path | Artifact | Simulated) -> Certificate:
    """What is proved of a quantized network, layer by layer: `sentence`, `lines`, `proved`, `accumulator_bits`.

    source: a run's folder, a QDQ file, or what `simulate` and its `export` return.
    Raises FileFormatError for a file that is no quantized network.
    """
    if isinstance(source, Simulated):
        return certify(source.export())
    return certify(source if isinstance(source, Artifact) else artifact_of(source))


def resources_of(source: str | Path) -> dict[str, int | None] | None:
    """`resources` of report.json for a run's folder or a QDQ file; None where the network has no integers."""
    artifact = artifact_of(source)
    found = resources(artifact, certify(artifact))
    return None if found is None else found.to_json()


def artifact_of(source: str | Path) -> Artifact:
    """The quantized network in a run's folder or a QDQ file."""
    path = run_folder.path_of(source, "source")
    file = path / run_folder.QDQ if path.is_dir() else path
    if not file.is_file():
        raise FileFormatError(f"{path}: holds no {run_folder.QDQ}; give the folder of a finished run")
    with naming(file):
        return onnx_qdq.from_qdq(onnx_qdq.load(file))


def _free(folder: Path, overwrite: bool) -> Path:
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(
            f"{folder}: holds something already; choose another output, or add --overwrite, in Python overwrite=True"
        )
    return folder
