"""The commands. Each turns flags into a configuration, runs it, and shows what came of it."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pow2quant.cli.console import Console, show_agreements, show_left_out
from pow2quant.cli.options import (
    ActivationBits,
    AsJson,
    Backend,
    Budget,
    CalibrationBatches,
    Classes,
    ConfigFile,
    Crop,
    DataPath,
    DataSet,
    Device,
    EncodingsVersion,
    EvalBatches,
    IdleConfig,
    IdleDevice,
    IdleSeed,
    Input,
    Mean,
    Methods,
    MetricName,
    Model,
    Option,
    Output,
    Overwrite,
    PerTensor,
    Quiet,
    Recipe,
    Resize,
    Seed,
    Std,
    Target,
    Task,
    Verbose,
    WeightBits,
    Weights,
    app,
    configured,
    console_of,
    continued,
    fresh,
    keep,
    pixels,
    quantization,
    within,
)
from pow2quant.plugins import TABLES

if TYPE_CHECKING:
    from pow2quant.runs import Result

POOR_DB = 5.0
"""Logits with less SQNR than this are pointed out."""

MANY_TIES = 0.5
"""So are equal largest logits, in at least so many per cent of the images."""


def _print_version(wanted: bool) -> None:
    if wanted:
        from pow2quant import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


@app.command(
    epilog="Example: pow2quant ptq --model torchvision:resnet18 --weights r18.pth --data imagefolder --data-path imgs/"
)
def ptq(
    backend: Backend = None,
    task: Task = None,
    metric: MetricName = None,
    model: Model = None,
    weights: Weights = None,
    num_classes: Classes = None,
    data: DataSet = None,
    data_path: DataPath = None,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    taken: Input = None,
    batch_size: Annotated[int | None, Option(help="Images per batch.")] = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    per_tensor: PerTensor = False,
    max_calibration_batches: CalibrationBatches = None,
    max_eval_batches: EvalBatches = None,
    method: Methods = None,
    budget: Budget = None,
    target: Target = None,
    encodings_version: EncodingsVersion = None,
    recipe: Recipe = None,
    config: ConfigFile = None,
    output: Output = None,
    overwrite: Overwrite = False,
    seed: Seed = None,
    device: Device = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Post-training quantization: calibrate, snap every scale to 2^k, export, validate in onnxruntime, report.

    Without flags: the embedded network on scikit-learn's digits.
    """
    values = {
        "data.batch_size": batch_size,
        **quantization(backend, model, weights, num_classes, data, data_path, weight_bits, activation_bits, per_tensor),
        **pixels(resize, crop, mean, std, taken),
        "ptq.calibration_batches": max_calibration_batches,
        "ptq.max_eval_batches": max_eval_batches,
        "ptq.methods": within(budget, method),
        "target": target,
        "encodings_version": encodings_version,
        "task": task,
        "metric": metric,
        "seed": seed,
        "device": device,
    }
    chosen = configured(config, values, recipe)
    console = console_of(verbose, quiet, as_json)
    from pow2quant import runs

    folder = output or fresh("ptq")
    with continued(console, folder):
        result = runs.quantize(config=chosen, output=folder, overwrite=overwrite, progress=console)
    show_run(console, result)
    return 0 if result.report["verdict"]["agrees"] else 1


