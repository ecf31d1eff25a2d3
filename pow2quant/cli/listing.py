"""Commands that say what there is: targets and plug-ins."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from pow2quant.cli.console import Console
from pow2quant.cli.options import (
    AsJson,
    IdleConfig,
    IdleDevice,
    IdleSeed,
    Option,
    Quiet,
    Verbose,
    app,
    console_of,
    idle,
    keep,
)


@app.command(name="targets", epilog="Example: pow2quant targets litert     or: pow2quant targets mine.yaml")
def targets_(
    name: Annotated[str | None, typer.Argument(help="A target's name, or a YAML file.", metavar="[NAME]")] = None,
    output: Annotated[Path | None, Option(help="Folder for targets.json.")] = None,
    config: IdleConfig = None,
    seed: IdleSeed = None,
    device: IdleDevice = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Lists the runtimes and chips that --target takes; with a name, describes what is special about one."""
    console = console_of(verbose, quiet, as_json)
    idle(console, config, seed, device)
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
        Option("--operators", help="List the supported operations: which have an integer form, which are proved."),
    ] = False,
    output: Annotated[Path | None, Option(help="Folder for list.json.")] = None,
    config: IdleConfig = None,
    seed: IdleSeed = None,
    device: IdleDevice = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Lists the installed backends, methods, models, data sets and exporters."""
    console = console_of(verbose, quiet, as_json)
    idle(console, config, seed, device)
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
    ("exporters", "coreml"): ("coremltools", "coreml"),
    ("exporters", "executorch"): ("executorch", "executorch"),
    ("exporters", "hls4ml"): ("hls4ml", "hls4ml"),
    ("exporters", "tflite"): ("ai_edge_litert", "litert"),
    ("validators", "esp-ppq"): ("esp_ppq", "esp-ppq"),
    ("validators", "executorch"): ("executorch", "executorch"),
    ("validators", "hls4ml"): ("hls4ml", "hls4ml"),
    ("validators", "litert"): ("ai_edge_litert", "litert"),
    ("validators", "openvino"): ("openvino", "openvino"),
    ("validators", "qonnx"): ("qonnx", "qonnx"),
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
