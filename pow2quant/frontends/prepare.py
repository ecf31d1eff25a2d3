"""One preparation for every backend: the user's network as a graph of modules from `operators.OPERATORS`.

Submodule names are kept. Functions (`F.relu`, `+`, `torch.cat`, `x.mean`, …) become modules named after the module in
whose `forward` they stand (`layer1.0.add`); a module that is called twice is written twice (`layer1.0.relu_1`), its
parameters stay shared. Dropout, identities and whatever else does nothing go (`idle.py`). Batch norm stays where it is:
`fold.fold_batch_norm` is a rewrite.
"""

from __future__ import annotations

import gc
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from pow2quant.errors import ModelError, UnsupportedModelError, WeightsError
from pow2quant.frontends import modules as m
from pow2quant.frontends.aten import ROWS
from pow2quant.frontends.batches import call_arguments, inputs
from pow2quant.frontends.builder import Builder
from pow2quant.frontends.checks import HALVES, Lockstep, close, is_mask
from pow2quant.frontends.constants import BY_SHAPE
from pow2quant.frontends.containers import restore_containers
from pow2quant.frontends.decomposed import decomposed
from pow2quant.frontends.export import SIZES, capture, captured, first_line, module_of, unwrapped
from pow2quant.frontends.fixed import in_parts, opened
from pow2quant.frontends.idle import drop_idle
from pow2quant.frontends.kept import ENDS
from pow2quant.frontends.onnx.checking import COMPARE
from pow2quant.frontends.returned import RETURNED
from pow2quant.frontends.unrolled import UNROLLED

PREPARED, FIXED = "pow2quant_prepared", "pow2quant_fixed"
DROPOUTS = "pow2quant_dropouts"


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within it, Python does not look for cycles of garbage: each time it walks over all of PyTorch's objects."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@_no_collection()
def prepare(model: nn.Module, example: Any) -> fx.GraphModule:
    """The network as a float graph of modules, in eval mode, with `shape`, `free` and `dtype` in each `node.meta`.

    model: left unchanged; the result holds copies. example: inputs of one call, (N, …) each; what counts is their
    shapes and types, and how large their values are.
    Raises UnsupportedModelError (node, source line, what can be done; or that a network is not what its ONNX file
    computes), WeightsError for weights that are not finite, ModelError when the network fails on the example.
    """
    model = module_of(model)
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} is no network; it must be a torch.nn.Module")
    _check_names(model)
    _check_finite(model)
    model = unwrapped(model)
    _check_files(model, example)
    programs, sizes, fixed = _captured(model, example)
    first, second = (decomposed(program, ROWS.keys() | BY_SHAPE) for program in programs)
    builder = Builder(model, (first, second), ROWS)
    try:
        network = builder.build()
    except UnsupportedModelError:
        if first is not programs[0]:
            Builder(model, programs, ROWS).build()  # its error names what the user wrote
        raise
    _check_computed(network)
    _check_same(builder, network, model, example, sizes, fixed)
    drop_idle(network)
    restore_containers(network, model)
    network.meta |= {PREPARED: True, RETURNED: builder.returned, UNROLLED: builder.unrolled, FIXED: fixed}
    network.meta[DROPOUTS] = tuple(name for name, _ in builder.dropouts.values())
    return network


def unrolled(network: nn.Module) -> dict[str, int]:
    """Over how many steps each recurrent layer of a prepared network is written out: the length of the example."""
    found: dict[str, int] = getattr(network, "meta", {}).get(UNROLLED, {})
    return found


def fixed_batch(network: nn.Module) -> int | None:
    """How many samples the user's network takes at a time, if no other number; the prepared network takes any."""
    found: int | None = getattr(network, "meta", {}).get(FIXED)
    return found


def dropouts(network: nn.Module) -> tuple[str, ...]:
    """What the user's dropouts are called that a prepared network does not have; see `dropouts.DROPOUT`."""
    found: tuple[str, ...] = getattr(network, "meta", {}).get(DROPOUTS, ())
    return found


