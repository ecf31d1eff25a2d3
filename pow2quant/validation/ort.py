"""onnxruntime on the CPU as an executor: with all optimizations and with none, from files as they lie on disk."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from pow2quant.adapters import aimet_encodings, onnx_qdq
from pow2quant.adapters.onnx_qdq.batch import fixed_batch
from pow2quant.adapters.onnx_qdq.integer_ends import INTEGERS
from pow2quant.errors import DataError, FileFormatError
from pow2quant.graphs import GraphIndex
from pow2quant.validation.agreement import Executor
from pow2quant.validation.files import QdqFile, opened
from pow2quant.validation.optimizers import culprits

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact, Table
    from pow2quant.pow2_constraints import Encoding
    from pow2quant.validation.agreement import Arrays

Source = Path | bytes | onnx.ModelProto | QdqFile
"""Where a QDQ model comes from."""

DTYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}
"""What a graph input is converted to, by onnxruntime's name of its type; others are fed as they come."""

CODES: dict[str, Any] = {f"tensor({t})": t for t in ("uint8", "int8", "uint16", "int16")}
"""Types of graph inputs and outputs that hold codes, where they have an encoding."""

QUICK_GELU_IN_DOUBLE = (1, 24)
"""Before it, all optimizations turn a SiLU in double into QuickGelu, which has no kernel for double (seen in 1.23)."""

MANY_NODES = 4000
"""From where on onnxruntime does not look for buffers to use again: its search grows with the square of the nodes.

An LSTM of 48 steps, 3,594 nodes, takes 7.4 s to open with it and 0.35 s without (onnxruntime 1.31, AMD EPYC).
"""

BATCH = 32
"""Samples in a batch of random inputs."""


PLAIN, OPTIMIZED = "onnxruntime, no optimization", "onnxruntime, all optimizations"
"""The names of the two ways to run a file."""


def plain(source: Source, name: str = PLAIN) -> Executor:
    """Every node of the file by its own kernel."""
    return _Runtime(_file(source), name, optimized=False).executor()


def optimized(source: Source, name: str = OPTIMIZED) -> Executor:
    """With all graph optimizations: DQ -> Conv -> Q becomes an integer convolution, and so on."""
    return _Runtime(_file(source), name, optimized=True).executor()


def executors(model: Path, pair: tuple[Path, Path] | None = None) -> list[Executor]:
    """Every executor of a run's folder.

    model: the QDQ file. pair: `model_float.onnx` and `model.encodings`, rebuilt into QDQ; where that is the QDQ file
    again, byte for byte, the pair's executors take the results of the file's. Files are read when the first
    batch runs; then a file that onnxruntime or we cannot read raises FileFormatError.
    """
    file = opened(model)
    runtimes = [_Runtime(file, PLAIN, optimized=False), _Runtime(file, OPTIMIZED, optimized=True)]
    if pair is not None:
        rebuilt, origin = QdqFile(partial(_rebuilt, *pair)), f"from {pair[0].name} + {pair[1].name}"
        runtimes += [_Runtime(rebuilt, f"{r.name}, {origin}", r.optimized, r) for r in runtimes]
    return [r.executor() for r in runtimes]


def inspect(source: Source) -> list[tuple[str, float]]:
    """The tensors whose scale in a QDQ file is no power of two, each with the first such scale."""
    table = _file(source).network.encodings
    free = ((name, np.atleast_1d(encoding.scale)) for name, encoding in table.items() if not encoding.is_power_of_two)
    return [(name, float(scale[np.frexp(scale)[0] != 0.5][0])) for name, scale in free]


def random_batches(source: Source, count: int, seed: int = 0) -> Iterator[list[NDArray[np.float32]]]:
    """Random inputs for a bare QDQ file: `count` samples in batches of at most `BATCH`.

    (Where a result depends on a sample's place in its batch, in batches of the file's size.)

    A third of the values lies on the input's grid, a third exactly halfway between two codes, the rest anywhere; all
    reach an eighth of the range beyond saturation. Samples have different amplitudes, so that deeper layers are not all
    saturated or all silent. An input without encoding gets a normal distribution.
    Indices lie in the table that is read by them.
    Raises DataError when an input is neither float32 nor an index, or has a free dimension besides the first.
    """
    network = _file(source).network
    graph, table = network.model.graph, network.encodings
    index = GraphIndex(graph)
    rows = {value.name: _indexed_rows(index, value.name) for value in _inputs(graph)}
    shapes = {value.name: _input_shape(value, rows[value.name]) for value in _inputs(graph)}
    fixed = next((shape[0] for shape in shapes.values() if shape[0] is not None), None)
    rng = np.random.default_rng(seed)
    for start in range(0, count, fixed or BATCH):
        n = fixed or min(BATCH, count - start)
        yield [_random(rng, (shape[0] or n, *shape[1:]), table.get(name), rows[name]) for name, shape in shapes.items()]


def _indexed_rows(index: GraphIndex, name: str) -> int:
    """How many rows a table has that an input selects from; 0 where it selects from none."""
    for node in index.readers.get(name, []):
        if node.op_type == "Gather" and node.input[1] == name and node.input[0] in index.constants:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            return int(index.constants[node.input[0]].shape[axis])
    return 0


def _random(
    rng: np.random.Generator, shape: tuple[int, ...], encoding: Encoding | None, rows: int
) -> NDArray[np.float32]:
    """One input: indices of `rows` rows where there are some; values around the encoding's range otherwise."""
    if rows:
        return rng.integers(0, rows, shape).astype(np.float32)
    per_sample = (shape[0], *[1] * (len(shape) - 1))
    if encoding is None:
        return rng.standard_normal(shape, np.float32)
    low, high = (int(np.max(np.abs(q - encoding.zero_point))) for q in (encoding.grid.qmin, encoding.grid.qmax))
    margin = (low + high) / 8
    amplitude = np.ldexp(1.0, -rng.integers(0, 5, per_sample))
    codes = rng.uniform(-low - margin, high + margin, shape) * amplitude
    kind = rng.integers(0, 3, shape)
    codes = np.select([kind == 0, kind == 1], [np.rint(codes), np.floor(codes) + 0.5], codes)
    return np.asarray(codes * encoding.along(encoding.scale, shape), np.float32)


def _rebuilt(model: Path, encodings: Path) -> onnx.ModelProto:
    network = onnx_qdq.load(model)
    table = aimet_encodings.load(encodings, aimet_encodings.channel_axes(network))
    return onnx_qdq.to_qdq(aimet_encodings.apply(network, table))


def _file(source: Source) -> QdqFile:
    if isinstance(source, Path):
        return opened(source)
    if isinstance(source, bytes):
        return QdqFile(partial(_parsed, source))
    return QdqFile(lambda: source) if isinstance(source, onnx.ModelProto) else source


def _parsed(content: bytes) -> onnx.ModelProto:
    try:
        return onnx.load_from_string(content)
    except Exception as error:  # protobuf's DecodeError has no stable place
        raise FileFormatError(f"not a valid ONNX model: {_first_line(error)}") from error


def _inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    parameters = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in parameters]


def _input_shape(value: onnx.ValueInfoProto, rows: int) -> tuple[Any, ...]:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    if tensor.elem_type != onnx.TensorProto.FLOAT and not rows:
        raise DataError(f"input {value.name}: no random values for {onnx.TensorProto.DataType.Name(tensor.elem_type)}")
    if not shape or None in shape[1:]:
        raise DataError(f"input {value.name}: only the first dimension may be free, the shape is {shape}")
    return shape


