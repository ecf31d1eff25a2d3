"""What a random network shows: whether it is proved, and what every executor makes of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pow2quant import compiled, prepare, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.errors import Pow2QuantError
from pow2quant.integer.certificate import certify
from pow2quant.integer.lower import lower
from pow2quant.validation import c99, engine, ort
from tests import random_graphs, random_networks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact

    Arrays = Sequence[NDArray[np.float32]]

KINDS = ("modules", "graphs")
"""PyTorch networks, prepared, calibrated and exported; and artifacts."""


@dataclass
class Outcome:
    """Of one network.

    operations: ONNX types in it. proved: of the artifact, or of the file as it is read back. differing: elements by
    executor, against the first one. refused: what a clear error says, where nothing could be compared. failed: by
    executor, what went wrong: an executor that cannot run a file, or a traceback. model, inputs: what was run.
    """

    kind: str
    number: int
    operations: tuple[str, ...] = ()
    proved: bool = False
    differing: dict[str, int] = field(default_factory=dict)
    refused: str = ""
    failed: dict[str, str] = field(default_factory=dict)
    model: bytes = b""
    inputs: tuple[NDArray[np.float32], ...] = ()

    @property
    def differs(self) -> bool:
        """Whether any executor gives another value."""
        return any(self.differing.values())

    @property
    def wrong(self) -> bool:
        """Whether a claim is false: it is proved, and an executor differs or cannot run it; or something crashed."""
        return bool(self.proved and (self.differs or self.failed)) or any(
            "Traceback" in t for t in self.failed.values()
        )


def check(kind: str, seed: int, number: int, widths: Sequence[int], in_c: bool = False) -> Outcome:
    """Makes network `number` of a seed and runs it everywhere. kind: of KINDS. in_c: as C too, which is compiled."""
    rng = np.random.default_rng([KINDS.index(kind), seed, number])
    outcome = Outcome(kind, number)
    try:
        artifact, inputs, expected = (_modules if kind == "modules" else _graphs)(rng, widths)
        _run(outcome, artifact, inputs, expected, in_c)
    except Pow2QuantError as error:
        outcome.refused = f"{type(error).__name__}: {error}"
    except Exception:  # whatever else goes wrong is what a fuzzer is for
        outcome.failed["pow2quant"] = traceback.format_exc()
    return outcome


def _modules(rng: np.random.Generator, widths: Sequence[int]) -> tuple[Artifact, Arrays, Arrays]:
    case = random_networks.case(rng)
    network = prepare(case.network, case.batch)
    names = [str(node.target) for node in network.graph.nodes if node.op == "call_module"]
    sim = simulate(network, case.batch, random_networks.plan(rng, widths, names))
    sim.calibrate([case.batch])
    if rng.random() < 0.5:
        random_networks.load(sim, random_networks.forced(rng, sim.encodings()))
    inputs = [np.concatenate([x.numpy(), 3 * x.numpy()]) for x in case.batch]
    with torch.no_grad():
        found: Any = sim.model(*map(torch.from_numpy, inputs))
    results = found if isinstance(found, (tuple, list)) else [found]
    return sim.export(case.batch), inputs, [r.numpy() for r in results]


def _graphs(rng: np.random.Generator, widths: Sequence[int]) -> tuple[Artifact, Arrays, None]:
    artifact = random_graphs.artifact(rng, widths)
    return artifact, next(ort.random_batches(onnx_qdq.to_qdq(artifact), 16, int(rng.integers(2**31)))), None


def _run(outcome: Outcome, artifact: Artifact, inputs: Arrays, expected: Arrays | None, in_c: bool) -> None:
    outcome.operations = tuple(sorted({node.op_type for node in artifact.model.graph.node}))
    model = onnx_qdq.to_qdq(artifact)
    outcome.model, outcome.inputs = model.SerializeToString(), tuple(inputs)
    read = onnx_qdq.from_qdq(model)
    outcome.proved = certify(artifact).proved or certify(read).proved
    runners: dict[str, Callable[[Arrays], Arrays]] = {
        ort.PLAIN: ort.plain(model).run,
        ort.OPTIMIZED: ort.optimized(model).run,
    }
    try:
        program = lower(read)
    except Pow2QuantError:
        pass  # a network with float tensors has no integers
    else:
        runners[engine.NAME] = engine.executor(program).run
        if in_c and compiled.compiler():
            runners[c99.NAME] = c99.executor(program).run
    for name, run in runners.items():
        try:
            results = run(inputs)
        except Pow2QuantError as error:
            outcome.failed[name] = str(error)
            continue
        expected = results if expected is None else expected
        outcome.differing[name] = _differing(expected, results)


def _differing(expected: Arrays, got: Arrays) -> int:
    """Elements that differ; NaN equals NaN here, since both then compute the same."""
    count = 0
    for a, b in zip(expected, got, strict=True):
        count += a.size if a.shape != b.shape else int((~((a == b) | (np.isnan(a) & np.isnan(b)))).sum())
    return count
