"""`pow2quant explain`: for people who want to see how a layer's numbers came about."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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


@app.command(epilog="Example: pow2quant explain runs/mine conv1")
def explain(
    source: Annotated[Path, typer.Argument(help="A finished run's folder.", metavar="DIR")],
    layer: Annotated[str, typer.Argument(help="A layer, as report.html names it, or a tensor.", metavar="LAYER")],
    output: Annotated[Path | None, Option(help="Folder for explain.json.")] = None,
    config: IdleConfig = None,
    seed: IdleSeed = None,
    device: IdleDevice = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Explains a layer's exponents: histograms, candidates and their errors, accumulator, the shift of a value."""
    console = console_of(verbose, quiet, as_json)
    idle(console, config, seed, device)
    from pow2quant.report import explain as explaining

    found = explaining.explain(source, layer)
    console.result(found.to_json(), explaining.lines(found))
    keep(found.to_json(), output, "explain.json")
    return 0