class _Runtime:
    """The sessions of one model, made when they are first needed.

    twin: another one, in the same way; its results count where its file is the same to the byte. last: the batch that
    ran last, and its results.
    """

    def __init__(self, file: QdqFile, name: str, optimized: bool, twin: _Runtime | None = None) -> None:
        self.file, self.name, self.optimized, self.twin = file, name, optimized, twin
        self.last: tuple[list[NDArray[Any]], list[NDArray[np.float32]]] = ([], [])

    def executor(self) -> Executor:
        """As what is compared."""
        unfused = _Runtime(self.file, PLAIN, optimized=False).executor() if self.optimized else None
        optimizers = self.optimizers if self.optimized else None
        return Executor(self.name, self.run, self.tensors, network=self.network, unfused=unfused, optimizers=optimizers)

    def run(self, batch: Arrays) -> list[NDArray[np.float32]]:
        """Graph inputs -> graph outputs."""
        if self._repeats is not None:
            return self._repeats.again(batch)
        found = self._real(self._feed(self._session, batch, None))
        self.last = ([x.copy() for x in batch], found)
        return found

    def again(self, batch: Arrays) -> list[NDArray[np.float32]]:
        """What `run` gives, without running where it ran last on the same values."""
        same = len(batch) == len(self.last[0]) and all(map(np.array_equal, batch, self.last[0]))
        return self.last[1] if same else self.run(batch)

    @cached_property
    def _repeats(self) -> _Runtime | None:
        """The twin, if it runs the same bytes."""
        return self.twin if self.twin is not None and self.twin.file.same_as(self.file) else None

    def tensors(self, batch: Arrays) -> dict[str, NDArray[np.float32]]:
        """Graph inputs -> every quantized activation, dequantized from its codes."""
        session, names, encodings = self._exposed
        codes = self._feed(session, batch, list(names)) if names else []  # no names would mean all outputs
        found = {name: encodings[name].dequantize(q) for name, q in zip(names.values(), codes, strict=True)}
        inputs = zip(self._session.get_inputs(), batch, strict=True)
        taken = {i.name: encodings[i.name].fake_quantize(x) for i, x in inputs if _holds_codes(i, encodings)}
        return taken | found

    def network(self) -> Artifact:
        """What the file holds."""
        return self.file.network

    def optimizers(self, batch: Arrays, expected: Arrays) -> list[str]:
        """The optimizers without which the file gives the expected outputs."""

        def same(names: Sequence[str]) -> bool:
            found = self._real(self._feed(self._opened(disabled=names), batch, None))
            return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))

        return culprits(same)

    def _real(self, outputs: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Outputs as real values: codes dequantized."""
        kinds = self._session.get_outputs()
        table = self.file.network.encodings if any(o.type in CODES for o in kinds) else {}
        return [
            table[o.name].dequantize(x) if _holds_codes(o, table) else np.asarray(x, np.float32)
            for o, x in zip(kinds, outputs, strict=True)
        ]

    @cached_property
    def _session(self) -> Any:
        return self._opened()

    def _opened(self, disabled: Sequence[str] = ()) -> Any:
        path = self.file.path
        return self._open(self.file.model.SerializeToString() if path is None else str(path), disabled)

    @cached_property
    def _exposed(self) -> tuple[Any, dict[str, str], Table]:
        """A session that returns all codes, the tensors' names by the codes' names, and the tensors' encodings.

        The codes become graph outputs, the floats around them do not: so the optimizer fuses DQ -> node -> Q as before.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.file.model)
        table = self.file.network.encodings
        names = codes_of(model.graph, table)
        given = {value.name for value in model.graph.output}
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in given)
        return self._open(model.SerializeToString()), names, table

    def _open(self, model: str | bytes, disabled: Sequence[str] = ()) -> Any:
        from onnxruntime import InferenceSession

        how = {"disabled_optimizers": list(disabled)} if disabled else {}
        chosen = options(optimized=self.optimized)
        chosen.enable_mem_reuse = len(self.file.model.graph.node) <= MANY_NODES
        try:
            return InferenceSession(model, chosen, ["CPUExecutionProvider"], **how)
        except Exception as error:  # onnxruntime's errors share no base but Exception
            raise FileFormatError(f"{self._where}: onnxruntime cannot load the model: {_first_line(error)}") from error

    def _feed(self, session: Any, batch: Arrays, outputs: list[str] | None) -> list[NDArray[Any]]:
        inputs = session.get_inputs()
        if len(inputs) != len(batch):
            raise DataError(f"{self._where}: {len(inputs)} inputs are needed, {len(batch)} were given")
        feed = {i.name: self._fed(i, x) for i, x in zip(inputs, batch, strict=True)}
        fixed = {i.shape[0] for i in inputs if i.shape and isinstance(i.shape[0], int)}
        try:
            if len(fixed) == 1 and fixed != {len(batch[0])} and fixed_batch(self.file.network.model) is None:
                return _in_batches(partial(session.run, outputs), feed, *fixed)
            return list(session.run(outputs, feed))
        except Exception as error:
            raise DataError(f"{self._where}: onnxruntime cannot run the model: {_first_line(error)}") from error

    def _fed(self, value: Any, x: NDArray[Any]) -> NDArray[Any]:
        """What a graph input is given for real values."""
        if value.type in CODES and _holds_codes(value, self.file.network.encodings):
            return self.file.network.encodings[value.name].quantize(x, value.name).astype(CODES[value.type])
        return np.ascontiguousarray(x, DTYPES.get(value.type))

    @property
    def _where(self) -> str:
        return self.name if self.file.path is None else str(self.file.path)


