"""Data in every form that people have them, as the batches of a run.

A DataLoader or another iterable of batches; a torch Dataset, or a list of its items; arrays: `(X, y)`, `X`, or a
dictionary of arrays; or a pair (calibration, evaluation) of any of these, or `{"train": …, "test": …}`. What
`reading.read` can read may be a batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from pow2quant.errors import DataError
from pow2quant.reading import Batches, Checked, Signature, check_has_values, data_error, is_array, target_of, tensor_of

SHUFFLE_SEED = 20240917
"""Orders the calibration images, whatever the run's seed: the same images calibrate every run."""

MOST_CLASSES = 1_000_000
"""Of labels that say how many classes there are: a wrong column of a table would otherwise take all memory."""

SPLITS = ("train", "training", "calibration"), ("test", "validation", "val", "valid", "eval")
"""Keys of a dictionary with the data for calibration and training, and those for evaluation; the first one counts."""

STREAMED = 100
"""So many batches are kept of what can be read once only, or has no length."""


class Streamed(list[Any]):
    """The first batches of what can be read once only, or has no length. cut: whether there are more."""

    def __init__(self, batches: Iterator[Any]) -> None:
        super().__init__(islice(batches, STREAMED))
        self.cut = next(batches, None) is not None


@dataclass(frozen=True)
class Data:
    """Everything a run reads.

    calibration: all training images without augmentation, in one fixed shuffled order; take as many batches as needed.
    train: shuffled by torch's global generator, augmented where the data set says so, without an incomplete last batch.
    test: in the data set's own order. num_classes: 0 where the data do not say. input_shape: of one sample, (C, H, W);
    empty where there are several inputs, or only batches. notes: what is done to the images, in lines; warnings: what
    of it may be wrong.
    """

    calibration: Batches
    train: Batches
    test: Batches
    num_classes: int
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def with_parts(self, change: Callable[[Any], Any]) -> Data:
        """The same data with `change` made to the batches of every part."""
        return replace(self, calibration=change(self.calibration), train=change(self.train), test=change(self.test))


def data_of(made: Any, name: str, batch_size: int, train_batch_size: int, workers: int = 0) -> Data:
    """The data of a run, from data in any of the forms above; one alone is for calibration and for evaluation.

    name: for errors. Raises DataError for another form, and for a part that is empty.
    """
    if isinstance(made, Data):
        return _checked(made, name)
    parts = _parts(made)
    parts = tuple(Streamed(part) if isinstance(part, Iterator) else part for part in parts)
    parts = parts if len(parts) > 1 else parts * 2
    datasets = [_dataset(part) for part in parts]
    options = {"num_workers": workers, "collate_fn": _collated}
    words = ("calibration", "training", "test")
    first, (train, test) = parts[0], parts[-2:]
    calibration_set, (train_set, test_set) = datasets[0], datasets[-2:]
    for word, dataset in zip(words, (calibration_set, train_set, test_set), strict=True):
        if dataset is not None and not _length(dataset, f"{name}: the {word} set"):
            raise DataError(f"{name}: the {word} set is empty")
    classes = _classes(train_set, test_set)
    data = Data(
        calibration=_batches(first, calibration_set, batch_size, options, f"{name}: calibration", shuffled=True),
        train=_training(train, train_set, train_batch_size, options, f"{name}: train"),
        test=_batches(test, test_set, batch_size, options, f"{name}: test"),
        num_classes=len(classes),
        class_names=classes,
        input_shape=() if test_set is None else _shape(test_set, name),
    )
    cut = [word for word in ("calibration", "test") if isinstance(part := getattr(data, word), Streamed) and part.cut]
    if cut:
        what = " and ".join(cut)
        data = replace(
            data, warnings=(*data.warnings, f"{name}: {what}: the first {STREAMED} batches of more are used")
        )
    return _checked(data, name)


def _length(dataset: Any, what: str) -> int:
    try:
        return len(dataset)
    except Exception as error:
        raise data_error(error, f"{what}: its length") from error


