"""A float ONNX file as a network of PyTorch: one module for each node, under the file's names, open in its batch."""

from __future__ import annotations

import itertools
import keyword
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pow2quant.errors import Pow2QuantError, UnsupportedModelError, WeightsError
from pow2quant.frontends.export import quiet
from pow2quant.frontends.onnx.branches import take_branches
from pow2quant.frontends.onnx.checking import COMPARE, check, compare, examples
from pow2quant.frontends.onnx.evaluate import EVALUATED, evaluate
from pow2quant.frontends.onnx.file import DOMAINS, OnnxFile, load
from pow2quant.frontends.onnx.layers import LAYERS
from pow2quant.frontends.onnx.patterns import OWN, recognize
from pow2quant.frontends.onnx.rows import ROWS
from pow2quant.frontends.onnx.step import LARGEST, Step, tensor
from pow2quant.reading import BYTES, NAMES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from numpy.typing import NDArray


def read_network(source: str | Path | ModelProto) -> fx.GraphModule:
    """What a float ONNX file computes, as a network in eval mode that can be trained; `prepare` takes it from there.

    A layer is named as its weight or bias (`conv1.weight` belongs to conv1), any other module as its node. A batch
    size that the file fixes is opened. On random inputs the network gives what onnxruntime gives; where the file leaves
    sizes open, `prepare` compares the two on its example.
    Raises FileFormatError for a damaged or quantized file, UnsupportedModelError naming file, node and operation,
    WeightsError for weights that are not finite, ModelError where onnxruntime does not run the file.
    """
    file = load(source)
    for name, array in file.constants.items():
        if array.dtype == np.float32 and np.isnan(array).any():
            raise WeightsError(f"{file.name}: {name} holds NaN")
    try:
        _fold_constants(file)
        _decide_branches(file)
        recognize(file)
        network = Writer(file).write()
        _run_without_values(file, network, file.batch or 2)
        if not check(file, network):
            network.meta[COMPARE] = partial(compare, file)
    except Pow2QuantError:
        raise
    except Exception as error:  # whatever a malformed graph makes torch raise between its nodes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(f"{file.name}: cannot be computed: {reason}") from error
    return network


def _fold_constants(file: OnnxFile) -> None:
    """Computes what depends on constants alone."""
    kept = []
    for node in file.nodes:
        if node.op_type not in EVALUATED or not all(not t or t in file.constants for t in node.input):
            kept.append(node)
            continue
        try:
            results = evaluate(node, [file.constants[t] if t else None for t in node.input], file.opset)
        except Exception as error:  # whatever a malformed node makes numpy and onnx raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise file.error(node, f"cannot be computed: {reason}") from error
        file.constants.update(zip(node.output, results, strict=False))
    file.nodes = kept
    file.forget()


def _decide_branches(file: OnnxFile) -> None:
    """Leaves of every If the branch that it takes, where constants or the shapes of the inputs say which."""
    while nodes := [n for n in file.nodes if n.op_type == "If"]:
        if not any(n.input[0] in file.constants for n in nodes):
            file.constants[nodes[0].input[0]] = _condition(file, nodes[0])
        take_branches(file)
        _fold_constants(file)


SIZES = ("Shape", "Size", "SequenceLength")
"""What they give does not depend on the values of their operand."""


def _condition(file: OnnxFile, node: NodeProto) -> NDArray[Any]:
    """What the first If decides by, computed from shapes. A batch size that is open must not matter."""
    part = replace(file, outputs=[node.input[0]], nodes=[n for n in file.nodes if n.op_type not in SIZES])
    part.forget()
    if not {name for name, _ in file.inputs}.isdisjoint([node.input[0], *(t for n in part.nodes for t in n.input)]):
        raise file.error(node, "its condition is computed from data; export the network without control flow")
    part.nodes = file.nodes
    part.forget()
    network = Writer(part).write()
    values = [_run_without_values(part, network, batch) for batch in ([file.batch] if file.batch else [1, 2])]
    if any(value is None for value in values):
        raise file.error(node, "its condition is known for inputs of one size only; fix all dimensions but the batch")
    if any(bool(value) != bool(values[0]) for value in values):
        raise file.error(node, "its condition depends on the batch size; export the network with a fixed one")
    return np.asarray(values[0])


SEVERAL = ("Split", "TopK", "LSTM", "GRU", "RNN", "LSTMCell")
"""Operations of which more than the first result is given."""


WHOLE: dict[int, tuple[int, int]] = {TensorProto.UINT8: (0, 255), TensorProto.INT8: (-128, 127)}
"""Types of inputs that are read as real numbers, and their range."""

SETTINGS = ("Resize", "Upsample", "OneHot")
"""Operations whose constants say what they do: none is a weight."""


class Writer:
    """Writes the graph. values: by tensor name, for what is computed from the network's inputs."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.graph, self.root = fx.Graph(), nn.Module()
        self.values: dict[str, fx.Node] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.held: dict[str, fx.Node] = {}
        self.arguments: dict[str, str] = {}
        for name, _ in file.inputs:
            self.arguments[name] = _identifier(name, self.arguments.values())
            self.values[name] = self.graph.placeholder(self.arguments[name])

    def write(self) -> fx.GraphModule:
        """The network. Raises UnsupportedModelError that names file, node and operation."""
        for node in self.file.nodes:
            self._node(node)
        missing = [name for name in self.file.outputs if name not in self.values]
        if missing:
            raise UnsupportedModelError(f"{self.file.name}: output {missing[0]!r} does not depend on the inputs")
        results = tuple(self.values[name] for name in self.file.outputs)
        self.graph.output(results[0] if len(results) == 1 else results)
        network = fx.GraphModule(self.root, self.graph).eval()
        network.meta[NAMES] = self.arguments
        network.meta[BYTES] = dict(self._bytes())
        return network

    def _bytes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The arguments that are integers of 8 bits, and their range."""
        for name, argument in self.arguments.items():
            if (ends := WHOLE.get(self.file.types.get(name, 0))) is not None:
                yield argument, ends

    def _node(self, node: NodeProto) -> None:
        file = self.file
        known = [None if not t else file.constants.get(t) for t in node.input]
        data = [self.values.get(t) for t in node.input]
        missing = [t for t in node.input if t and t not in self.values and t not in file.constants]
        if missing:
            raise file.error(node, f"reads {missing[0]!r}, a second result that is not supported")
        if node.domain not in (*DOMAINS, OWN) or node.op_type not in {*ROWS, *LAYERS, *EVALUATED}:
            domain = f"{node.domain}." if node.domain else ""
            supported = ", ".join(sorted({*ROWS, *LAYERS}))
            raise file.error(node, f"{domain}{node.op_type} is not supported; supported are {supported}")
        layer = self._layer(node)
        if layer is not None:
            given = self.graph.call_function(tensor, (data[0],))  # a state may be computed from shapes
            self._result(node, self.graph.call_module(self.place(self._layer_name(node), layer), (given,)))
            return
        args, rest = [], {}
        for i, name in enumerate(node.input):
            value = data[i]
            if value is None and node.op_type not in SETTINGS:
                value = self._parameter_node(name, known[i])
            if value is None:
                rest[i] = known[i]
            else:
                args.append(value)
        step = Step(file.name, node, file.opset, ROWS.get(node.op_type), rest)
        step.batch = file.batch
        self._result(node, self.graph.call_module(self.place(node.name or _first(node), step), tuple(args)))

    def _result(self, node: NodeProto, made: fx.Node) -> None:
        if len(node.output) == 1 or node.op_type not in SEVERAL:
            self.values[node.output[0]] = made
            return
        for i, name in enumerate(node.output):
            if name:
                self.values[name] = self.graph.call_function(_item, (made, i))

    def _layer(self, node: NodeProto) -> nn.Module | None:
        """A module of PyTorch with the node's weights; None where there is none, or the weights are computed."""
        make = LAYERS.get(node.op_type)
        if make is None or node.input[0] not in self.values or any(t in self.values for t in node.input[1:]):
            return None
        try:
            return make(self, node)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise self.file.error(node, f"cannot be read: {error}") from error

    # -- names and parameters ------------------------------------------------------------------------------------------

    def constant(self, node: NodeProto, at: int) -> NDArray[Any] | None:
        """An operand's values, None where the node has none."""
        return self.file.constants[node.input[at]] if at < len(node.input) and node.input[at] else None

    def parameter(self, node: NodeProto, at: int) -> nn.Parameter | None:
        """An operand as a parameter: the same one wherever the file reads the tensor."""
        values = self.constant(node, at)
        if values is None:
            return None
        name = node.input[at]
        if name not in self.parameters:
            self.parameters[name] = nn.Parameter(torch.from_numpy(np.array(values, np.float32)))
        return self.parameters[name]

    def _parameter_node(self, name: str, values: Any) -> fx.Node | None:
        """A constant with several finite values stands in the network under its own name, and can be trained."""
        if values is None or values.dtype != np.float32 or values.size < 2 or not np.isfinite(values).all():
            return None
        if name not in self.held:
            self.held[name] = self.graph.get_attr(
                self.place(name, self.parameters.setdefault(name, nn.Parameter(torch.from_numpy(np.array(values)))))
            )
        return self.held[name]

    def _layer_name(self, node: NodeProto) -> str:
        for name, ending in zip(node.input[1:3], (".weight", ".bias"), strict=False):
            if name.endswith(ending) and name != ending:
                return str(name).removesuffix(ending)
        return node.name or _first(node)

    def place(self, name: str, value: nn.Module | nn.Parameter) -> str:
        """Puts a module or parameter into the network under this name, or the next free one."""
        name = re.sub(r"[\"'\\\n\r\t]", "_", name)
        name = ".".join(f"{p}_" if _reserved(p) else p for p in name.split("."))
        flat, count = name.replace(".", "_"), 0
        while not self._fits(name):
            count += 1
            name = f"{flat}_{count}"
        *path, last = name.split(".")
        owner = self.root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if isinstance(value, nn.Module):
            owner.add_module(last, value)
        else:
            owner.register_parameter(last, value)
        return name

    def _fits(self, name: str) -> bool:
        """Whether the name is free, and no module that computes stands above it."""
        *path, last = name.split(".")
        owner = self.root
        for part in path:
            if not hasattr(owner, part):
                return True
            owner = getattr(owner, part)
            if type(owner) is not nn.Module:
                return False
        return not hasattr(owner, last)


