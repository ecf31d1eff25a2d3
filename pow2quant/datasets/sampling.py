"""Part of a test set that stands for all of it: the same samples every time, every class in its share.

The sample does not depend on the order of batches: where the data have items, they are chosen among these. Data with a
label for each sample are ordered by it, so that evenly spaced samples are stratified; others are taken as they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from pow2quant.datasets.sources import Repeated
from pow2quant.reading import Checked, data_error, target_of

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """The test data of an evaluation. total: of how many samples; None: all, which are as many as are counted.

    images: what tells these samples from others, whatever is done to them on the way; None: their inputs do.
    """

    batches: Checked
    total: int | None = None
    images: str | None = None


def labels_at_hand(batches: Checked) -> Labels | None:
    """The class index of each sample, where the data say so without being read; in the order of their items."""
    loader = _loader(batches)
    found = None if loader is None else _told(loader.dataset)
    return None if found is None else _whole(found, len(loader.dataset))


def spread(count: int, total: int, labels: Labels | None = None) -> NDArray[np.intp]:
    """`count` of `total` indices, ascending: evenly spaced among the indices, in the order of `labels` (N,) if given.

    Each label gets its share, rounded down or up: `spread(4, 8, [0, 0, 0, 0, 0, 0, 1, 1])` has three of label 0.
    """
    order = np.arange(total) if labels is None else np.argsort(labels, kind="stable")
    places = ((np.arange(count) + 0.5) * total / count).astype(np.intp)
    return np.sort(order[places])


def sample(test: Checked, limit: int | None) -> Sample:
    """As many samples as the first `limit` batches have, from all of the test data; None: all of them.

    Raises DataError for data that cannot be read.
    """
    loader = _loader(test)
    if limit is None or limit >= len(test.batches):
        return Sample(test, None, None if loader is None else _identity(loader.dataset, range(len(loader.dataset))))
    if loader is None:
        return _of_stream(test, limit)
    dataset, total = loader.dataset, len(loader.dataset)
    chosen = spread(min(total, limit * loader.batch_size), total, _labels(dataset, test.name)).tolist()
    part = DataLoader(
        Subset(dataset, chosen),
        loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),
    )
    return Sample(replace(test, batches=Repeated(part)), total, _identity(dataset, chosen))


def _loader(test: Checked) -> Any:
    """The DataLoader behind the batches, if it gives each item of a data set once; otherwise None."""
    loader = test.batches.loader if isinstance(test.batches, Repeated) else test.batches
    if not isinstance(loader, DataLoader) or loader.batch_size is None or isinstance(loader.dataset, IterableDataset):
        return None
    sampler, dataset = loader.sampler, loader.dataset
    if not isinstance(sampler, SequentialSampler | RandomSampler) or not isinstance(dataset, Sized):
        return None
    once = not getattr(sampler, "replacement", False) and len(sampler) == len(dataset)
    return loader if once else None


def _identity(dataset: Any, chosen: Sequence[int]) -> str | None:
    """What a data set says to tell these samples from others."""
    if isinstance(dataset, Subset):
        return _identity(dataset.dataset, [dataset.indices[i] for i in chosen])
    identity = getattr(dataset, "identity", None)
    return None if identity is None else str(identity(chosen))


def _labels(dataset: Any, name: str) -> Labels | None:
    """The label of each item: those at hand, else read item by item; None where they are no class indices."""
    found = _told(dataset)
    return _whole(_read(dataset, name) if found is None else found, len(dataset))


def _told(dataset: Any) -> Any:
    """As `_at_hand`; None where what the data set has is of no use, as reading its items will say."""
    try:
        return _at_hand(dataset)
    except Exception:  # sparse labels, lists in lists, indices of a subset that are too large: a user's objects
        return None


def _at_hand(dataset: Any) -> Any:
    """The labels of all items; empty where they are known to be none, None where only reading the items would tell."""
    if isinstance(dataset, Subset):
        labels = _at_hand(dataset.dataset)
        return labels if labels is None or not len(labels) else np.asarray(labels)[list(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [_at_hand(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate([np.asarray(p) for p in parts])
    if isinstance(dataset, TensorDataset):
        labels = dataset.tensors[-1]
        return () if labels.is_floating_point() else labels.cpu().numpy()
    labels = getattr(dataset, "targets", None)
    return labels if labels is not None and np.shape(labels)[:1] == (len(dataset),) else None


def _read(dataset: Any, name: str) -> list[Any]:
    """The targets of all items; the first one tells whether they are class indices at all."""
    found: list[Any] = []
    try:
        for index in range(len(dataset)):
            found.append(target_of(dataset[index]))
            if np.ndim(found[-1]) or isinstance(found[-1], float | str | Mapping | None):
                return []
    except Exception as error:
        raise data_error(error, name) from error
    return found


def _whole(labels: Any, count: int) -> Labels | None:
    """Class indices (N,), or None for anything else."""
    found = np.asarray(labels)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    return found.astype(np.int64) if found.shape == (count,) and found.dtype.kind in "iub" else None


def _of_stream(test: Checked, limit: int) -> Sample:
    """The sample of batches that come as they are; it is kept, since finding it again would read everything."""
    sizes, labels = [], []
    for inputs, targets in test.structured():
        sizes.append(_size(inputs))
        labels.append(targets)
    known = all(isinstance(each, Tensor) and each.ndim == 1 for each in labels)
    total = sum(sizes)
    chosen = spread(sum(sizes[:limit]), total, _whole(torch.cat(labels), total) if known else None)
    kept = list(_batched(_picked(test, chosen), max(sizes[0], 1)))
    return Sample(replace(test, batches=kept), total)


def _size(inputs: Any) -> int:
    return next(len(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))


def _picked(test: Checked, chosen: NDArray[np.intp]) -> Iterator[tuple[Any, Any]]:
    """The chosen samples, batch by batch."""
    start = 0
    for inputs, targets in test.structured():
        size = _size(inputs)
        rows = (chosen[(chosen >= start) & (chosen < start + size)] - start).tolist()
        if rows:
            yield pytree.tree_map(lambda x, rows=rows: x[rows], inputs), _rows(targets, rows, size)
        start += size


def _rows(targets: Any, rows: list[int], size: int) -> Any:
    if isinstance(targets, Tensor):
        return targets[rows] if targets.ndim and len(targets) == size else targets
    if isinstance(targets, list) and len(targets) == size:
        return [targets[i] for i in rows]
    if isinstance(targets, Mapping):
        return {key: _rows(value, rows, size) for key, value in targets.items()}
    return tuple(_rows(x, rows, size) for x in targets) if isinstance(targets, tuple) else targets


def _batched(parts: Iterator[tuple[Any, Any]], size: int) -> Iterator[Any]:
    """Parts joined to batches of at least `size` samples; the last one may have fewer."""
    waiting: list[tuple[Any, Any]] = []
    for part in parts:
        waiting.append(part)
        if sum(_size(inputs) for inputs, _ in waiting) >= size:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined([part[i] for part in parts]) for i in range(len(first)) if first[i] is not None)
    return [item for part in parts for item in part] if isinstance(first, list) else first