def _parts(made: Any) -> tuple[Any, ...]:
    """(calibration, evaluation), (calibration, training, test), or one set of data alone."""
    if isinstance(made, Mapping):
        found = [next((made[name] for name in names if name in made), None) for names in SPLITS]
        return (made,) if any(part is None or is_array(part) for part in found) else tuple(found)
    if isinstance(made, list):
        several = all(isinstance(part, (DataLoader, Dataset)) for part in made)
    else:
        several = isinstance(made, tuple) and not any(map(is_array, made))
    return tuple(made) if several and len(made) in (2, 3) else (made,)


def _dataset(part: Any) -> Any:
    """The part as something with items and a length, or None: then it is batches already."""
    if is_array(part):
        return TensorDataset(tensor_of(part, "data"))
    if isinstance(part, (tuple, list)) and part and all(map(is_array, part)) and _are_columns(part):
        return _arrays(part)
    if isinstance(part, Mapping):
        return Columns({key: tensor_of(value, f"data, {key}") for key, value in part.items() if is_array(value)})
    if isinstance(part, (list, tuple)):
        return part if part and _is_sample(part[0]) else None
    is_map = isinstance(part, Sized) and hasattr(part, "__getitem__")
    return part if is_map and not isinstance(part, (DataLoader, str)) else None


def _are_columns(arrays: Sequence[Any]) -> bool:
    """Whether arrays are of the same samples, `(X, y)`, and not batches: those are in a list, and of one shape."""
    shapes = [x.shape for x in arrays]
    return isinstance(arrays, tuple) or (len({s[:1] for s in shapes}) == 1 and len({len(s) for s in shapes}) > 1)


def _arrays(part: Sequence[Any]) -> TensorDataset:
    tensors = [tensor_of(x, "data") for x in part]
    if len({len(x) for x in tensors}) != 1:
        hint = "; a split goes as ((X_train, y_train), (X_test, y_test))" if len(tensors) == 4 else ""
        raise DataError(f"arrays of different lengths: {', '.join(str(len(x)) for x in tensors)}{hint}")
    return TensorDataset(*tensors)


def _is_sample(item: Any) -> bool:
    """Whether an item of a list is one sample, and not a batch: its label is a plain number or text."""
    parts = list(item.values()) if isinstance(item, Mapping) else item
    last: Any = parts[-1] if isinstance(parts, (tuple, list)) and len(parts) > 1 else None
    return isinstance(last, (int, float, str, np.number)) or (is_array(last) and not len(last.shape))


@dataclass(frozen=True)
class Columns(Dataset[Any]):
    """A dictionary of arrays (N, …) as a data set of dictionaries."""

    columns: dict[str, Tensor]

    def __post_init__(self) -> None:
        """Raises DataError for arrays of different lengths."""
        lengths = {key: len(x) for key, x in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"arrays of different lengths: {', '.join(f'{k} {n:,}' for k, n in lengths.items())}")

    def __len__(self) -> int:
        return min((len(x) for x in self.columns.values()), default=0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: x[index] for key, x in self.columns.items()}


@dataclass(frozen=True)
class Repeated:
    """A loader whose batches are the same in every pass, whatever it draws at random on the way."""

    loader: Any
    state: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        generator = getattr(self.loader, "generator", None)
        object.__setattr__(self, "state", None if generator is None else generator.get_state())

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self.state is not None:
            self.loader.generator.set_state(self.state)
        own, iterator = _seeded(), None
        while True:
            outer = _exchanged(own)
            try:
                iterator = iter(self.loader) if iterator is None else iterator
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                own = _exchanged(outer)
            yield batch


States = tuple[Tensor, Any, Any]


def _seeded() -> States:
    """The states of torch's, numpy's and Python's generators behind one seed."""
    torchs = torch.Generator().manual_seed(SHUFFLE_SEED).get_state()
    return torchs, np.random.RandomState(SHUFFLE_SEED % 2**32).get_state(), random.Random(SHUFFLE_SEED).getstate()