@app.command(epilog="Example: pow2quant qat --weight-bits 4 --epochs 10 --output runs/mine; after a crash add --resume")
def qat(
    backend: Backend = None,
    task: Task = None,
    metric: MetricName = None,
    model: Model = None,
    weights: Weights = None,
    num_classes: Classes = None,
    data: DataSet = None,
    data_path: DataPath = None,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    taken: Input = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    per_tensor: PerTensor = False,
    mode: Annotated[
        str | None, Option(help="weights: activations stay float in training; full: for less than 8 bits.")
    ] = None,
    epochs: Annotated[int | None, Option(help="How often all training images are seen.")] = None,
    learning_rate: Annotated[float | None, Option(help="Of the optimizer, at the start of its schedule.")] = None,
    batch_size: Annotated[int | None, Option(help="Images per training step, of all processes together.")] = None,
    loss: Annotated[
        str | None,
        Option(help="The criterion: a name that torch knows or path/to/file.py:thing; default: the task's own."),
    ] = None,
    distillation: Annotated[
        float | None, Option(help="Share of the loss, 0 to 1, that compares with the float network's logits.")
    ] = None,
    no_final_ptq: Annotated[
        bool, Option("--no-final-ptq", help="Keep the activations' encodings of before training.")
    ] = False,
    resume: Annotated[bool, Option("--resume", help="Continue the interrupted run of this --output.")] = False,
    max_calibration_batches: CalibrationBatches = None,
    max_eval_batches: EvalBatches = None,
    method: Methods = None,
    budget: Budget = None,
    target: Target = None,
    encodings_version: EncodingsVersion = None,
    recipe: Recipe = None,
    config: ConfigFile = None,
    output: Output = None,
    overwrite: Overwrite = False,
    seed: Seed = None,
    device: Device = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Quantization-aware training: PTQ, training with quantized weights, PTQ of the activations; then as `ptq`.

    Checkpoints stand beside the run's folder until it is finished. Several processes: torchrun --nproc-per-node N -m
    pow2quant qat ... Everything else that can be chosen is under `training:` in --config.
    """
    if resume and output is None:
        raise typer.BadParameter("needs the --output of the run that was interrupted", param_hint="'--resume'")
    values = {
        **quantization(backend, model, weights, num_classes, data, data_path, weight_bits, activation_bits, per_tensor),
        "training.mode": mode,
        "training.epochs": epochs,
        "training.learning_rate": learning_rate,
        "training.batch_size": batch_size,
        "training.criterion": loss,
        "training.distillation": distillation,
        "training.final_ptq": False if no_final_ptq else None,
        **pixels(resize, crop, mean, std, taken),
        "ptq.calibration_batches": max_calibration_batches,
        "ptq.max_eval_batches": max_eval_batches,
        "ptq.methods": within(budget, method),
        "target": target,
        "encodings_version": encodings_version,
        "task": task,
        "metric": metric,
        "seed": seed,
        "device": device,
    }
    chosen = configured(config, values, recipe)
    leads = os.environ.get("RANK", "0") == "0"
    console = console_of(verbose, quiet or not leads, as_json)
    from pow2quant.three_steps import qat

    folder = output or fresh("qat")
    try:
        result = qat(chosen, folder, resume=resume, overwrite=overwrite, progress=console)
    except KeyboardInterrupt:
        console.note(f"the same command with --output {folder} --resume continues")
        raise
    if result is None:  # another process of torchrun's leads, and shows it
        return 0
    show_run(console, result)
    return 0 if result.report["verdict"]["agrees"] else 1


@app.command(epilog="Example: pow2quant validate runs/mine     or: pow2quant validate model.onnx")
def validate(
    source: Annotated[Path, typer.Argument(help="A run's folder, or an ONNX file.", metavar="DIR_OR_ONNX")],
    encodings: Annotated[Path | None, Option(help="AIMET encodings of a float ONNX file.")] = None,
    max_eval_batches: Annotated[int | None, Option(min=1, help="Compare on at most so many batches.")] = None,
    executor: Annotated[
        list[str] | None,
        Option(help="Compare with this executor, in place of those of the target; repeatable; see `pow2quant list`."),
    ] = None,
    config: Annotated[Path | None, Option(help="YAML in place of the run's config.yaml, say for other data.")] = None,
    output: Annotated[Path | None, Option(help="Folder in which to write validation.json.")] = None,
    seed: Seed = None,
    device: Device = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Runs every executor on the same inputs and prints the agreement table; exit status 1 when anything differs.

    A run's folder is validated on its own test data, from the files on disk; an ONNX file on random inputs, onnxruntime
    without optimizations against onnxruntime with all of them.
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
    output: Annotated[Path | None, Option(help="Folder to write; default: DIR/export/<format>.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Write into a folder that holds something.")] = False,
    layout: Annotated[
        str | None, Option(help="Of images that C takes: nchw, the network's order (default), or nhwc.")
    ] = None,
    config: IdleConfig = None,
    seed: IdleSeed = None,
    device: IdleDevice = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Writes a finished run in a further format."""
    console = console_of(verbose, quiet, as_json)
    configured(config, {"seed": seed, "device": device})
    from pow2quant import runs
    from pow2quant.integer.layout import LAYOUTS
    from pow2quant.report import summary

    if layout not in (None, *LAYOUTS):
        raise typer.BadParameter(f"{layout}: expected {' or '.join(LAYOUTS)}", param_hint="'--layout'")
    options = {} if layout is None else {"layout": layout}
    written = [str(path) for path in runs.export(source, to, output, overwrite=overwrite, **options)]
    found = None if source.suffix == ".encodings" else runs.resources_of(source)
    console.result({"written": written, "resources": found}, written)
    for label, text in summary.needed(found).items():
        console.say(f"{label}: {text}")
    return 0


@app.command(epilog="Example: pow2quant report runs/mine     or: pow2quant report runs/a runs/b --output runs/both")
def report(
    sources: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="DIR...")],
    output: Annotated[
        Path | None, Option(help="Folder to write; of several DIRs then one page that compares them.")
    ] = None,
    config: IdleConfig = None,
    seed: IdleSeed = None,
    device: IdleDevice = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Rebuilds report.html from a run's files; of several runs and with --output, one page that compares them."""
    console = console_of(verbose, quiet, as_json)
    configured(config, {"seed": seed, "device": device})
    from pow2quant.report.comparison import compare
    from pow2quant.report.html import rebuild

    if output is not None and len(sources) > 1:
        written = [str(compare(sources, output))]
    else:
        written = [str(rebuild(source, output)) for source in sources]
    console.result({"written": written}, written)
    return 0


