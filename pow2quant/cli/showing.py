"""What a finished run shows on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pow2quant.cli.console import Console, show_agreements, show_left_out

if TYPE_CHECKING:
    from pow2quant.runs import Result

POOR_DB = 5.0
"""Logits with less SQNR than this are pointed out."""

MANY_TIES = 0.5
"""So are equal largest logits, in at least so many per cent of the images."""


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
