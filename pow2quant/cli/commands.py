"""The commands that quantize, ptq and qat: flags become a configuration, which is run, and its result is shown."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pow2quant.cli.given import Given, taking
from pow2quant.cli.options import Option, app, continued
from pow2quant.cli.showing import show_run

QUANTIZING = (
    *("model", "weights", "weight_bits", "activation_bits", "method", "budget", "target", "storage"),
    *("encodings_version", "output", "overwrite"),
)
"""Flags of both, beside those that every command has."""


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
@taking(*QUANTIZING)
def ptq(
    given: Given,
    batch_size: Annotated[int | None, Option(help="Images per batch.")] = None,
) -> int:
    """Post-training quantization: calibrate, snap every scale to 2^k, export, validate in onnxruntime, report.

    Without flags, it quantizes the built-in network for scikit-learn's digits.
    """
    chosen = given.configured({"data.batch_size": batch_size})
    console = given.console()
    from pow2quant import runs
    from pow2quant.runs.unfinished import folder_of

    folder, overwrite = given.folder("ptq"), given.flags["overwrite"]
    with continued(folder, folder_of(folder)):
        result = runs.quantize(config=chosen, output=folder, overwrite=overwrite, progress=console)
    show_run(console, result)
    return 0 if result.report["verdict"]["agrees"] else 1


@app.command(epilog="Example: pow2quant qat --weight-bits 4 --epochs 10 --output runs/mine; after a crash add --resume")
@taking(*QUANTIZING)
def qat(
    given: Given,
    mode: Annotated[
        str | None,
        Option(help="weights: activations stay float in training; full: all is quantized, for fewer than 8 bits."),
    ] = None,
    epochs: Annotated[int | None, Option(help="Passes over all training images.")] = None,
    learning_rate: Annotated[float | None, Option(help="Learning rate at the start of the schedule.")] = None,
    batch_size: Annotated[int | None, Option(help="Images per training step, over all processes.")] = None,
    loss: Annotated[
        str | None,
        Option(help="Loss: a name in torch.nn or path/to/file.py:name; default: the task's own."),
    ] = None,
    distillation: Annotated[
        float | None, Option(help="Share of the loss, 0 to 1, for the distance to the float network's logits.")
    ] = None,
    no_final_ptq: Annotated[
        bool, Option("--no-final-ptq", help="Keep the encodings that activations had before training.")
    ] = False,
    resume: Annotated[bool, Option("--resume", help="Continue the interrupted run with the same --output.")] = False,
) -> int:
    """Quantization-aware training: PTQ, training with quantized weights, PTQ of the activations; then like `ptq`.

    Checkpoints are kept beside the run's folder until it is finished. Several processes: torchrun --nproc-per-node N -m
    pow2quant qat ... All other settings are under `training:` in --config.
    """
    if resume and given.flags["output"] is None:
        raise typer.BadParameter("needs the --output of the run that was interrupted", param_hint="'--resume'")
    own = {
        "training.mode": mode,
        "training.epochs": epochs,
        "training.learning_rate": learning_rate,
        "training.batch_size": batch_size,
        "training.criterion": loss,
        "training.distillation": distillation,
        "training.final_ptq": False if no_final_ptq else None,
    }
    chosen = given.configured(own)
    leads = os.environ.get("RANK", "0") == "0"
    console = given.console(quiet=not leads)
    from pow2quant.three_steps import checkpoints_of, qat

    folder, overwrite = given.folder("qat"), given.flags["overwrite"]
    with continued(folder, checkpoints_of(folder), "" if resume else " --resume"):
        result = qat(chosen, folder, resume=resume, overwrite=overwrite, progress=console)
    if result is None:  # another process of torchrun's leads, and shows it
        return 0
    show_run(console, result)
    return 0 if result.report["verdict"]["agrees"] else 1