@app.command(name="targets", epilog="Example: pow2quant targets litert     or: pow2quant targets mine.yaml")
def targets_(
    name: Annotated[str | None, typer.Argument(help="A target's name, or a YAML file.", metavar="[NAME]")] = None,
    output: Annotated[Path | None, Option(help="Folder in which to write targets.json.")] = None,
    config: IdleConfig = None,
    seed: IdleSeed = None,
    device: IdleDevice = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """The runtimes and chips that --target knows; with a name, in words what is special about one."""
    console = console_of(verbose, quiet, as_json)
    configured(config, {"seed": seed, "device": device})
    from pow2quant import targets
    from pow2quant.targets.words import document, sentences

    chosen = targets.presets() if name is None else (name,)
    loaded = [targets.load(each) for each in chosen]
    if name is None:
        console.table(["target", "what it is"], [(target.name, target.summary) for target in loaded])
    found = {target.name: document(target) for target in loaded}
    console.result(found, [] if name is None else sentences(loaded[0]))
    keep(found, output, "targets.json")
    return 0


@app.command(name="list", epilog="Example: pow2quant list")
def list_(
    operators: Annotated[
        bool,
        Option("--operators", help="The operations that a network may hold: which have integers, which are proved."),
    ] = False,
    output: Annotated[Path | None, Option(help="Folder in which to write list.json.")] = None,
    config: IdleConfig = None,
    seed: IdleSeed = None,
    device: IdleDevice = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Backends, methods, models, data sets and exporters that are installed, with a line each."""
    console = console_of(verbose, quiet, as_json)
    configured(config, {"seed": seed, "device": device})
    if operators:
        return _list_operators(console, output)
    from pow2quant import plugins, targets

    found = {kind: {name: _about(kind, name) for name in plugins.names(kind)} for kind in plugins.TABLES}
    found["targets"] = {name: targets.load(name).summary for name in targets.presets()}
    rows = [
        (kind if i == 0 or not console.draws else "", name, text)
        for kind, entries in found.items()
        for i, (name, text) in enumerate(entries.items())
    ]
    console.table(["kind", "name", "what it is"], rows)
    console.result(found, ["", *ALSO])
    keep(found, output, "list.json")
    return 0


def _list_operators(console: Console, output: Path | None) -> int:
    from pow2quant.frontends import catalogue

    rows, aten = catalogue.modules(), catalogue.operations()
    console.table(list(catalogue.COLUMNS), rows)
    found = {"modules": [dict(zip(catalogue.COLUMNS, row, strict=True)) for row in rows], "operations": aten}
    console.result(found, ["", f"of PyTorch's operations (aten) {len(aten)} are understood: {', '.join(aten)}"])
    keep(found, output, "list.json")
    return 0


ALSO = (
    "models are also torchvision:NAME (torchvision:resnet18), timm:NAME and path/to/file.py:factory",
    "datasets are also path/to/file.py:function",
)


EXTRAS = {
    ("backends", "aimet"): ("aimet_torch", "aimet"),
    ("exporters", "tflite"): ("ai_edge_litert", "litert"),
    ("validators", "litert"): ("ai_edge_litert", "litert"),
    ("validators", "openvino"): ("openvino", "openvino"),
    ("validators", "tflite-micro"): ("tflite_micro", "tflite-micro"),
    ("validators", "tract"): ("tract", "tract"),
}
"""What is imported only when it is used: the package, and the extra that installs it."""


def _about(kind: str, name: str) -> str:
    """The first line of the docstring; what to install for what is not."""
    from pow2quant.plugins import resolve

    package, extra = EXTRAS.get((kind, name), ("", ""))
    if package and find_spec(package) is None:
        return f"not installed: pip install 'pow2quant[{extra}]'"
    try:
        thing = resolve(kind, name)
    except Exception as error:  # a plug-in of another package may raise anything
        return f"not usable: {error}"
    return (thing.__doc__ or "").strip().partition("\n")[0] + (_parameters(thing) if kind == "methods" else "")


def _parameters(method: Any) -> str:
    """The keys of a method and their defaults, as a sentence."""
    from pow2quant.config import defaults

    keys = ", ".join(f"{key}: {json.dumps(value)}" for key, value in defaults(method).items())
    return f" Parameters: {keys}." if keys else ""


def show_run(console: Console, result: Result) -> None:
    """Accuracies, agreements, verdict and sizes of a finished run; with --json its report."""
    from pow2quant.report import summary

    r = result.report
    console.table(*summary.scores(r))
    console.say()
    show_agreements(console, result.agreements)
    show_left_out(console, r["validation_left_out"])
    sizes = r["model_size_bytes"]
    judged = r["verdict"]
    facts = {
        "verdict": judged["agreement"],
        "quality": judged["change"],
        "evaluated": summary.evaluated(r["evaluation"]),
        "certificate": r["certificate"]["sentence"],
        "logits": _quality(r["final_sqnr_db"]) + _ties(r["tied_logits"]),
        "size": f"{sizes['quantized']:,} bytes, {_times(sizes['float'], sizes['quantized'])} ({sizes['float']:,})",
        **summary.needed(r["resources"]),
        "files": str(result.folder),
    }
    console.result({"folder": str(result.folder), **r}, [""])
    console.facts(facts, judged["agrees"])
    for warning in judged["warnings"]:
        console.say(f"warning: {warning}")


def _quality(sqnr: float | None) -> str:
    if sqnr is None:
        return "equal to float"
    warning = "; little is left of the float network" if sqnr < POOR_DB else ""
    return f"{sqnr} dB SQNR against float{warning}"


def _ties(share: float | None) -> str:
    if share is None or share < MANY_TIES:
        return ""
    return f"; the largest is not alone in {share:.1f} % of the images: give the last outputs more bits"


def _times(before: int, after: int) -> str:
    return f"{before / after:.2f} times smaller than float" if after <= before else f"{after / before:.2f} times larger"