def _exchanged(states: States) -> States:
    """Sets the global generators; returns how they were."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 (what data sets use)
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])
    return before


def _batches(
    part: Any, dataset: Any, size: int, options: Mapping[str, Any], name: str, *, shuffled: bool = False
) -> Batches:
    """Batches that are the same in every pass; shuffled: in one fixed order, where there is a data set."""
    if dataset is None:
        return _kept(part, name)
    if shuffled:
        order = torch.Generator().manual_seed(SHUFFLE_SEED)
        dataset = Subset(dataset, torch.randperm(len(dataset), generator=order).tolist())
    # without a generator of its own, reading would take numbers from the one that orders training
    return DataLoader(dataset, size, generator=torch.Generator(), **options)


def _training(part: Any, dataset: Any, size: int, options: Mapping[str, Any], name: str) -> Batches:
    if dataset is None:
        return part if isinstance(part, DataLoader) and _has_length(part) else _kept(part, name)
    return DataLoader(dataset, size, shuffle=True, drop_last=len(dataset) > size, **options)


def _kept(part: Any, name: str) -> Batches:
    """Batches that can be read again and again, of what may be read once only."""
    if isinstance(part, (list, tuple)):
        return part if isinstance(part, Streamed) else list(part)
    if not isinstance(part, Iterable) or isinstance(part, (str, bytes)):
        raise DataError(
            f"{name}: is a {type(part).__name__}; expected a DataLoader or another iterable of batches, a Dataset, "
            "arrays, or a pair (calibration, evaluation) of these"
        )
    if _has_length(part):
        return Repeated(part)
    try:
        return Streamed(iter(Repeated(part)))
    except Exception as error:
        raise data_error(error, name) from error


def _has_length(part: Any) -> bool:
    try:
        return len(part) >= 0
    except TypeError:
        return False


def _shape(dataset: Any, name: str) -> tuple[int, ...]:
    """The shape of the first sample's input; empty where it has several."""
    try:
        item = dataset[0]
    except Exception as error:
        raise data_error(error, name) from error
    first = item[0] if isinstance(item, (tuple, list)) and item else item
    return tuple(first.shape) if is_array(first) else ()


def _collated(items: Any) -> Any:
    """One batch of items; targets that cannot be stacked, such as boxes, stay a list."""
    if isinstance(items, tuple):  # a data set that gives whole batches
        return items
    try:
        return default_collate(items)
    except (RuntimeError, TypeError):
        if not all(isinstance(item, (tuple, list)) and len(item) > 1 for item in items):
            raise
        inputs = default_collate([item[0] for item in items])
        return inputs, [item[1] if len(item) == 2 else tuple(item[1:]) for item in items]


def _classes(train: Any, test: Any) -> tuple[str, ...]:
    """The training set's class names, or "0", "1", ... up to the largest label; none where these are no classes."""
    while isinstance(train, Subset) and not hasattr(train, "classes"):
        train = train.dataset
    if hasattr(train, "classes"):
        return tuple(map(str, train.classes))
    known = [labels for each in (train, test) if (labels := _labels(each)) is not None]
    count = max(int(labels.max()) for labels in known) + 1 if known else 0
    if count > MOST_CLASSES or any(int(labels.min()) < 0 for labels in known):
        return ()
    return tuple(map(str, range(count)))


def _labels(dataset: Any) -> Any:
    """All labels of a data set that has them at hand, integers (N,); otherwise None."""
    try:
        if isinstance(dataset, TensorDataset):
            labels: Any = dataset.tensors[-1] if len(dataset.tensors) > 1 else None
        elif isinstance(dataset, list):
            labels = [target_of(item) for item in dataset]
        else:
            labels = getattr(dataset, "targets", None)
        if labels is None or not len(labels) or not (is_array(labels) or isinstance(labels[0], int)):
            return None
        labels = torch.as_tensor(labels)
        check_has_values(labels, "labels")
    except Exception:  # what a user's objects are is said when they are read
        return None
    return labels if labels.ndim == 1 and not labels.is_floating_point() else None


def _checked(data: Data, name: str) -> Data:
    parts: dict[str, Any] = {}
    for part in ("calibration", "train", "test"):
        batches = getattr(data, part)
        if not (isinstance(batches, Sized) and hasattr(batches, "__iter__")):
            raise DataError(f"{name}: {part} can be iterated once only; expected a DataLoader or a list of batches")
        if not len(batches):
            raise DataError(f"{name}: {part} is empty")
        parts[part] = Checked(cast(Batches, batches), f"{name}: {part}", Signature(), data.num_classes)
    return replace(data, **parts)
