"""The application, and what its commands share: flags, and what is done with them."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pow2quant.cli.console import Console
from pow2quant.plugins import TABLES

if TYPE_CHECKING:
    from pow2quant.config import RunConfig

app = typer.Typer(
    name="pow2quant",
    help="Quantizes PyTorch and ONNX networks so that every scale is exactly 2^k, and checks every bit of the result.",
    add_completion=True,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    pretty_exceptions_enable=False,
)

Option = typer.Option
RECIPES = sorted(file.stem for file in (Path(__file__).parents[1] / "recipes").glob("*.yaml"))
Seed = Annotated[int | None, Option(min=0, help="Seed for everything random.")]
Device = Annotated[str | None, Option(help="cpu, cuda or cuda:N.")]
Verbose = Annotated[bool, Option("--verbose", help="Show warnings of libraries, and tracebacks.")]
Quiet = Annotated[bool, Option("--quiet", help="Show no progress and no notes.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON document and nothing else.")]
ConfigFile = Annotated[Path | None, Option(help="YAML file with all settings; flags override it.")]
Output = Annotated[Path | None, Option(help="Folder for the results; default: runs/<command>-<time>.")]
Recipe = Annotated[
    str | None, Option("--recipe", help=f"A configuration that comes with the package: {', '.join(RECIPES)}.")
]
Backend = Annotated[str | None, Option("--backend", help="custom (pure PyTorch) or aimet (Qualcomm's QuantSim).")]
Model = Annotated[
    str | None, Option(help="digits-cnn, torchvision:NAME, timm:NAME, net.onnx, or path/to/file.py:factory.")
]
Weights = Annotated[str | None, Option(help="State dict to load into the network: .pt, .pth or .safetensors.")]
Classes = Annotated[int | None, Option(help="Number of classes, passed to the network's factory.")]
DataSet = Annotated[
    str | None,
    Option(help="digits, cifar10, mnist, imagefolder, path/to/file.py:function, or arrays in a file.npz or .npy."),
]
DataPath = Annotated[str | None, Option(help="Folder of the data set.")]
Resize = Annotated[
    int | None, Option(min=1, help="Resize the shorter side of images to this many pixels; imagefolder: 256.")
]
Crop = Annotated[int | None, Option(min=1, help="Then crop a central square with this side; imagefolder: 224.")]
Mean = Annotated[
    str | None, Option(help="Mean per channel, subtracted from values in [0, 1]: 0.5,0.5,0.5; imagefolder: ImageNet's.")
]
Std = Annotated[str | None, Option(help="Standard deviation per channel, by which they are then divided: 0.5,0.5,0.5.")]
Task = Annotated[
    str | None,
    Option(
        help="What the network is for: classification, multi-label, segmentation, image-to-image, regression, "
        "detection, or none; by default it follows from the data."
    ),
]
MetricName = Annotated[
    str | None,
    Option(
        "--metric",
        help="The leading metric: one of the task's own (top1, miou, mae, psnr, ...), torchmetrics:NAME, or "
        "path/to/file.py:function of (outputs, targets).",
    ),
]
Input = Annotated[
    str | None,
    Option(
        "--input",
        help="float: the network takes normalized images; pixels: it takes bytes, and its first layer normalizes.",
    ),
]
Target = Annotated[
    str | None,
    Option(help="Runtime or chip to quantize for: a name listed by `pow2quant targets`, or a YAML file."),
]
WeightBits = Annotated[int | None, Option(help="Bit width of weights, 2 to 16.")]
ActivationBits = Annotated[
    int | None,
    Option(help="Bit width of activations, 2 to 16; the network's input keeps at least 8 bits, like an image."),
]
PerTensor = Annotated[
    bool, Option("--per-tensor", help="Use one weight scale per tensor instead of one per output channel.")
]
CalibrationBatches = Annotated[int | None, Option(help="Calibrate on at most this many batches.")]
EvalBatches = Annotated[
    int | None, Option(help="Evaluate on at most this many batches: a fixed sample, stratified by label.")
]
Methods = Annotated[
    list[str] | None,
    Option(
        help="NAME or NAME:parameter=value; repeatable, applied in order; none: without default methods. Names: "
        f"{', '.join(TABLES['methods'])}."
    ),
]
Budget = Annotated[float | None, Option(min=0, help="Minutes that `--method auto` may spend on trying methods.")]
Storage = Annotated[
    str | None,
    Option(help="Type of weights of up to 4 bits in ONNX files: int4, or int8: larger, but faster in onnxruntime."),
]
EncodingsVersion = Annotated[str | None, Option(help="Version of AIMET's encodings format: 0.6.1, 1.0.0 or 2.0.0.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing run, with everything in its folder.")]
# Every command takes the flags of every command, so that a script can pass the same ones to all; `idle` says so.
IdleSeed = Annotated[int | None, Option("--seed", min=0, hidden=True)]
IdleDevice = Annotated[str | None, Option("--device", hidden=True)]
IdleConfig = Annotated[Path | None, Option("--config", hidden=True)]


def configured(file: Path | None, values: dict[str, Any], recipe: str | None = None) -> RunConfig:
    """The configuration of a file or a recipe, or the default, with the flags that were given laid over it."""
    from pow2quant import config

    if recipe is not None:
        if file is not None:
            raise typer.BadParameter("a recipe takes the place of --config; give one of them", param_hint="'--recipe'")
        if recipe not in RECIPES:
            raise typer.BadParameter(f"{recipe} is unknown; known: {', '.join(RECIPES)}", param_hint="'--recipe'")
        file = Path(__file__).parents[1] / "recipes" / f"{recipe}.yaml"
    base = config.load(file) if file is not None else config.RunConfig()
    return config.with_values(base, {key: value for key, value in values.items() if value is not None})


def console_of(verbose: bool, quiet: bool, as_json: bool) -> Console:
    """The console of this command; what others print goes to stderr, and their warnings nowhere unless wanted."""
    console = Console(quiet=quiet, as_json=as_json)
    sys.stdout = sys.stderr
    if not verbose:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
    return console


def idle(console: Console, config: Path | None, seed: int | None, device: str | None) -> None:
    """Checks flags that a command takes and has no use for, and says which of them were given."""
    configured(config, {"seed": seed, "device": device})
    flags = {"--config": config, "--seed": seed, "--device": device}
    if given := [flag for flag, value in flags.items() if value is not None]:
        console.note(f"without effect here: {', '.join(given)}")


def fresh(command: str) -> Path:
    """A folder that does not exist yet."""
    stem = f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stem if i == 1 else f"{stem}-{i}" for i in count(1))
    return next(path for name in names if not (path := Path("runs") / name).exists())


@contextmanager
def continued(folder: Path, kept: Path, flags: str = "") -> Iterator[None]:
    """Says, when it is interrupted, that what `kept` holds will be used. flags: that the next call needs too."""
    try:
        yield
    except KeyboardInterrupt:
        if kept.exists():
            raise KeyboardInterrupt(f"the same command with --output {folder}{flags} continues") from None
        raise


def keep(document: Mapping[str, Any], output: Path | None, name: str) -> None:
    """Writes the result as a file too, where a folder was given."""
    if output is not None:
        from pow2quant.saving import write

        write(output / name, json.dumps(document, indent=2).encode())
