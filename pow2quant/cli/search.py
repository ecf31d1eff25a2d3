"""`pow2quant search`: which tensor takes how many bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pow2quant.cli.console import Console
from pow2quant.cli.given import Given, taking
from pow2quant.cli.options import Option, app, continued
from pow2quant.cli.showing import show_run

if TYPE_CHECKING:
    from pow2quant.study.search import Found


@app.command(epilog="Example: pow2quant search --objective size --constraint accuracy_drop=1% --candidates 2,4,8")
@taking("model", "weights", "activation_bits", "method", "encodings_version", "output", "overwrite")
def search(
    given: Given,
    objective: Annotated[
        str | None,
        Option(help="What to minimize: size (default), bops (bit operations) or latency; or accuracy, to maximize."),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        Option(
            help="accuracy=0.88, accuracy_drop=0.5%, size=0.5MB, average_bits=5.2, bops=1.2G, latency=1ms; repeatable."
        ),
    ] = None,
    candidates: Annotated[
        str | None, Option(help="Widths for weights, from 2 to 16, float16 or float32; default: 2,3,4,5,6,8.")
    ] = None,
    activation_candidates: Annotated[
        str | None, Option(help="Widths for activations, 2 to 16; by default they keep the width of the configuration.")
    ] = None,
    sensitivity: Annotated[
        str | None,
        Option(help="Sensitivity measure: kl (of the logits, default), loss, sqnr (of the logits), hessian (HAWQ-V2)."),
    ] = None,
    max_sensitivity_batches: Annotated[
        int | None, Option(help="Measure sensitivities on this many calibration batches; default: 4.")
    ] = None,
    points: Annotated[int | None, Option(help="Number of plans along the Pareto front to verify; default: 6.")] = None,
    latency_table: Annotated[
        str | None,
        Option(help="YAML with a chip's latencies; without it, latency is measured in onnxruntime, on one thread."),
    ] = None,
) -> int:
    """Mixed precision: chooses a width for every weight, and on request for every activation; then like `ptq`.

    An integer program makes plans from the sensitivities of single tensors; each plan is verified by quantizing and
    evaluating the network. The chosen plan is in plan.yaml, which `ptq --config` and `qat --config` take.
    """
    own = {
        "search.objective": objective,
        "search.constraints": constraint or None,
        "search.candidates": _listed(candidates),
        "search.activation_candidates": _listed(activation_candidates),
        "search.sensitivity": sensitivity,
        "search.sensitivity_batches": max_sensitivity_batches,
        "search.points": points,
        "search.latency_table": latency_table,
    }
    chosen = given.configured(own)
    console = given.console()
    from pow2quant.runs.unfinished import folder_of
    from pow2quant.study.search import search as run

    folder, overwrite = given.folder("search"), given.flags["overwrite"]
    with continued(folder, folder_of(folder)):
        found = run(chosen, folder, overwrite=overwrite, progress=console)
    _show(console, found)
    show_run(console, found.result)
    return 0 if found.result.agrees else 1


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _show(console: Console, found: Found) -> None:
    from pow2quant.report.summary import WORDS, ends, number
    from pow2quant.study.front import front, shown

    document = found.result.report["search"]
    axis, unit = document["axis"], document["unit"]
    undominated = front(found.points, axis)
    points = sorted(found.points, key=lambda p: p.costs[axis])
    costs = list(found.chosen.costs)
    console.table(
        [
            "plan",
            *(name.replace("_", " ") for name in costs),
            WORDS.get(document["metric"], document["metric"]),
            "95 % interval",
            "on the front",
        ],
        [
            [
                "chosen" if p == found.chosen else p.kind,
                *shown(p).values(),
                number(p.value, unit),
                ends(about["interval"], unit),
                "yes" if p in undominated else "",
            ]
            for p, about in zip(points, document["points"], strict=True)
        ],
    )
    console.say()
    console.table(
        ["layer", "weight", "input", "weights", "multiply-accumulates"],
        [[y["layer"], y["weight"], y["input"], f"{y['weights']:,}", f"{y['macs']:,}"] for y in found.layers],
    )
    console.say()
