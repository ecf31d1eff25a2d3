"""Figures of an analysis: confusion, margin, agreement, calibration."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pow2quant.logits.confidence import BINS, bins, calibration_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"fullprecision": "#555555", "quantized": "#d55e00", "corrected": "#0072b2"}
NAMES = {"fullprecision": "float", "quantized": "quantized", "corrected": "corrected"}
NUMBERED = 20
"""With more classes, the confusion matrix has no labels for each."""

Whole = Mapping[str, Mapping[str, NDArray[Any]]]


def figures(
    labels: NDArray[np.int64], whole: Whole, confusions: Mapping[str, NDArray[np.int64]], title: str
) -> Iterator[tuple[str, bytes]]:
    """(file name, PNG). whole: by network `top1`, `margin`, `confidence` (N,); confusions: (classes, classes)."""
    for name, figure in (
        ("confusion.png", confusion(confusions)),
        ("margin.png", margin(labels, whole)),
        ("agreement.png", agreement(whole)),
        ("calibration.png", calibration(labels, whole)),
    ):
        figure.suptitle(title.replace("_", " "), fontsize=9, color="#555555")
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
        yield name, content.getvalue()


def confusion(confusions: Mapping[str, NDArray[np.int64]]) -> Figure:
    """Of each label's images, the share that each class gets; where labels and classes part, since most do not."""
    figure, panels = _blank(3, 11.5, 4.4)
    shares = {kind: 100 * c / np.maximum(c.sum(1, keepdims=True), 1) for kind, c in confusions.items()}
    classes = len(next(iter(shares.values())))
    off = ~np.eye(classes, dtype=bool)
    top = max(1e-9, max(float(share[off].max()) for share in shares.values()) if classes > 1 else 1.0)
    for axes, (kind, share) in zip(panels, shares.items(), strict=True):
        image = axes.imshow(np.where(off, share, np.nan), cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
        right = float(np.trace(confusions[kind])) / max(1, int(confusions[kind].sum()))
        axes.set_title(f"{NAMES[kind]}: {100 * right:.2f} % right", fontsize=10)
        axes.set_xlabel("class of the largest logit")
        axes.grid(False)
        if classes <= NUMBERED:
            axes.set_xticks(range(classes))
            axes.set_yticks(range(classes))
    panels[0].set_ylabel("label")
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8)
    bar.set_label("% of the label's images (diagonal left out)")
    return figure


def margin(labels: NDArray[np.int64], whole: Whole) -> Figure:
    """Largest logit less the second, of images that are right and of those that are wrong."""
    figure, panels = _blank(2, 9.5, 4.2)
    every = np.concatenate([w["margin"] for w in whole.values()])
    edges = np.linspace(0, max(float(np.quantile(every, 0.995)), 1e-6), 50)
    for axes, (title, wanted) in zip(panels, (("right", True), ("wrong", False)), strict=True):
        for kind, w in whole.items():
            own = w["margin"][(w["top1"] == labels) == wanted]
            counts, _ = np.histogram(own, edges)
            axes.stairs(counts, edges, color=COLOURS[kind], label=f"{NAMES[kind]} ({len(own):,})", linewidth=1.5)
        axes.set_title(f"images that are {title}", fontsize=10)
        axes.set_xlabel("margin: largest logit less the second")
        axes.set_xlim(0, edges[-1])
        axes.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel("images")
    return figure


def agreement(whole: Whole) -> Figure:
    """How often the largest logit is the float network's, by the float network's margin."""
    figure, (axes, *_) = _blank(1, 6.4, 4.4)
    reference = whole["fullprecision"]
    order = np.argsort(reference["margin"], kind="stable")
    parts = [part for part in np.array_split(order, min(10, len(order))) if len(part)]
    for i, kind in enumerate(("quantized", "corrected")):
        same = whole[kind]["top1"] == reference["top1"]
        shares = [100 * float(same[part].mean()) for part in parts]
        axes.bar(
            np.arange(len(parts)) + 0.4 * i - 0.2,
            shares,
            0.4,
            color=COLOURS[kind],
            label=f"{NAMES[kind]}: {100 * float(same.mean()):.2f} % of all",
        )
    ends = [float(reference["margin"][part].max()) for part in parts]
    axes.set_xticks(range(len(parts)), [f"{end:.1f}" for end in ends])
    axes.set_xlabel("float network's margin, tenths of the images, each up to")
    axes.set_ylabel("same class as float, %")
    axes.set_ylim(0, 119)
    axes.set_yticks(range(0, 101, 20))
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    return figure


def calibration(labels: NDArray[np.int64], whole: Whole) -> Figure:
    """Accuracy over confidence, and how many images have which confidence."""
    figure, panels = _blank(2, 9.5, 4.4)
    panels[0].plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1)
    edges = np.linspace(0, 1, BINS + 1)
    for kind, w in whole.items():
        right, of = w["top1"] == labels, bins(w["confidence"])
        filled = [b for b in range(BINS) if (of == b).any()]
        error = 100 * calibration_error(w["confidence"], right)
        panels[0].plot(
            [float(w["confidence"][of == b].mean()) for b in filled],
            [float(right[of == b].mean()) for b in filled],
            color=COLOURS[kind],
            marker="o",
            markersize=4,
            linewidth=1.5,
            label=f"{NAMES[kind]}: expected error {error:.2f} %",
        )
        panels[1].stairs(np.bincount(of, minlength=BINS), edges, color=COLOURS[kind], linewidth=1.5, label=NAMES[kind])
    panels[0].set_xlabel("confidence: softmax's largest value")
    panels[0].set_ylabel("share of images that are right")
    panels[1].set_xlabel("confidence")
    panels[1].set_ylabel("images")
    panels[1].set_xlim(0, 1)
    panels[0].set_ylim(0, 1.3)
    panels[0].set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for axes in panels:
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def _blank(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    panels = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels
