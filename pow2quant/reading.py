"""Reading a batch, whatever people put into it: the network's inputs, and the targets beside them.

A batch is a tensor or array; a tuple or list whose first elements are inputs; or a dictionary, whose keys are the names
of the network's arguments or common ones (`image`, `label`). Numbers become float32, or stay integers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pow2quant.errors import DataError

INPUTS = ("x", "input", "inputs", "image", "images", "img", "data", "features", "pixel_values")
TARGETS = ("y", "label", "labels", "target", "targets", "mask", "masks", "classes")
"""Keys under which data sets commonly keep what goes into a network, and what should come out."""

OUTCOMES = tuple(name for name in TARGETS if name not in ("mask", "masks"))
"""Those keys of targets that never name an input."""

NAMES, BYTES = "pow2quant.names", "pow2quant.bytes"
"""Keys of a graph module's `meta`: its arguments by other names, and the range of those that are bytes."""

IMAGES = "images: add ToTensor"
"""What is missing where images come as they are stored."""

Batch = tuple[Any, Any]
"""Inputs, float32 or integer (N, …): a tensor, or a tuple of several; and targets: None where there are none."""


class Batches(Protocol):
    """What can be iterated again and again, such as a DataLoader or a list of batches."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Signature:
    """What a network is called with. names: of its arguments, in order; required: how many have no default.

    variadic: it takes any number (`*args`). whole: a dictionary or list of tensors is its only argument, as it is.
    optional: arguments that are None by default. aliases: other names of arguments. bytes: of arguments that are bytes,
    their range; they are read as real numbers.
    """

    names: tuple[str, ...] = ()
    required: int = 1
    variadic: bool = False
    whole: bool = False
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    bytes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Signature:
        """The signature of the network's `forward`."""
        found = inspect.signature(model.forward).parameters.values()
        named = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        required = sum(p.default is p.empty for p in named)
        variadic = any(p.kind is p.VAR_POSITIONAL for p in found)
        optional = tuple(p.name for p in named if p.default is None and p.kind is not p.KEYWORD_ONLY)
        meta = model.meta if isinstance(model, fx.GraphModule) else {}
        return cls(
            tuple(p.name for p in named),
            max(1, required),
            variadic and not required,
            optional=optional,
            aliases=meta.get(NAMES, {}),
            bytes=meta.get(BYTES, {}),
        )


@dataclass(frozen=True)
class Checked:
    """Batches as `read` gives them, or a DataError that names the batch.

    name: of the data, for errors. classes: how many the targets may name, where that is known. check: takes targets,
    the number of samples and what to call the batch; returns the targets as they should be. shapes: of one sample of
    every input; None: those of the first batch.
    """

    batches: Batches
    name: str
    signature: Signature = Signature()
    classes: int = 0
    check: Callable[[Any, int, str], Any] | None = None
    shapes: list[tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in self.structured():
            tensors = tuple(x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))
            yield tensors[0] if len(tensors) == 1 else tensors, targets

    def structured(self) -> Iterator[tuple[Any, Any]]:
        """The batches with inputs as the network is called with them: a tensor, a tuple or a dictionary."""
        batches, index, shapes = iter(self.batches), 0, self.shapes
        while True:
            where = f"{self.name}, batch {index}"
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise data_error(error, self.name) from error
            inputs, targets = read(batch, self.signature, where)
            shapes = _same_shapes(inputs, shapes, where)
            yield inputs, self._targets(targets, inputs, where)
            index += 1

    def _targets(self, targets: Any, inputs: Any, where: str) -> Any:
        size = next(len(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))
        if self.classes and isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
            check_labels(targets, self.classes, where)
        return targets if self.check is None or targets is None else self.check(targets, size, where)


def read(batch: Any, signature: Signature, where: str) -> tuple[Any, Any]:
    """The network's inputs, as it is called with them, and the targets (None where there are none).

    Raises DataError, which begins with `where`, for what cannot be an input: not finite, no tensor, bytes, no samples.
    """
    if is_dataclass(batch):
        batch = vars(batch)
    if isinstance(batch, Mapping):
        batch = {signature.aliases.get(key, key): value for key, value in batch.items()}
        inputs, targets = _from_mapping(batch, signature, where)
    elif isinstance(batch, (tuple, list)):
        inputs, targets = _from_sequence(batch, signature, where)
    else:
        inputs, targets = batch, None
    return _inputs(inputs, signature, where), _targets_of(targets, where)


def target_of(item: Any) -> Any:
    """The target of one sample of a data set, a plain number where it has one value; None where there is none."""
    if isinstance(item, Mapping):
        target = next((item[key] for key in TARGETS if key in item), None)
    else:
        target = item[-1] if isinstance(item, tuple | list) and len(item) > 1 else None
    if isinstance(target, Tensor | np.ndarray) and np.size(target) == 1:
        return target.reshape(-1)[0].item()
    return target


