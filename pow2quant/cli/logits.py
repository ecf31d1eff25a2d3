"""Commands that look at what quantization does to the logits: correct and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pow2quant.cli.options import AsJson, Device, EvalBatches, Option, Quiet, Seed, Verbose, app, configured, console_of

SHOWN = 10
"""So many of the best corrections are shown."""

Alphas = Annotated[str | None, Option("--alpha", help="Share of the corrected logits, at most 1; or a list: 0.2,0.4.")]
Clusters = Annotated[str | None, Option("--num-clusters", help="Number of k-means clusters; or a list: 4,16.")]
Dims = Annotated[
    str | None, Option("--pca-dim", help="Dimensions after PCA, or a list; default: half the number of classes.")
]
Fitted = Annotated[
    int | None, Option("--max-calibration-batches", help="Fit to at most this many batches; default: as in the run.")
]
Run = Annotated[Path, typer.Argument(help="A finished run's folder.", metavar="RUN")]
OtherConfig = Annotated[
    Path | None, Option(help="YAML file to use instead of the run's config.yaml, for example for other data.")
]


@app.command(epilog="Example: pow2quant correct runs/mine --alpha 0.2,0.4,0.8 --num-clusters 4,16 --pca-dim 5 --fold")
def correct(
    run: Run,
    alpha: Alphas = None,
    num_clusters: Clusters = None,
    pca_dim: Dims = None,
    fold: Annotated[
        bool, Option("--fold", help="Write model_corrected.onnx: the network followed by the correction.")
    ] = False,
    max_calibration_batches: Fitted = None,
    max_eval_batches: EvalBatches = None,
    config: OtherConfig = None,
    output: Annotated[Path | None, Option(help="Folder for the results; default: RUN itself.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier correction.")] = False,
    seed: Seed = None,
    device: Device = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Cluster affine correction (CAT) of a run's logits: fitted to calibration images, tested on the test images.

    Of several corrections it takes the one that agrees most often with the float network on calibration images that
    it was not fitted to. If none is better than no correction, it says so and writes nothing.
    """
    console = console_of(verbose, quiet, as_json)
    from pow2quant.study import correction

    found = correction.correct(
        run,
        *_lists(alpha, num_clusters, pca_dim),
        fold=fold,
        output=output,
        overwrite=overwrite,
        limits=(max_calibration_batches, max_eval_batches),
        config=_other(run, config, device),
        seed=seed or 0,
        progress=console,
    )
    ranked = sorted(found.found, key=lambda j: (-j.agreement, j.error))[:SHOWN]
    console.table(
        ["alpha", "clusters", "PCA", "agrees with float", "mean square error"],
        [
            [f"{c.alpha:g}", str(c.num_clusters or "-"), str(c.pca_dim or "-"), f"{agreement:.2f} %", f"{error:.4f}"]
            for c, agreement, error in ranked
        ],
    )
    if found.correction is None:
        console.result(found.record, ["", "no correction comes nearer to the float network: nothing was written"])
        return 0
    test = found.record["test"]
    names = ("original", "quantized", "corrected")
    lines = [
        "",
        *(f"{name}: {percent(test[f'{name}_top1'])}" for name in names),
        f"verdict: {correction.verdict(test)}",
    ]
    if fold:
        compared = found.record["onnxruntime"]["compared_logits"]
        lines.append(f"folded: 0 of {compared:,} corrected logits differ between onnxruntime and numpy")
    lines.append(f"files: {', '.join(map(str, found.written))}")
    console.result({**found.record, "written": list(map(str, found.written))}, lines)
    return 0


@app.command(epilog="Example: pow2quant logits runs/mine --alpha 0.4 --num-clusters 16 --pca-dim 5")
def logits(
    run: Run,
    alpha: Alphas = None,
    num_clusters: Clusters = None,
    pca_dim: Dims = None,
    max_calibration_batches: Fitted = None,
    max_eval_batches: EvalBatches = None,
    config: OtherConfig = None,
    output: Annotated[Path | None, Option(help="Folder in which folders of results are created; default: RUN.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace earlier results of the same name.")] = False,
    seed: Seed = None,
    device: Device = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Writes the float, quantized and corrected logits of all test images, and statistics of their differences.

    It uses the correction that `correct` wrote into the run, or one for each combination of the given parameters.
    """
    console = console_of(verbose, quiet, as_json)
    from pow2quant.study import correction

    found = correction.analyse(
        run,
        *_lists(alpha, num_clusters, pca_dim),
        output=output,
        overwrite=overwrite,
        limits=(max_calibration_batches, max_eval_batches),
        config=_other(run, config, device),
        seed=seed or 0,
        progress=console,
    )
    lines = []
    for folder, summary in zip(found.folders, found.summaries, strict=True):
        own = [
            [
                name,
                percent(n["top1"]),
                percent(n["agreement"]),
                "-" if n["sqnr_db"] is None else f"{n['sqnr_db']:.1f}",
                f"{n['mean_margin']:.2f}",
                percent(n["calibration_error"]),
            ]
            for name, n in summary["networks"].items()
        ]
        console.table(["logits", "top-1", "agrees with float", "SQNR dB", "margin", "calibration error"], own)
        console.say()
        lines.append(f"files: {folder}")
    document = {"folders": list(map(str, found.folders)), "summaries": found.summaries}
    console.result(document, lines)
    return 0


def _lists(alpha: str | None, clusters: str | None, dims: str | None) -> tuple[list[float], list[int], list[int]]:
    def numbers(flag: str, text: str | None, kind: Any) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")] if text else []
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise typer.BadParameter(f"{text}: expected {what}, as in 1,2", param_hint=f"'{flag}'") from None

    return (
        numbers("--alpha", alpha, float),
        numbers("--num-clusters", clusters, int),
        numbers("--pca-dim", dims, int),
    )


def _other(run: Path, config: Path | None, device: str | None) -> Any:
    """The configuration in place of the run's own, where one is given."""
    return None if config is None and device is None else configured(config or run / "config.yaml", {"device": device})


def percent(value: float | None) -> str:
    """`92.62 %`."""
    return "-" if value is None else f"{value:.2f} %"
