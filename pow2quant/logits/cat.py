"""CAT, cluster-based affine transformation: logits of the quantized network are moved towards the float network's.

Zoljodi, Timofte & Daneshtalab 2025, "CAT: Post-Training Quantization Error Reduction via Cluster-based Affine
Transformation". Quantized logits are projected by PCA and clustered by k-means; in each cluster, every class has a gain
and an offset; what comes out is blended with what went in by alpha. The part of their work that refines the scales of
the network itself is not here: scales are powers of two.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pow2quant.errors import DataError, FileFormatError
from pow2quant.foreign import check_is_file, parsed
from pow2quant.saving import write

Logits = NDArray[np.float32]
"""(N, classes)."""

FORMAT = "pow2quant.correction"
RESTARTS = 4
"""k-means is started so often; the tightest clusters are kept."""


@dataclass(frozen=True)
class Correction:
    """A fitted correction of (N, classes) logits.

    mean, components: of the PCA, (classes,) and (d, classes). centres: (n, d), of the clusters in its space. gain,
    offset: (n, classes). alpha: the share of the corrected logits, 0 to 1. All float32.
    """

    mean: NDArray[np.float32]
    components: NDArray[np.float32]
    centres: NDArray[np.float32]
    gain: NDArray[np.float32]
    offset: NDArray[np.float32]
    alpha: float

    @property
    def num_clusters(self) -> int:
        """How many clusters there are."""
        return len(self.centres)

    @property
    def pca_dim(self) -> int:
        """How many dimensions they lie in."""
        return len(self.components)

    @property
    def nearness(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A (classes, n) and b (n,): the nearest centre of logits z is argmin(z A + b).

        With f = P (z - m), |f - c|^2 = |f|^2 - 2 c P (z - m) + |c|^2, where |f|^2 is the same for all centres.
        """
        p, c = self.components.astype(np.float64), self.centres.astype(np.float64)
        towards = -2 * p.T @ c.T
        bias = np.square(c).sum(1) - self.mean.astype(np.float64) @ towards
        return towards.astype(np.float32), bias.astype(np.float32)

    @property
    def blended(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Gains and offsets with alpha in them: alpha (g z + o) + (1 - alpha) z = (1 + alpha (g - 1)) z + alpha o."""
        a = np.float32(self.alpha)
        return 1 + a * (self.gain - 1), a * self.offset

    def clusters(self, quantized: Logits) -> NDArray[np.int64]:
        """The cluster of each row: (N,)."""
        towards, bias = self.nearness
        found: NDArray[np.int64] = np.argmin(quantized @ towards + bias, axis=1)
        return found

    def apply(self, quantized: Logits) -> Logits:
        """The corrected logits, (N, classes)."""
        gain, offset = self.blended
        of = self.clusters(quantized)
        corrected: Logits = quantized * gain[of] + offset[of]
        return corrected


def least_squares(quantized: Logits, exact: Logits) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gain and offset of each class, (classes,), of least squared error: g = cov(q, f) / var(q), o = f' - g q'.

    quantized, exact: the logits of one cluster, (N, classes). A class that is constant in it keeps gain 1, so that one
    image shifts and does not stretch.
    """
    q, f = quantized.astype(np.float64), exact.astype(np.float64)
    q_mean, f_mean = q.mean(0), f.mean(0)
    variance = np.square(q - q_mean).mean(0)
    covariance = ((q - q_mean) * (f - f_mean)).mean(0)
    gain = np.divide(covariance, variance, out=np.ones_like(variance), where=variance > 0)
    return gain, f_mean - gain * q_mean


def fit(quantized: Logits, exact: Logits, alpha: float, num_clusters: int, pca_dim: int, seed: int = 0) -> Correction:
    """Fits a correction to the logits of the same images, (N, classes) each.

    There are fewer clusters where fewer images differ. Raises DataError where the images are too few, or the logits not
    finite.
    """
    if quantized.shape != exact.shape or quantized.ndim != 2:
        raise DataError(f"logits of shape {quantized.shape} and {exact.shape}: expected (N, classes) twice")
    if not (np.isfinite(quantized).all() and np.isfinite(exact).all()):
        raise DataError("the logits to fit are not finite")
    count, classes = quantized.shape
    if not 1 <= num_clusters <= count:
        raise DataError(f"num_clusters {num_clusters}: there are {count} images to fit; legal: 1 to {count}")
    if not 1 <= pca_dim <= min(count, classes):
        raise DataError(f"pca_dim {pca_dim}: {count} images, {classes} classes; legal: 1 to {min(count, classes)}")
    mean, components = principal(quantized, pca_dim)
    centres = _centres(np.asarray((quantized - mean) @ components.T, np.float32), num_clusters, seed)
    blank = np.ones((len(centres), classes), np.float32)
    made = Correction(mean, components, centres, blank, 0 * blank, alpha)
    return _with_affine(made, quantized, exact)


def principal(quantized: Logits, dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean (classes,) and the first principal directions (dim, classes), from the eigenvectors of the covariance."""
    mean = quantized.mean(0, dtype=np.float64)
    centred = quantized - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return mean.astype(np.float32), np.ascontiguousarray(vectors[:, ::-1][:, :dim].T, np.float32)


def _centres(features: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    from sklearn.cluster import KMeans

    distinct = len(np.unique(features, axis=0))
    found = KMeans(min(count, distinct), n_init=RESTARTS, random_state=seed).fit(features).cluster_centers_
    return np.asarray(found, np.float32)


def _with_affine(made: Correction, quantized: Logits, exact: Logits) -> Correction:
    """With each cluster's gains and offsets; a cluster that no image is in leaves logits as they are."""
    of = made.clusters(quantized)
    gain, offset = made.gain.copy(), made.offset.copy()
    for cluster in np.unique(of):
        gain[cluster], offset[cluster] = least_squares(quantized[of == cluster], exact[of == cluster])
    return Correction(made.mean, made.components, made.centres, gain, offset, made.alpha)


ARRAYS = ("mean", "components", "centres", "gain", "offset")


def save(correction: Correction, path: Path) -> None:
    """Writes a correction as safetensors."""
    from safetensors.numpy import save as serialized

    tensors = {name: np.ascontiguousarray(getattr(correction, name)) for name in ARRAYS}
    write(path, serialized(tensors, metadata={FORMAT: json.dumps({"alpha": correction.alpha})}))


def load(path: Path) -> Correction:
    """The inverse of `save`. Raises FileFormatError for a file that is missing, corrupt or foreign."""
    from safetensors import SafetensorError, safe_open

    check_is_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            alpha = parsed((file.metadata() or {})[FORMAT])["alpha"]
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
        made = Correction(**arrays, alpha=float(alpha))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise FileFormatError(f"{path}: not a correction of pow2quant: {error}") from error
    clusters, dim, classes = len(made.gain), len(made.components), made.mean.size
    shapes = ((classes,), (dim, classes), (clusters, dim), (clusters, classes), (clusters, classes))
    for name, shape in zip(ARRAYS, shapes, strict=True):
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
            raise FileFormatError(f"{path}: {name}: expected finite float32 {shape}, got {array.dtype} {array.shape}")
    if not 0 <= made.alpha <= 1 or not math.isfinite(made.alpha) or not clusters:
        raise FileFormatError(f"{path}: alpha {made.alpha} or {clusters} clusters make no correction")
    return made