def options(*, optimized: bool) -> onnxruntime.SessionOptions:
    """How every session is run: deterministic, silent, one thread per usable core, and exact without VNNI."""
    import onnxruntime

    session = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    session.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    session.intra_op_num_threads = int(asked) if asked.isdigit() and int(asked) else _usable_cores()
    session.inter_op_num_threads = 1
    session.enable_mem_reuse = False  # planning it takes time with the square of the nodes: minutes for a long LSTM
    session.log_severity_level = 4
    session.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < QUICK_GELU_IN_DOUBLE:
        session.add_session_config_entry("optimization.disable_specified_optimizers", "QuickGeluFusion")
    if lacks_vnni():
        session.add_session_config_entry("session.x64quantprecision", "1")
    return session


def lacks_vnni(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> bool:
    """Whether this is an x86 processor without VNNI instructions, or one of which that is not known.

    There onnxruntime's u8s8 kernels add pairs of products in 16 bits, which saturate (VPMADDUBSW).
    """
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64", "x86", "i386", "i686"):
        return False
    try:
        flags = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return True
    return not flags & {"avx512_vnni", "avx_vnni"}


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _holds_codes(value: Any, table: Table) -> bool:
    """Whether a graph input or output, as onnxruntime describes it, takes or gives codes of an encoded tensor."""
    return value.type in CODES and value.name in table


def _in_batches(
    run: Callable[[dict[str, NDArray[Any]]], Sequence[NDArray[Any]]], feed: dict[str, NDArray[Any]], size: int
) -> list[NDArray[Any]]:
    """Runs samples in batches of the one size that a file takes; the last one is filled up with its last sample."""
    count = max(len(x) for x in feed.values())
    parts = []
    for start in range(0, count, size):
        places = np.minimum(np.arange(start, start + size), count - 1)
        parts.append(run({name: x[places] for name, x in feed.items()}))
    joined = [np.concatenate([np.atleast_1d(x) for x in outputs]) for outputs in zip(*parts, strict=True)]
    return [x[: len(x) * count // (len(parts) * size)] for x in joined]


def codes_of(graph: onnx.GraphProto, table: Table) -> dict[str, str]:
    """The float model's tensor names by the names of the codes that a DQ reads, in the order of computation.

    The table names a tensor by what a DQ writes, by what its Q reads, or by what a Clip between or before them reads.
    """
    constants = {tensor.name for tensor in graph.initializer}
    inputs = {value.name for value in graph.input}
    producers = {name: node for node in graph.node for name in node.output}
    found: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        codes = node.input[0]
        behind, names = codes, [*node.output]
        while behind in producers and producers[behind].op_type in ("Clip", "QuantizeLinear"):
            behind = producers[behind].input[0]
            names.append(behind)
        known = next((name for name in names if name in table), None)
        if known is not None and behind not in constants and codes not in inputs:
            found.setdefault(codes, known)
    ends = [v.name for v in graph.output if v.type.tensor_type.elem_type in INTEGERS and v.name in table]
    return found | {name: name for name in ends if name not in inputs}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
