"""Commands that read the files of a finished run: validate, export, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pow2quant.cli.console import show_agreements, show_left_out
from pow2quant.cli.options import (
    AsJson,
    Device,
    IdleConfig,
    IdleDevice,
    IdleSeed,
    Option,
    Quiet,
    Seed,
    Storage,
    Verbose,
    app,
    configured,
    console_of,
    idle,
    keep,
)
from pow2quant.plugins import TABLES


@app.command(epilog="Example: pow2quant validate runs/mine     or: pow2quant validate model.onnx")
def validate(
    source: Annotated[Path, typer.Argument(help="A run's folder, or an ONNX file.", metavar="DIR_OR_ONNX")],
    encodings: Annotated[Path | None, Option(help="AIMET encodings that belong to a float ONNX file.")] = None,
    max_eval_batches: Annotated[int | None, Option(min=1, help="Compare on at most this many batches.")] = None,
    executor: Annotated[
        list[str] | None,
        Option(help="Executor to compare, instead of those of the target; repeatable; see `pow2quant list`."),
    ] = None,
    config: Annotated[
        Path | None, Option(help="YAML file to use instead of the run's config.yaml, for example for other data.")
    ] = None,
    output: Annotated[Path | None, Option(help="Folder for validation.json.")] = None,
    seed: Seed = None,
    device: Device = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Runs every executor on the same inputs and prints the agreement table; exit status 1 if anything differs.

    A run's folder is validated from its files, on its own test data. An ONNX file is validated on random inputs:
    onnxruntime without optimizations against onnxruntime with all of them.
    """
    console = console_of(verbose, quiet, as_json)
    from pow2quant import runs
    from pow2quant.report.verdict import verdict

    chosen = None
    if config is not None or device is not None:
        own = source / "config.yaml" if source.is_dir() else None
        chosen = configured(config or own, {"device": device})
    found = runs.validate(
        source,
        encodings=encodings,
        config=chosen,
        max_batches=max_eval_batches,
        seed=seed or 0,
        progress=console,
        chosen=executor or (),
    )
    show_agreements(console, found.agreements)
    judged = verdict(found.agreements)
    lines = [f"{name}: the scale {scale!r} is no power of two" for name, scale in found.free_scales[:20]]
    if len(found.free_scales) > len(lines):
        lines.append(f"… and {len(found.free_scales) - len(lines)} more tensors")
    if found.free_scales:
        lines.insert(0, f"{len(found.free_scales)} tensors have scales that are no powers of two:")
    result = {
        "verdict": judged,
        "validation": [a.to_json() for a in found.agreements],
        "validation_left_out": found.left_out,
        "free_scales": dict(found.free_scales),
        "certificate": found.certificate.to_json(),
    }
    show_left_out(console, found.left_out)
    console.result(result, lines)
    console.facts({"verdict": judged["agreement"], "certificate": found.certificate_sentence}, judged["agrees"])
    keep(result, output, "validation.json")
    return 0 if judged["agrees"] else 1


@app.command(epilog="Example: pow2quant export runs/mine --to aimet-2.0.0")
def export(
    source: Annotated[
        Path, typer.Argument(help="A finished run's folder, a QDQ .onnx file, or an .encodings file.", metavar="SOURCE")
    ],
    to: Annotated[str, Option(help=f"The format: {', '.join(TABLES['exporters'])}.")],
    output: Annotated[Path | None, Option(help="Folder for the result; default: DIR/export/<format>.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    layout: Annotated[
        str | None,
        Option(help="Layout of the images that the C code takes: nchw (the network's, the default) or nhwc."),
    ] = None,
    opset: Annotated[int | None, Option(help="Opset of ONNX files, 13 to 21; default: 21.")] = None,
    batch: Annotated[int | None, Option(help="Fixed batch size; default: free in ONNX files, else 1.")] = None,
    storage: Storage = None,
    config: IdleConfig = None,
    seed: IdleSeed = None,
    device: IdleDevice = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Writes a finished run in another format."""
    console = console_of(verbose, quiet, as_json)
    idle(console, config, seed, device)
    from pow2quant import runs
    from pow2quant.artifact import STORAGES
    from pow2quant.integer.layout import LAYOUTS
    from pow2quant.report import summary

    for flag, value, known in (("layout", layout, LAYOUTS), ("storage", storage, STORAGES)):
        if value not in (None, *known):
            raise typer.BadParameter(f"{value}: expected {' or '.join(known)}", param_hint=f"'--{flag}'")
    given = {"layout": layout, "opset": opset, "batch": batch, "storage": storage}
    options = {key: value for key, value in given.items() if value is not None}
    written = [str(path) for path in runs.export(source, to, output, overwrite=overwrite, **options)]
    found = None if source.suffix == ".encodings" else runs.resources_of(source)
    console.result({"written": written, "resources": found}, written)
    for label, text in summary.needed(found).items():
        console.say(f"{label}: {text}")
    return 0


@app.command(epilog="Example: pow2quant report runs/mine     or: pow2quant report runs/a runs/b --output runs/both")
def report(
    sources: Annotated[list[Path], typer.Argument(help="Folders of finished runs or studies.", metavar="DIR...")],
    output: Annotated[
        Path | None, Option(help="Folder for the page; several DIRs then give one page that compares them.")
    ] = None,
    config: IdleConfig = None,
    seed: IdleSeed = None,
    device: IdleDevice = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Rebuilds the pages of runs or studies from their files; with --output, one page that compares several runs."""
    console = console_of(verbose, quiet, as_json)
    idle(console, config, seed, device)
    from pow2quant.report.pages import compare, rebuild

    if output is not None and len(sources) > 1:
        written = [str(compare(sources, output))]
    else:
        written = [str(page) for source in sources for page in rebuild(source, output)]
    console.result({"written": written}, written)
    return 0