def is_array(x: Any) -> bool:
    """Whether this is a tensor, or an array of any library that numpy can read: TensorFlow's, JAX's, pandas'."""
    if isinstance(x, (Tensor, np.ndarray)):
        return True
    # a dictionary whose keys are attributes may raise what it likes about one that it lacks
    return not isinstance(x, (Mapping, np.generic)) and hasattr(x, "__array__") and hasattr(x, "shape")


def tensor_of(x: Any, where: str) -> Tensor:
    """An array as a tensor. Raises DataError for one that does not hold numbers."""
    if isinstance(x, Tensor):
        return x
    array = np.array(x, order="C")
    if array.dtype.kind in "SU":
        raise DataError(f"{where}: holds text ({str(array.flat[0])!r}); expected numbers, class indices for labels")
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise DataError(f"{where}: holds an array of {array.dtype}; expected numbers")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def check_has_values(x: Tensor, where: str) -> None:
    """Raises DataError for a tensor that is not plain numbers beside each other."""
    if x.is_meta or x.layout != torch.strided or x.is_quantized or x.is_nested or x.is_complex():
        kind = "meta" if x.is_meta else "quantized" if x.is_quantized else "complex" if x.is_complex() else "sparse"
        raise DataError(f"{where}: holds a {kind} tensor; expected plain numbers")


