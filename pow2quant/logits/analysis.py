"""Logits of the float, the quantized and the corrected network, image by image: files and figures, in little memory.

Logits stream by in batches and go to CSV at once; what stays is a few numbers for each image, and for each network a
matrix of counts (classes, classes).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pow2quant.logits.cat import Correction, Logits
from pow2quant.logits.confidence import calibration_error
from pow2quant.logits.paired import paired

KINDS = ("fullprecision", "quantized", "corrected")


@dataclass(frozen=True)
class Subject:
    """Whose logits they are: architecture and widths, as folder and files are called by them."""

    arch: str
    weight_bits: int | None
    activation_bits: int | None

    def suffix(self, correction: Correction) -> str:
        """`alpha0.4_clusters16_pca5_resnet20_w4bit_a4bit`; a width that is float is `32`."""
        widths = f"w{self.weight_bits or 32}bit_a{self.activation_bits or 32}bit"
        chosen = f"alpha{correction.alpha:g}_clusters{correction.num_clusters}_pca{correction.pca_dim}"
        return f"{chosen}_{self.arch}_{widths}"


@dataclass
class Network:
    """What stays of one network's logits: of each image the class, the margin and the confidence; and counts.

    margin: largest logit less the second. confidence: softmax's largest. confusion: (classes, classes), label by class.
    """

    confusion: NDArray[np.int64]
    top1: list[NDArray[np.int64]] = field(default_factory=list)
    margin: list[NDArray[np.float32]] = field(default_factory=list)
    confidence: list[NDArray[np.float32]] = field(default_factory=list)
    top5_hits: int = 0
    noise: float = 0.0

    def add(self, logits: Logits, labels: NDArray[np.int64], exact: Logits) -> None:
        """Takes in a batch."""
        rows = np.arange(len(logits))
        best = logits.argmax(1)
        two = np.partition(logits, -2, axis=1)[:, -2:]
        self.top1.append(best)
        self.margin.append(two[:, 1] - two[:, 0])
        self.confidence.append((1 / np.exp(logits - two[:, 1:]).sum(1)).astype(np.float32))
        self.top5_hits += int(((logits > logits[rows, labels][:, None]).sum(1) < 5).sum())
        self.noise += float(np.square(logits.astype(np.float64) - exact).sum())
        np.add.at(self.confusion, (labels, best), 1)


@dataclass
class Analysis:
    """One correction's files, while batches stream by; `finish` writes what follows from all of them."""

    folder: Path
    subject: Subject
    correction: Correction
    labels: list[NDArray[np.int64]] = field(default_factory=list)
    clusters: list[NDArray[np.int64]] = field(default_factory=list)
    networks: dict[str, Network] = field(default_factory=dict)
    signal: float = 0.0
    images: int = 0

    def __post_init__(self) -> None:
        classes = self.correction.mean.size
        self.networks = {kind: Network(np.zeros((classes, classes), np.int64)) for kind in KINDS}
        self._suffix = self.subject.suffix(self.correction)
        self._files: dict[str, IO[str]] = {}
        for kind in KINDS:
            self._files[kind] = self._path(kind).open("w", encoding="ascii")
            self._files[kind].write(",".join(["image", "label", *(f"class_{i}" for i in range(classes))]) + "\n")

    def add(self, labels: NDArray[np.int64], exact: Logits, quantized: Logits) -> None:
        """Takes in a batch: labels (N,), logits (N, classes)."""
        of = self.correction.clusters(quantized)
        every = dict(zip(KINDS, (exact, quantized, self.correction.apply(quantized)), strict=True))
        for kind, logits in every.items():
            _write(self._files[kind], self.images, labels, logits)
            self.networks[kind].add(logits, labels, exact)
        self.signal += float(np.square(exact, dtype=np.float64).sum())
        self.labels.append(labels)
        self.clusters.append(of)
        self.images += len(labels)

    def finish(self) -> dict[str, Any]:
        """Writes metadata, summary and figures, and returns the summary."""
        from pow2quant.logits.figures import figures

        self.close()
        labels, of = np.concatenate(self.labels), np.concatenate(self.clusters)
        columns = {"image": np.arange(self.images), "label": labels, "cluster": of}
        whole = {kind: whole_of(network) for kind, network in self.networks.items()}
        for kind, network in whole.items():
            columns |= {f"{kind}_{name}": network[name] for name in ("top1", "margin", "confidence")}
        constant = self._constants()
        with self._path("metadata").open("w", encoding="utf-8") as file:
            file.write(",".join([*columns, *constant]) + "\n")
            ending = "," + ",".join(str(value) for value in constant.values()) + "\n"
            pattern = ",".join("%d" if np.issubdtype(c.dtype, np.integer) else "%.9g" for c in columns.values())
            file.writelines(pattern % row + ending for row in zip(*(c.tolist() for c in columns.values()), strict=True))
        summary = constant | {"images": self.images, "networks": self._summaries(labels, whole)}
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        confusions = {kind: network.confusion for kind, network in self.networks.items()}
        for name, picture in figures(labels, whole, confusions, self._suffix):
            (self.folder / name).write_bytes(picture)
        return summary

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def _path(self, kind: str) -> Path:
        return self.folder / f"logits_{self._suffix}_{kind}.csv"

    def _constants(self) -> dict[str, Any]:
        c, s = self.correction, self.subject
        return {
            "alpha": c.alpha,
            "num_clusters": c.num_clusters,
            "pca_dim": c.pca_dim,
            "arch": s.arch,
            "weight_bits": s.weight_bits or 32,
            "activation_bits": s.activation_bits or 32,
        }

    def _summaries(self, labels: NDArray[np.int64], whole: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for kind, network in self.networks.items():
            right = whole[kind]["top1"] == labels
            agreement = whole[kind]["top1"] == whole["fullprecision"]["top1"]
            found[kind] = {
                "top1": round(100 * float(right.mean()), 4),
                "top5": round(100 * network.top5_hits / self.images, 4),
                "agreement": round(100 * float(agreement.mean()), 4),
                "sqnr_db": round(10 * float(np.log10(self.signal / network.noise)), 3) if network.noise else None,
                "mean_margin": round(float(whole[kind]["margin"].mean()), 5),
                "calibration_error": round(100 * calibration_error(whole[kind]["confidence"], right), 4),
            }
        gained = (whole["corrected"]["top1"] == labels) * 1.0 - (whole["quantized"]["top1"] == labels)
        gain, error = paired(gained)
        found["corrected"] |= {"gain": round(100 * gain, 4), "gain_standard_error": round(100 * error, 4)}
        return found


def _write(file: IO[str], first: int, labels: NDArray[np.int64], logits: Logits) -> None:
    """Rows with nine digits, which is what float32 needs to come back to the last bit."""
    pattern = "%d,%d" + ",%.9g" * logits.shape[1] + "\n"
    rows = zip(range(first, first + len(labels)), labels.tolist(), logits.tolist(), strict=True)
    file.writelines(pattern % (image, label, *row) for image, label, row in rows)


def whole_of(network: Network) -> dict[str, NDArray[Any]]:
    """The numbers of all images, (N,) each."""
    return {name: np.concatenate(getattr(network, name)) for name in ("top1", "margin", "confidence")}