def is_prepared(network: nn.Module) -> bool:
    """Whether `prepare` made it."""
    return isinstance(network, fx.GraphModule) and PREPARED in network.meta


def _captured(
    model: nn.Module, example: Any
) -> tuple[tuple[ExportedProgram, ExportedProgram], tuple[int, int], int | None]:
    """The network captured for two batch sizes, these sizes, and the one that its code holds, if it does."""
    try:
        return capture(model, (_of_size(example, size) for size in SIZES)), SIZES, None
    except UnsupportedModelError:
        raise
    except ModelError:
        for size in (1, max((len(x) for x in inputs(example) if x.ndim), default=1)):
            with suppress(Exception):  # the first error says it
                first = captured(model, _of_size(example, size))
                return (first, opened(first, inputs(_of_size(example, 2 * size)))), (size, 2 * size), size
        raise


def _check_files(model: nn.Module, example: Any) -> None:
    """Compares networks that were read from files with open sizes with these files, at the sizes of the example.

    Raises UnsupportedModelError where one is not what its file computes.
    """
    for part in model.modules():
        compare = getattr(part, "meta", {}).get(COMPARE)
        if compare is None:
            continue
        calls: list[tuple[Any, ...]] = []
        given = inspect.signature(part.forward)
        handle = part.register_forward_pre_hook(
            lambda _, args, kwargs, calls=calls, given=given: calls.append(given.bind(*args, **kwargs).args),
            with_kwargs=True,
        )
        try:
            with torch.no_grad():
                _returned(model, _of_size(example, 2), None)
        finally:
            handle.remove()
        for args in calls:
            compare(part, list(args))


def _check_same(
    builder: Builder,
    network: fx.GraphModule,
    model: nn.Module,
    example: Any,
    sizes: tuple[int, int],
    fixed: int | None,
) -> None:
    """The claim of this file, checked on random data: the prepared network computes what the user's does.

    Each operation is compared on the captured network's own values, the whole network on one sample; on the way every
    node gets its shapes. Where rounding grows through the network, or one sample is a case of its own in the user's
    code, the operations are compared on the other batch, too, and what was captured with the user's network there.
    """
    half = any(n.meta["val"].dtype in HALVES for n in builder.results if isinstance(n.meta.get("val"), Tensor))
    grown, rounded = (3e-2, 3e-2) if half else (1e-2, 1e-3)  # 16 bits lose more than that
    lockstep, whole = Lockstep(builder, network), Shapes(network)
    with torch.no_grad():
        lockstep.run([*inputs(_of_size(example, sizes[0]))])
        one = _of_size(example, sizes[1] if fixed else 1)
        results = whole.results(inputs(one))
        same = _agree(results, _returned(model, one, fixed), builder.outputs, grown)
        if not same:
            captured = Lockstep(builder, network, which=1).run([*inputs(_of_size(example, sizes[1]))])
            wanted = _returned(model, _of_size(example, sizes[1]), fixed)
            same = _agree([captured[i] for i in builder.outputs], wanted, builder.outputs, rounded)
    if not same:
        raise UnsupportedModelError(
            "the network does not compute the same when it is captured: what forward does depends on more than its "
            "inputs (random numbers, dropout that is always on, a count of calls)"
        )
    for node in network.graph.nodes:
        if node.op != "output":
            several, one = lockstep.shapes[node.name], whole.shapes[node.name]
            node.meta["shape"] = tuple(several[0])
            node.meta["free"] = tuple(a != b for a, b in zip(several[0], one[0], strict=True))
            node.meta["dtype"] = several[1]
            if node.name in whole.ends:
                node.meta[ENDS] = whole.ends[node.name]


def _returned(model: nn.Module, batch: Any, size: int | None) -> tuple[Tensor, ...]:
    """The tensors that the user's network returns for a batch, which stays as it is; none where it fails."""

    def call(part: Any) -> tuple[Tensor, ...]:
        args, kwargs = call_arguments(model, pytree.tree_map(_cloned, part))
        return inputs(model(*args, **kwargs))

    try:
        return in_parts(call, batch, size) if size else call(batch)
    except Exception:  # it ran on other batches: this one is a case of its own
        return ()


