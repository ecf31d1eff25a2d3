"""Capturing a network with `torch.export`, once for each of two batch sizes.

Both captures are static: every shape is a number, and what differs between them is what the batch size decides. So a
`-1`, a constant with one row per image, or a loop over the batch is found by comparing, and nothing is symbolic.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator as py
import re
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from pow2quant.errors import ModelError, UnsupportedModelError
from pow2quant.frontends.batches import call_arguments, open_dataclasses
from pow2quant.frontends.copies import copied

SIZES = (2, 3)
"""The batch sizes of the two captures."""

TORCH = str(Path(torch.__file__).parent / "_")[:-1]
"""The folder of PyTorch's own files, with the separator behind it (torchvision lies beside it)."""

HERE = str(Path(__file__).parent)

LOGGERS = (
    "torch.export",
    "torch._export",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
    "torch._subclasses",
)

LONGEST_REASON = 400
"""Characters of an error of PyTorch's that are passed on."""

ONE_AT_A_TIME = threading.RLock()
"""torch.export keeps what it is at in global variables."""

WRAPPERS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


def module_of(model: Any) -> Any:
    """The module of an exported program; anything else as it is."""
    return model.module() if isinstance(model, ExportedProgram) else model


def in_eval_mode(model: nn.Module) -> nn.Module:
    """The network in eval mode, unless torch.export has fixed the mode of it."""
    with contextlib.suppress(NotImplementedError):
        model.eval()
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU, in eval mode, without DataParallel and torch.compile around it.

    Raises UnsupportedModelError for scripted and traced modules, ModelError for what cannot be copied.
    """
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        wrapper: Any = model
        model = wrapper._orig_mod if hasattr(wrapper, "_orig_mod") else wrapper.module
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise UnsupportedModelError(
            f"{scripted[0] or 'the network'}: is a scripted or traced module (torch.jit), whose code cannot be read; "
            "pass the module that it was made from"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return in_eval_mode(copied(model, _computed_parameters(model))).float().cpu()
    except Exception as error:  # a user's __deepcopy__ may raise anything
        raise ModelError(f"the network cannot be copied: {first_line(error)}") from error


def _computed_parameters(model: nn.Module) -> dict[int, Tensor]:
    """Copies of tensors that a module computes from its parameters before it runs (`weight_norm`), by id.

    A deep copy takes them from here, because it refuses tensors that have a history.
    """
    held = [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor)]
    return {id(x): x.detach().clone() for x in held if x.grad_fn is not None}


def capture(model: nn.Module, batches: Iterable[Any]) -> tuple[ExportedProgram, ExportedProgram]:
    """The network's operations for two batches of different sizes; both graphs have the same nodes in the same order.

    Raises ModelError when the network fails on the batches, UnsupportedModelError (with the user's line) when its
    operations depend on data or on the batch size.
    """
    programs = [_export(model, batch, lines=not i) for i, batch in enumerate(batches)]
    written = any(_writes_into_views(p.graph) for p in programs)
    programs = [_cleaned(p, written) for p in programs]
    first, second = programs
    names = [[str(n.target) for n in p.graph.nodes if n.op == "call_function"] for p in programs]
    if names[0] != names[1]:
        raise UnsupportedModelError(
            f"the network's operations depend on the batch size ({len(names[0])} for {SIZES[0]} inputs, "
            f"{len(names[1])} for {SIZES[1]}): it loops over the batch, or branches on it; write it for any batch size"
        )
    return first, second


def captured(model: nn.Module, batch: Any) -> ExportedProgram:
    """The network's operations for one batch. Raises as `capture` does."""
    program = _export(model, batch)
    return _cleaned(program, _writes_into_views(program.graph))


def _cleaned(program: ExportedProgram, written: bool) -> ExportedProgram:
    """Without operations that nothing reads. written: whether views are overwritten; then no operation does it."""
    if written:
        with ONE_AT_A_TIME, quiet():
            program = program.run_decompositions({})
    program.graph.eliminate_dead_code()
    return program


def _export(model: nn.Module, batch: Any, lines: bool = True) -> ExportedProgram:
    """lines: whether each node notes the user's line, which takes a tenth of the time."""
    args, kwargs = call_arguments(model, batch)
    try:
        with ONE_AT_A_TIME, torch.no_grad(), quiet(), _with_lines(lines):
            program = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        if open_dataclasses(_results(model, batch)):
            return _export(model, batch, lines)
        what = "Control flow must not depend on tensors: move it out of forward, or quantize the parts on their own."
        if "fake tensor in the exported program" in str(error):
            raise UnsupportedModelError(
                "the network cannot be captured: forward writes into a tensor that the network holds, such as "
                "`self.weight.data *= mask`; compute with a new one instead (F.conv2d(x, self.weight * mask, …))"
            ) from error
        raise UnsupportedModelError(
            f"the network cannot be captured by torch.export{_user_line(error)}: {first_line(error)} {what}"
        ) from error
    program.example_inputs = None  # they may be large
    _inline(program.graph_module)
    return program


def _results(model: nn.Module, batch: Any) -> Any:
    """What the network returns for the batch in plain PyTorch. Raises ModelError when it fails."""
    args, kwargs = call_arguments(model, batch)
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor))
        raise ModelError(
            f"the network fails on inputs of shape {shapes}{_user_line(error)}: {first_line(error)} {_remedy(error)}"
        ) from error


