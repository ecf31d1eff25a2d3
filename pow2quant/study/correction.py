"""A finished run's logits: corrected, and analysed. What reads runs and networks, for `logits`, which does not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pow2quant import config as configuration
from pow2quant import run_folder, runs
from pow2quant.adapters import onnx_qdq
from pow2quant.backends.base import SILENT, Progress
from pow2quant.config import RunConfig
from pow2quant.errors import DataError, FileFormatError, OutputError
from pow2quant.logits import cat
from pow2quant.logits.analysis import Analysis, Subject
from pow2quant.logits.cat import Correction, Logits
from pow2quant.logits.choose import Candidate, Judged, best, candidates, judged
from pow2quant.logits.fold import alone, folded
from pow2quant.logits.paired import paired
from pow2quant.saving import added, staged, write
from pow2quant.validation import ort

CORRECTION, RECORD, FOLDED = "correction.safetensors", "correction.json", "model_corrected.onnx"
ALPHAS, CLUSTERS = (0.2, 0.4, 0.6, 0.8, 1.0), (1, 4, 16)
MEMBERS = 4
"""So many images have the clusters that are tried by default, on average."""

MARGIN = 2.0
"""A gain of less than so many standard errors is called none."""

Triple = tuple[NDArray[np.int64], Logits, Logits]
"""Labels, float logits, quantized logits."""


@dataclass(frozen=True)
class Corrected:
    """What came of correcting a run: the candidates, the one taken (None: none helps), and its record."""

    found: list[Judged]
    correction: Correction | None
    record: dict[str, Any]
    written: list[Path]


def correct(
    run: Path,
    alphas: Sequence[float] = (),
    clusters: Sequence[int] = (),
    dims: Sequence[int] = (),
    *,
    fold: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
    limits: tuple[int | None, int | None] = (None, None),
    config: RunConfig | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Corrected:
    """Fits corrections to the logits of a run's calibration images, takes the best, and says what it does to the tests.

    output: where files go, the run's folder by default. limits: batches to fit and to evaluate; None: the run's own.
    The best is chosen by calibration images that none was fitted to; then it is fitted to all of them. Nothing is
    written where none is better than no correction.
    """
    folder = output or run
    present = [f for f in (CORRECTION, RECORD, FOLDED) if (folder / f).exists()]
    if present and not overwrite:
        raise OutputError(f"{folder / present[0]}: exists already; --overwrite replaces it")
    fitting, tests = _both(run, config, limits, progress)
    _, exact, quantized = _joined(fitting)
    every = candidates(alphas or ALPHAS, clusters or _clusters(exact), _dims(dims, exact.shape[1]))
    found = judged(quantized, exact, every, seed)
    taken = best(found).candidate
    record: dict[str, Any] = {"fitted_images": len(exact), "candidates": [_plain(j) for j in found]}
    if not taken.alpha:
        return Corrected(found, None, record | {"chosen": None}, [])
    correction = cat.fit(quantized, exact, *taken, seed=seed)
    record |= {"chosen": taken._asdict(), "test": evaluated(correction, tests)}
    with added(folder, present) as staging:
        cat.save(correction, staging / CORRECTION)
        if fold:
            record["onnxruntime"] = _folded(run, correction, staging / FOLDED, quantized)
        write(staging / RECORD, json.dumps(record, indent=1).encode())
    names = (CORRECTION, *([FOLDED] if fold else []), RECORD)
    return Corrected(found, correction, record, [folder / name for name in names])


def evaluated(correction: Correction, tests: Iterable[Triple]) -> dict[str, Any]:
    """Top-1 of float, quantized and corrected logits in per cent, and the gain with its standard error."""
    right: dict[str, list[NDArray[np.bool_]]] = {"original": [], "quantized": [], "corrected": []}
    for labels, exact, quantized in tests:
        for kind, logits in zip(right, (exact, quantized, correction.apply(quantized)), strict=True):
            right[kind].append(logits.argmax(1) == labels)
    whole = {kind: np.concatenate(parts) for kind, parts in right.items()}
    gain, error = paired(whole["corrected"].astype(float) - whole["quantized"])
    top1 = {f"{kind}_top1": round(100 * float(parts.mean()), 4) for kind, parts in whole.items()}
    return {
        "images": len(whole["original"]),
        **top1,
        "gain": round(100 * gain, 4),
        "gain_standard_error": round(100 * error, 4),
    }


def verdict(test: dict[str, Any]) -> str:
    """Whether a correction helps, in one sentence."""
    gain, error = test["gain"], test["gain_standard_error"]
    figures = f"{gain:+.2f} points, standard error {error:.2f}, {test['images']:,} images"
    if abs(gain) <= MARGIN * error or not gain:
        return f"the correction makes no clear difference: {figures}"
    return f"the correction {'helps' if gain > 0 else 'does harm'}: {figures}"


@dataclass(frozen=True)
class Analysed:
    """Folders of an analysis, each with its summary."""

    folders: list[Path]
    summaries: list[dict[str, Any]]


def analyse(
    run: Path,
    alphas: Sequence[float] = (),
    clusters: Sequence[int] = (),
    dims: Sequence[int] = (),
    *,
    output: Path | None = None,
    overwrite: bool = False,
    limits: tuple[int | None, int | None] = (None, None),
    config: RunConfig | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Analysed:
    """Writes all logits of a run's test images, float, quantized and corrected, with figures: a folder per correction.

    Without lists, the correction is the one that `correct` has left in the run, or else what it would take; where that
    is none, alpha is 0 and corrected logits are the quantized ones. output: where the folders go; default: the run.
    """
    saved = run / CORRECTION
    given = bool(alphas or clusters or dims)
    fitting, tests = _both(run, config, limits, progress)
    if not given and saved.is_file():
        corrections = [cat.load(saved)]
    else:
        _, exact, quantized = _joined(fitting)
        every = candidates(alphas or ALPHAS, clusters or _clusters(exact), _dims(dims, exact.shape[1]))
        if not given:
            every = [best(judged(quantized, exact, every, seed)).candidate]
            every = [c if c.alpha else Candidate(0.0, 1, 1) for c in every]
        corrections = [cat.fit(quantized, exact, *c, seed=seed) for c in dict.fromkeys(every)]
    subject = _subject(run)
    root, folders, summaries = output or run, [], []
    with ExitStack() as stack:
        analyses = []
        for correction in corrections:
            folder = root / f"results_{subject.suffix(correction)}"
            staging = stack.enter_context(staged(folder, "logits_*_metadata.csv", overwrite=overwrite))
            analyses.append(stack.enter_context(closing(Analysis(staging, subject, correction))))
            folders.append(folder)
        for batch in tests:
            for analysis in analyses:
                analysis.add(*batch)
        summaries = [analysis.finish() for analysis in analyses]
    return Analysed(folders, summaries)


def _subject(run: Path) -> Subject:
    config = configuration.load(run / run_folder.CONFIG)
    weight, output = config.quantization.weight, config.quantization.output
    arch = config.model.name.rpartition(":")[2].rpartition("/")[2].removesuffix(".py")
    return Subject(arch, weight.bits if weight else None, output.bits if output else None)


def _both(
    run: Path, config: RunConfig | None, limits: tuple[int | None, int | None], progress: Progress
) -> tuple[Iterator[Triple], Iterator[Triple]]:
    """Labels and logits of the calibration images and of the test images, as they are asked for."""
    job, sim = runs.reopened(run, config, progress)
    ptq = job.config.ptq
    fit, test = limits[0] or ptq.calibration_batches, limits[1] or ptq.max_eval_batches
    size = min(len(job.data.calibration), fit or len(job.data.calibration))
    calibration = progress.track(islice(job.data.calibration, size), "logits of the calibration images", size)
    return runs.responses(job, sim, calibration), runs.responses(job, sim, job.test(test))


def _joined(batches: Iterable[Triple]) -> Triple:
    parts = list(zip(*batches, strict=True))
    if not parts:
        raise DataError("the calibration data are empty")
    labels, exact, quantized = (np.concatenate(p) for p in parts)
    if quantized.ndim != 2:
        raise DataError(
            f"the network's output has shape {quantized.shape[1:]} for an image; logits have one number for each class"
        )
    return labels, exact, quantized


def _clusters(fitted: Logits) -> Sequence[int]:
    """The default: as many as have some images each, of those that are fitted to."""
    return [count for count in CLUSTERS if MEMBERS * count <= len(fitted)] or CLUSTERS[:1]


def _dims(dims: Sequence[int], classes: int) -> Sequence[int]:
    """The default: half of the classes, at most 50."""
    return dims or (max(1, min(50, classes // 2)),)


def _plain(judgement: Judged) -> dict[str, Any]:
    return {**judgement.candidate._asdict(), "agreement": judgement.agreement, "error": judgement.error}


def _folded(run: Path, correction: Correction, path: Path, quantized: Logits) -> dict[str, Any]:
    """Writes the network with the correction behind it; runs both in onnxruntime and compares with numpy.

    Raises FileFormatError where the correction's nodes compute anything else than `Correction.apply`.
    """
    model = onnx_qdq.load(run / run_folder.QDQ)
    whole = folded(model, correction)
    images = next(iter(ort.random_batches(model, ort.BATCH)))
    raw, corrected = (ort.optimized(m).run(images)[0] for m in (model, whole))
    made = ort.optimized(alone(correction)).run([quantized])[0]
    pairs = (made, correction.apply(quantized)), (corrected, correction.apply(raw))
    differing = sum(int((one != other).sum()) for one, other in pairs)
    if differing:
        raise FileFormatError(f"{path}: {differing} corrected logits differ between onnxruntime and numpy")
    onnx_qdq.save(whole, path)
    return {"compared_logits": sum(one.size for one, _ in pairs), "differing": differing}