def check_labels(labels: Tensor, classes: int, where: str) -> None:
    """Raises DataError for a label that is no class."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(f"{where}: label {int(wrong[0])} is no class; legal: 0 to {classes - 1}")


def data_error(error: Exception, name: str) -> DataError:
    """One line for whatever came out of a data set, perhaps through a DataLoader's worker process."""
    line = last_line(error)
    line += f" ({IMAGES})" if "PIL." in line else ""
    if isinstance(error, DataError):
        return DataError(line.removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: "))
    return DataError(f"{name}: {type(error).__name__}: {line}")


def last_line(error: BaseException) -> str:
    """The last line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _from_mapping(batch: Mapping[str, Any], signature: Signature, where: str) -> tuple[Any, Any]:
    if signature.whole or not (signature.names or signature.variadic):  # `forward(batch)`, `forward(**batch)`
        targets = next((batch[key] for key in TARGETS if key in batch), None)
        return {key: x for key, x in batch.items() if key not in TARGETS}, targets
    named = [n for i, n in enumerate(signature.names) if n in batch and (i < signature.required or n not in TARGETS)]
    if len(named) < signature.required:
        named = [] if signature.required > 1 else [next((key for key in INPUTS if key in batch), "")]
    if not named or not named[0]:
        if signature.required > 1 or not all(map(is_array, batch.values())):
            raise DataError(
                f"{where}: a dictionary with the keys {', '.join(map(str, batch))}; the network's arguments are "
                f"{', '.join(signature.names) or 'unnamed'}: name the keys so"
            )
        return dict(batch), None
    rest = {key: value for key, value in batch.items() if key not in named}
    known = [key for key in TARGETS if key in rest]
    targets = rest[known[0]] if known else next(iter(rest.values())) if len(rest) == 1 else rest or None
    if len(named) == 1:
        return batch[named[0]], targets
    return {name: batch[name] for name in named}, targets


def _from_sequence(batch: Sequence[Any], signature: Signature, where: str) -> tuple[Any, Any]:
    if not batch:
        raise DataError(f"{where}: is empty")
    first = batch[0]
    count = 1
    if isinstance(first, Mapping):
        inputs, other = _from_mapping(first, signature, where)
        batch = (inputs, other) if len(batch) == 1 and other is not None else (inputs, *batch[1:])
    elif isinstance(first, (tuple, list)) and any(map(is_array, first)):
        inputs = list(first) if signature.whole else tuple(first)
    else:
        count = len(batch) - _has_labels(batch) if signature.variadic else signature.required
        if len(batch) < count:
            raise DataError(
                f"{where}: holds {len(batch)} tensors; the network takes {count} ({', '.join(signature.names[:count])})"
            )
        count += _tokens_beside(batch, count, signature, where)
        inputs = first if count == 1 else tuple(batch[:count])
    rest = batch[count:]
    return inputs, None if not rest else rest[0] if len(rest) == 1 else tuple(rest)


def _tokens_beside(batch: Sequence[Any], count: int, signature: Signature, where: str) -> int:
    """How many elements behind the required inputs are inputs as well: integers as many as the tokens, such as masks.

    Raises DataError where elements may be targets as well as inputs that the network need not be given.
    """
    beside, behind = batch[count:-1], signature.names[count:]
    free = [name for name in behind if name in signature.optional and name not in OUTCOMES]
    if signature.variadic or not free or not beside:
        return 0
    tokens = batch[0]
    alike = _is_whole(tokens) and all(_is_whole(x) and x.shape == tokens.shape for x in beside)
    # by position: of one element and several arguments that it may be, only the first may be meant
    if alike and list(behind[: len(beside)]) == free[: len(beside)] and (len(beside) > 1 or _is_mask(free)):
        return len(beside)
    raise DataError(
        f"{where}: holds {len(batch)} elements; the network takes {', '.join(signature.names[:count])}, and may take "
        f"{', '.join(free)}: give ((inputs, ...), targets), or a dictionary with the names of its arguments"
    )


def _is_mask(free: list[str]) -> bool:
    """Whether the first of these arguments is a mask, or the only one."""
    return "mask" in free[0] or len(free) == 1


def _is_whole(x: Any) -> bool:
    """Whether these are integers or truth values."""
    return is_array(x) and tensor_of(x, "").dtype in (torch.int32, torch.int64, torch.bool)


def _has_labels(batch: Sequence[Any]) -> bool:
    """Whether the last element looks like class indices."""
    last = batch[-1]
    return len(batch) > 1 and is_array(last) and len(last.shape) == 1


def _inputs(inputs: Any, signature: Signature, where: str) -> Any:
    """The inputs as tensors."""
    if not signature.bytes:
        return pytree.tree_map(lambda x: _input(x, where), inputs)
    if isinstance(inputs, Mapping):
        return {name: _input(x, where, signature.bytes.get(name)) for name, x in inputs.items()}
    several = isinstance(inputs, tuple)
    ends = [signature.bytes.get(name) for name in signature.names]
    given = inputs if several else (inputs,)
    ends += [None] * (len(given) - len(ends))
    found = tuple(_input(x, where, e) for x, e in zip(given, ends, strict=False))
    return found if several else found[0]


def _byte_values(x: Tensor, ends: tuple[int, int], where: str) -> Tensor:
    """Bytes, whatever their type, as real numbers. Raises DataError for what is none."""
    values = x.double()
    wrong = (values != values.round()) | (values < ends[0]) | (values > ends[1])
    if wrong.any():
        example = float(values[wrong][0])
        raise DataError(
            f"{where}: holds {example:g}; the network takes bytes from {ends[0]} to {ends[1]}, as they are, not scaled"
        )
    return x.float()


def _input(x: Any, where: str, ends: tuple[int, int] | None = None) -> Tensor:
    if not is_array(x):
        raise DataError(f"{where}: holds a {type(x).__name__} where the network takes a tensor ({IMAGES})")
    x = tensor_of(x, where)
    check_has_values(x, where)
    tensor: Tensor = x.detach().cpu()
    if not tensor.ndim or not len(tensor):
        raise DataError(f"{where}: has the shape {tuple(tensor.shape)}, so no samples; expected (N, ...)")
    if tensor.is_floating_point():
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise DataError(f"{where}: holds NaN or infinity")
    if ends is not None:
        return _byte_values(tensor, ends, where)
    if not tensor.is_floating_point() and tensor.dtype not in (torch.int32, torch.int64, torch.bool):
        raise DataError(
            f"{where}: expected float32, got {tensor.dtype}; scale it as in training (pixels: x.float() / 255)"
        )
    return tensor


def _targets_of(targets: Any, where: str) -> Any:
    """Arrays and lists of numbers as tensors on the CPU, of float32 or integers; text as lists; all else as it is."""

    def tensor(x: Any) -> Any:
        if (is_array(x) or isinstance(x, np.generic)) and not isinstance(x, Tensor):
            x = np.array(x)
            x = torch.from_numpy(x) if x.dtype.kind in "fiub" else x.tolist() if x.dtype.kind in "SUO" else x
        if not isinstance(x, Tensor):
            return x
        check_has_values(x, where)
        x = x.detach().cpu()
        return x.float() if x.is_floating_point() else x.long() if x.dtype != torch.bool else x

    if isinstance(targets, (list, tuple)) and targets and all(isinstance(x, (int, float)) for x in targets):
        targets = torch.tensor(targets)
    elif isinstance(targets, tuple) and all(isinstance(x, str | bytes) for x in targets):
        targets = list(targets)  # not several targets, but what a DataLoader makes of one text for each sample
    return pytree.tree_map(tensor, targets)


def _same_shapes(inputs: Any, expected: list[tuple[int, ...]] | None, where: str) -> list[tuple[int, ...]]:
    """The shapes of a sample. Raises DataError where they are not those of the batches before."""
    shapes = [tuple(x.shape[1:]) for x in pytree.tree_leaves(inputs)]
    if expected is not None and shapes != expected:
        words = [", ".join(f"(N, {', '.join(map(str, shape))})" for shape in each) for each in (shapes, expected)]
        raise DataError(f"{where}: has the shape {words[0]}, batches before it {words[1]}; all must be of one shape")
    return shapes