def _agree(results: Sequence[Tensor], returned: Sequence[Tensor], outputs: Sequence[int], tolerance: float) -> bool:
    """Whether results are those of the user's outputs, up to rounding."""
    return len(returned) > max(outputs) and all(
        close(x, returned[i], tolerance) for x, i in zip(results, outputs, strict=True)
    )


class Shapes(fx.Interpreter):
    """Runs a network and notes every node's shape and type, and the ends of its finite real values, by name."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.extra_traceback = False  # an error stays one line
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self.ends: dict[str, tuple[float, float]] = {}

    def results(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What it returns for a batch."""
        returned = inputs(self.run(*batch))
        self.env.clear()
        return returned

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        try:
            value = super().run_node(n)
        except Exception as error:  # whatever a module raises for a shape that follows from the other batch size
            why = f"depends on the batch size: {first_line(error)}"
            raise UnsupportedModelError(f"{n.target}: {why} It must be the same for any batch.") from error
        if isinstance(value, Tensor):
            self.shapes[n.name] = (value.shape, value.dtype)
            if value.is_floating_point() and value.numel():
                low, high = map(float, torch.aminmax(value))
                if not math.isfinite(high - low) and (finite := value[torch.isfinite(value)]).numel():
                    low, high = float(finite.min()), float(finite.max())
                if math.isfinite(high - low):
                    self.ends[n.name] = low, high
        return value


def _cloned(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _check_names(model: nn.Module) -> None:
    """Raises ModelError for a name that is no text, with a null byte or half of a surrogate pair."""
    for name, _ in [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]:
        if re.search("[\0\ud800-\udfff]", name):
            raise ModelError(f"the name {name!r} in the network holds what no file can hold")


def _check_finite(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(
                f"{name}: has no shape yet (a lazy module); run the network on an example once, then save it"
            )
        if tensor.is_meta:
            raise ModelError(f"{name}: is on the device 'meta' and has no values; load the weights first")
        if tensor.layout is not torch.strided:
            raise ModelError(f"{name}: its layout is {tensor.layout}; only dense weights can be quantized (to_dense())")
        if not _is_finite(tensor) and (isinstance(tensor, nn.Parameter) or not is_mask(tensor)):
            raise WeightsError(f"{name}: the weights hold NaN or infinity")


def _check_computed(network: fx.GraphModule) -> None:
    """Raises WeightsError for weights that the network computes and that are not finite; constants may be masks."""
    for name, weight in network.named_parameters():
        if not isinstance(network.get_submodule(name.rpartition(".")[0]), m.Constant) and not _is_finite(weight):
            raise WeightsError(
                f"{name}: the network computes these weights from its parameters, and they hold NaN or infinity (a "
                "root or logarithm of negative numbers, a division by 0, an overflow)"
            )


def _is_finite(tensor: Tensor) -> bool:
    """A finite sum needs one pass and no memory; that of finite values may still be infinite."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _is_mask(x: Tensor) -> bool:
    """Whether real numbers are zeros and ones, and not all the same."""
    return bool(((x == 0) | (x == 1)).all()) and 0 < int(torch.count_nonzero(x)) < x.numel()


def _of_size(example: Any, n: int) -> Any:
    """n samples of the example's shape and size of values, each another; integers and masks keep the example's rows."""
    generator = torch.Generator().manual_seed(0)

    def varied(x: Any) -> Any:
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        x = x.detach().cpu()
        if not x.numel():
            raise ModelError(f"the example holds no values: its shape is {tuple(x.shape)}")
        if not x.is_floating_point() or _is_mask(x):
            return x[torch.arange(n) % len(x)].clone()
        first = x[:1].float()
        if not torch.isfinite(first).all():
            raise ModelError("the example holds NaN or infinity")
        spread = float(first.abs().max()) or 1.0
        return first + 0.5 * spread * torch.randn(n, *x.shape[1:], generator=generator)

    return pytree.tree_map(varied, example)