def _remedy(error: Exception) -> str:
    """What can be done about a network that fails."""
    if re.search(r"Half|BFloat16", str(error)):
        return "Networks are prepared in float32: leave out what casts to 16 bits in forward."
    return "It must take any batch size."


def _inline(module: fx.GraphModule) -> None:
    """Puts the operations of `with torch.autocast(…)` and `with torch.no_grad()` where the block stands."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__name__", str(node.target)) not in WRAPPERS:
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        holder = node.args[at]
        inner = getattr(module, str(holder.target))
        _inline(inner)
        with graph.inserting_before(node):
            results = _inlined(graph, inner.graph, list(node.args[at + 1 :]))
        for user in list(node.users):
            if user.target is not py.getitem:
                continue
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)


def _inlined(graph: fx.Graph, inner: fx.Graph, given: list[Any]) -> Any:
    """Copies the nodes of `inner`, called with `given`, to where `graph` inserts; returns its results."""
    env: dict[fx.Node, Any] = {}
    for step in inner.nodes:
        if step.op == "placeholder":
            env[step] = given.pop(0)
        elif step.op == "output":
            return fx.node.map_arg(step.args[0], lambda n: env[n])
        else:
            env[step] = graph.node_copy(step, lambda n: env[n])
    return ()


def _writes_into_views(graph: fx.Graph) -> bool:
    """Whether something is overwritten that is read later under another name: through a view, or as a view's base."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    root: dict[fx.Node, fx.Node] = {}
    family: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        base = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        root[node] = root[base] if base is not None and _is_alias(node) else node
        family.setdefault(root[node], []).append(node)
    for node in graph.nodes:
        if not overwrites(node):
            continue
        for alias in family[root[node.args[0]]]:
            stale = alias is not node.args[0] and order[alias] < order[node]
            if stale and any(order[user] > order[node] for user in alias.users):
                return True
    return False


def _is_alias(node: fx.Node) -> bool:
    """Whether the result shares memory with the first argument."""
    if node.target is py.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.returns) and schema.returns[0].alias_info is not None


def overwrites(node: fx.Node) -> bool:
    """Whether the operation writes into its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


@contextlib.contextmanager
def _with_lines(lines: bool) -> Iterator[None]:
    """Within it, nodes get the user's line or not."""
    settings: Any = torch.fx.config
    before, settings.do_not_emit_stack_traces = getattr(settings, "do_not_emit_stack_traces", False), not lines
    try:
        yield
    finally:
        settings.do_not_emit_stack_traces = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it, torch.export neither logs, warns nor prints whole graphs: what matters is in its errors."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """An error's text as one sentence."""
    text = str(error).strip().splitlines()
    line = text[0].strip()[:LONGEST_REASON] if text else type(error).__name__
    return line if line.endswith(".") else f"{line}."


def _user_line(error: BaseException) -> str:
    """The innermost line of the traceback that is neither PyTorch's nor ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((TORCH, HERE))]
    frames = [f for f in frames if f.line and not f.filename.startswith("<")]
    return f' at {frames[-1].filename}:{frames[-1].lineno} "{frames[-1].line}"' if frames else ""


def source_line(node: fx.Node) -> str:
    """Where a node stands in the user's code: ' (file.py:12 "x = torch.svd(x)")', or nothing."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.+)', node.meta.get("stack_trace") or "")
    frames = [f for f in frames if not f[0].startswith(TORCH)]
    return ' ({}:{} "{}")'.format(*frames[-1]) if frames else ""
