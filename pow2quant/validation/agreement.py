"""Runs executors on the same inputs, counts the elements that differ, and finds where they part and why.

Values are compared, not their representation: -0.0 equals 0.0, and NaN differs from everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from pow2quant.adapters.onnx_qdq.batch import fixed_batch
from pow2quant.artifact import Agreement, Divergence
from pow2quant.errors import DataError
from pow2quant.integer.certificate import certify
from pow2quant.pow2_constraints import Encoding, IntGrid
from pow2quant.validation import networks
from pow2quant.validation.causes import explain
from pow2quant.validation.exact import Witness
from pow2quant.validation.networks import Named
from pow2quant.validation.optimizers import sentence

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact
    from pow2quant.integer.certificate import Certificate

    Arrays = Sequence[NDArray[np.float32]]

SUSPECTS = 4
"""So many differing samples are run again to find the first tensor that differs."""


@dataclass(frozen=True)
class Executor:
    """Something that runs a quantized network.

    run: graph inputs -> graph outputs, real values in float32; the first dimension is the batch.
    tensors: graph inputs -> the real (dequantized) values of every quantized activation, graph inputs included, by its
        ONNX name in the float model.
    most: it runs at most so many samples (None: all), and is compared on these.
    work: multiply-accumulates of one sample where that takes long, for the code that sets `most`; 0 elsewhere.
    network: what its own file holds, where it has one; None: the artifact that is validated.
    unfused: the same file without graph optimizations, where it has some. optimizers: then, for graph inputs and what
        `unfused` gives for them, the names of the optimizers without which `run` gives the same; none where no list of
        names does.
    integers: it computes on integers, or as exactly, also where float32 does not hold the sums.
    measured: its arithmetic is known by measurement alone, so that agreement with it is observed, never proved.
    """

    name: str
    run: Callable[[Arrays], Arrays]
    tensors: Callable[[Arrays], Mapping[str, NDArray[np.float32]]]
    most: int | None = None
    work: int = 0
    network: Callable[[], Artifact] | None = None
    unfused: Executor | None = None
    optimizers: Callable[[Arrays, Arrays], Sequence[str]] | None = None
    integers: bool = False
    measured: bool = False


def compare(
    reference: Executor,
    others: Sequence[Executor],
    batches: Iterable[Arrays],
    artifact: Artifact,
    *,
    proof: Certificate | bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> list[Agreement]:
    """Compares every output element of `others` with the reference's, batch by batch.

    batches: graph inputs, each (N, …); only one batch is held. proof: `certify(artifact)`, or whether it proves that
    all executors agree. on_batch: called after each batch with the number of samples done so far.
    max_lsb counts in units of the output's scale, for an output of integers in units of 1, for one without encoding in
    float32 ulps of the larger value;
    it is infinite where NaN is involved. top1_agreement is that of the first output's last axis.
    The reference runs once per batch; where something differs, `SUSPECTS` samples are run again through `tensors`.
    Raises DataError when there is no batch, or the executors' outputs have different shapes.
    """
    encodings = [_unit(artifact, value) for value in artifact.model.graph.output]
    fixed = fixed_batch(artifact.model) is not None
    tallies = [_Tally(reference, other, encodings, fixed) for other in others]
    samples = 0
    for batch in batches:
        expected = reference.run(batch)
        for tally in tallies:
            tally.add(batch, expected)
        samples += len(batch[0])
        if on_batch:
            on_batch(samples)
    if not samples:
        raise DataError("no inputs to compare the executors on")
    return [tally.verdict(artifact, proof) for tally in tallies]


def _unit(artifact: Artifact, output: onnx.ValueInfoProto) -> Encoding | None:
    """In which units differences of an output are counted."""
    if output.type.tensor_type.elem_type in (TensorProto.INT64, TensorProto.INT32):
        return Encoding(np.ones((), np.float32), np.zeros((), np.int64), IntGrid(32, True))
    return artifact.encodings.get(output.name)


@dataclass
class _Tally:
    """Running counts of one comparison, and the first samples that differ.

    fixed: results may depend on a sample's place in its batch, so that only whole batches are run again.
    """

    reference: Executor
    other: Executor
    encodings: list[Encoding | None]
    fixed: bool
    samples: int = 0
    elements: int = 0
    differing: int = 0
    max_lsb: float = 0.0
    rows: int = 0
    same_top1: int = 0
    suspects: list[list[NDArray[np.float32]]] = field(default_factory=list)

    def add(self, batch: Arrays, expected: Arrays) -> None:
        """Runs one batch, or what the executor's limit leaves of it, and counts."""
        size = len(batch[0])
        count = size if self.other.most is None else min(size, self.other.most - self.samples)
        if count <= 0:
            return
        if count < size:
            batch, expected = ([x[:count] for x in arrays] for arrays in (batch, expected))
        got = self.other.run(batch)
        self.samples += count
        if [x.shape for x in expected] != [x.shape for x in got]:
            shapes = f"{[x.shape for x in got]} instead of {[x.shape for x in expected]}"
            raise DataError(f"{self.other.name}: outputs of shape {shapes} from {self.reference.name}")
        differing = np.zeros(len(batch[0]), bool)
        for a, b, encoding in zip(expected, got, self.encodings, strict=True):
            wrong = a != b
            self.elements += wrong.size
            self.differing += int(wrong.sum())
            self.max_lsb = max(self.max_lsb, _largest_difference(a, b, encoding))
            if wrong.any():
                per_sample = wrong.shape[:1] == differing.shape and not self._whole(batch)
                differing |= wrong.reshape(len(differing), -1).any(1) if per_sample else True
        first, second = (np.atleast_1d(outputs[0]).argmax(-1) for outputs in (expected, got))
        self.rows += first.size
        self.same_top1 += int((first == second).sum())
        if self._whole(batch):
            self.suspects = self.suspects or [list(batch)] * bool(differing.any())
            return
        for sample in np.flatnonzero(differing)[: SUSPECTS - len(self.suspects)]:
            self.suspects.append([x[sample : sample + 1] for x in batch])

    def _whole(self, batch: Arrays) -> bool:
        """Whether a sample cannot be run alone."""
        return self.fixed or any(len(x) != len(batch[0]) for x in batch)

    def verdict(self, artifact: Artifact, proof: Certificate | bool) -> Agreement:
        """What the counts amount to."""
        notes: list[str] = []
        rewritten = self._rewritten() if self.differing else None
        divergence = self._divergence(artifact, notes, rewritten) if self.differing else None
        integers = self.reference.integers and self.other.integers
        proved = proof if isinstance(proof, bool) else proof.proved or (integers and proof.proved_integers)
        proved = proved and not (self.reference.measured or self.other.measured)
        proved = proved and self._is_certified(artifact, notes)
        if self.differing and proved and rewritten:
            notes += [rewritten] if divergence is None or divergence.cause != rewritten else []
        elif self.differing and proved:
            notes.append("the certificate proves that nothing can differ: an executor or the certificate is wrong")
        return Agreement(
            executor=self.other.name,
            against=self.reference.name,
            elements=self.elements,
            differing=self.differing,
            max_lsb=self.max_lsb,
            top1_agreement=100 * self.same_top1 / max(1, self.rows),
            first_diverging=divergence,
            claim="differs" if self.differing else "proved" if proved else f"observed on {self.samples} inputs",
            notes=tuple(notes),
        )

    def _is_certified(self, artifact: Artifact, notes: list[str]) -> bool:
        """Whether both executors' own files hold the network that the proof is about."""
        for executor in (self.reference, self.other):
            if executor.network is not None:
                certified, own = Named("the certified network", artifact), Named(executor.name, executor.network())
                if found := networks.first_difference(certified, own):
                    notes.append(f"the file of {executor.name} holds another network: {found}")
                    return False
        return True

    def _suspects(self) -> list[NDArray[np.float32]]:
        return [np.concatenate(parts) for parts in zip(*self.suspects, strict=True)]

    def _rewritten(self) -> str | None:
        """Which optimizers change the values of the executor's file; None where it differs without them too."""
        unfused, batch = self.other.unfused, self._suspects()
        if unfused is None:
            return None
        expected, plain, got = (executor.run(batch) for executor in (self.reference, unfused, self.other))
        if not _same(expected, plain) or _same(plain, got):
            return None
        return sentence(self.other.name, self.other.optimizers(batch, plain) if self.other.optimizers else ())

    def _divergence(self, artifact: Artifact, notes: list[str], rewritten: str | None) -> Divergence | None:
        batch = self._suspects()
        names = [value.name for value in artifact.model.graph.output]
        results = [dict(zip(names, executor.run(batch), strict=True)) for executor in (self.reference, self.other)]
        expected, got = (
            {**found, **executor.tensors(batch)}
            for found, executor in zip(results, (self.reference, self.other), strict=True)
        )
        alike = {name: x for name, x in got.items() if name in expected and x.size == expected[name].size}
        got = {name: x.reshape(expected[name].shape) for name, x in alike.items()}  # some join the batch to a dimension
        tensor = first_difference(artifact, expected, got)
        if tensor is None and rewritten:  # where tensors between are asked for, an optimizer may keep its hands off
            expected, got = results
            tensor = first_difference(artifact, expected, got)
        if tensor is None:
            notes.append(f"no tensor differs when {len(self.suspects)} of the differing samples are run again")
            return None
        producers = {name: node for node in artifact.model.graph.node for name in node.output}
        node = producers[tensor].name or producers[tensor].op_type if tensor in producers else ""
        a, b = expected[tensor], got[tensor]
        wrong, lsb = a != b, _largest_difference(a, b, artifact.encodings.get(tensor))
        raw = dict(zip((i.name for i in _inputs(artifact.model.graph)), batch, strict=False))
        known = {**raw, **{name: expected[name] for name in expected.keys() & got if name != tensor}}
        first, second = (
            _witness(executor, tensor, values, batch, artifact)
            for executor, values in ((self.reference, a), (self.other, b))
        )
        found = explain(tensor, first, second, known)
        if found.account and not rewritten:
            notes.append(found.account)
        cause = found.cause or rewritten or likely_cause(artifact, tensor)
        if found.cause and tensor not in producers:
            cause = f"the graph input is quantized differently: {found.cause}"
        return Divergence(tensor, node, wrong.size, int(wrong.sum()), lsb, cause)