def _item(values: Any, at: int) -> Any:
    return values[at]


def _first(node: NodeProto) -> str:
    return str(next(o for o in node.output if o))


def _reserved(part: str) -> bool:
    taken = hasattr(fx.GraphModule, part) or part in ("training", "graph", "meta", "code")
    return not part or taken or keyword.iskeyword(part)


def _identifier(name: str, taken: Collection[str]) -> str:
    """A name as Python takes it for an argument."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    legal = plain.isidentifier() and not keyword.iskeyword(plain) and plain not in ("self", "torch")
    plain = plain if legal else f"input_{plain}"
    numbered = (f"{plain}_{i}" for i in itertools.count(1))
    return next(n for n in itertools.chain([plain], numbered) if n not in taken)


class _Noting(fx.Interpreter):
    """Runs the network without values: no tensor may be too large, and reshapes note the shapes of a fixed batch."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        result = super().run_node(n)
        step = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.numel() > LARGEST:
                raise UnsupportedModelError(
                    f"{n.target}: makes a tensor of shape {tuple(x.shape)}, more than {LARGEST:,} elements"
                )
        if isinstance(step, Step) and step.node.op_type in ("Reshape", "Flatten") and isinstance(result, Tensor):
            assert isinstance(n.args[0], fx.Node)
            step.fixed = (tuple(self.env[n.args[0]].shape), tuple(result.shape))
        return result


def _run_without_values(file: OnnxFile, network: fx.GraphModule, batch: int) -> Any:
    """The results for a batch, tensors without values; None where the file leaves other sizes open."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = examples(file, batch)
    if inputs is None:
        return None
    with quiet(), torch.no_grad(), mode:
        results = _Noting(network).run(*(mode.from_tensor(x) for x in inputs))
    if file.batch is None:
        for step in network.modules():
            if isinstance(step, Step):
                step.fixed = None
    return results