def _same(first: Arrays, second: Arrays) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def _witness(
    executor: Executor, tensor: str, values: NDArray[np.float32], batch: Arrays, artifact: Artifact
) -> Witness:
    def unfused() -> NDArray[np.float32] | None:
        return None if executor.unfused is None else executor.unfused.tensors(batch).get(tensor)

    return Witness(executor.name, executor.network() if executor.network else artifact, values, unfused)


def _inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    parameters = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in parameters]


def first_difference(
    artifact: Artifact, expected: Mapping[str, NDArray[np.float32]], got: Mapping[str, NDArray[np.float32]]
) -> str | None:
    """The first tensor, in the graph's order, whose values in both mappings differ; None when none does."""
    graph = artifact.model.graph
    order = [*(value.name for value in graph.input), *(name for node in graph.node for name in node.output)]
    compared = (name for name in order if name in expected and name in got)
    return next((name for name in compared if (expected[name] != got[name]).any()), None)


def likely_cause(artifact: Artifact, tensor: str) -> str | None:
    """Why executors may part at this tensor although they agree on all before it; None when nothing speaks for it."""
    nodes = _between(artifact, tensor)
    if not nodes:
        return "the graph input is quantized differently"
    bounds = {bound.tensor: bound for bound in certify(artifact).layers}
    for node in nodes:
        bound = bounds.get(node.output[0])
        if bound is not None and not bound.proved:
            return bound.reason
    return None


def _between(artifact: Artifact, tensor: str) -> list[onnx.NodeProto]:
    """The nodes between a tensor and the nearest encoded ones before it, in the graph's order."""
    nodes: list[onnx.NodeProto] = []
    wanted = {tensor}
    for node in reversed(artifact.model.graph.node):
        if wanted.intersection(node.output):
            nodes.insert(0, node)
            wanted |= {name for name in node.input if name not in artifact.encodings}
    return nodes


def _largest_difference(a: NDArray[np.float32], b: NDArray[np.float32], encoding: Encoding | None) -> float:
    """In units of the encoding's scale; without encoding in ulps of the larger value; infinite with NaN."""
    if not a.size or np.array_equal(a, b):
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.abs(a.astype(np.float64) - b)
        if encoding is None:
            larger = np.maximum(np.abs(a), np.abs(b)).astype(np.float32)
            unit = np.spacing(larger).astype(np.float64)
        else:
            unit = encoding.along(encoding.scale, a.shape).astype(np.float64)
        steps = np.where(a == b, 0, difference / unit)
    largest = float(steps.max())
    return largest if math.isfinite(largest) else math.inf
