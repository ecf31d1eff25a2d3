"""Log2-quantized attention: its integers in every executor, where it applies, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pow2quant import QuantPlan, prepare, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.errors import ConfigError
from pow2quant.functions import Softmax
from pow2quant.integer.certificate import certify
from pow2quant.integer.lower import lower
from pow2quant.methods.log2_attention import Log2Attention, attentions
from pow2quant.runs.executors import simulation_executor
from pow2quant.validation import c99, ort
from tests.backends import BACKENDS
from tests.test_functions import CAUSAL, agreed_codes, softmax_network


class Attention(nn.Module):
    """(N, 6, 8) -> (N, 6, 8), with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(6), is_causal=True)


def powers_of(codes: list[int], kept: list[bool], defined: Softmax, k: int) -> list[int]:
    """One row in Python's integers, in units of 2^(1 - levels)."""
    largest = max(q for q, keep in zip(codes, kept, strict=True) if keep)
    entries = [
        round(math.ldexp(math.exp(-math.ldexp(defined.factor, k) * (largest - q)), defined.table_bits)) if keep else 0
        for q, keep in zip(codes, kept, strict=True)
    ]
    total, last = sum(entries), defined.levels - 1
    downs = [next((a for a in range(last + 1) if 3 * e << a > 2 * total), None) for e in entries]
    return [0 if a is None else 1 << (last - a) for a in downs]


@pytest.mark.parametrize(("levels", "bits"), [(3, 8), (7, 8), (15, 8), (15, 16)])
@pytest.mark.parametrize("keep", [None, CAUSAL], ids=["all", "causal"])
def test_powers_are_those_of_the_definition_everywhere(levels: int, bits: int, keep: np.ndarray | None) -> None:
    k = -4 if bits == 8 else -12
    defined = Softmax.of(-1, 6, levels, 0.99, keep, levels=levels)
    assert defined is not None
    artifact = softmax_network(k, bits, 1 - levels, defined, (2, 6, 6), levels)
    assert certify(artifact).proved
    codes = np.random.default_rng(levels).integers(0, 2**bits, (60, 2, 6, 6))
    codes[:6] = np.where(np.eye(6, dtype=bool), 2**bits - 1, 0)
    found = agreed_codes(artifact, codes.astype(np.uint8 if bits == 8 else np.uint16))
    kept = np.broadcast_to(True if keep is None else keep, codes.shape).reshape(-1, 6).tolist()
    rows = zip(codes.reshape(-1, 6).tolist(), kept, strict=True)
    assert np.array_equal(found.reshape(-1, 6), [powers_of(q, own, defined, k) for q, own in rows])
    assert len(np.unique(found)) == levels + 1


def test_it_is_read_back_from_the_file() -> None:
    defined = Softmax.of(-1, 6, 7, levels=7)
    assert defined is not None
    artifact = softmax_network(-4, 8, -6, defined, (6,), 7)
    back = onnx_qdq.from_qdq(onnx_qdq.to_qdq(artifact))
    assert list(back.model.graph.node) == list(artifact.model.graph.node)
    assert certify(back).proved
    assert not certify(softmax_network(-4, 8, -6, replace(defined, levels=40), (6,))).proved


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [3, 4])
def test_every_executor_computes_the_same_attention(bits: int, backend: str, tmp_path: object) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(32, 6, 8) for _ in range(2)]
    model = Attention().eval()
    network = prepare(model, batches[0])
    before = network(batches[0])
    network = Log2Attention(bits).rewrite(network, batches)
    assert len(attentions(network)) == 1
    assert torch.equal(network(batches[0]), before), "in float it is the network that it was"
    sim = simulate(network, batches[0], QuantPlan.default(), backend)
    sim.calibrate(batches)
    (name,) = [n for n, s in sim.placement.specs.items() if s.bits == 2**bits - 1]
    assert int(sim.encodings()[name].exponent) == 2 - 2**bits
    artifact = sim.export(batches[0])
    assert certify(artifact).proved, certify(artifact).sentence
    x = torch.randn(200, 6, 8).numpy()
    expected = simulation_executor(sim.simulation, backend, torch.device("cpu")).run([x])[0]
    program = lower(artifact)
    path = onnx_qdq.export_qdq(artifact, tmp_path)  # type: ignore[arg-type]
    for executor in (*ort.executors(path), c99.executor(program)):
        assert np.array_equal(executor.run([x])[0], expected), executor.name


def test_what_is_no_integer_softmax_is_refused() -> None:
    batch = torch.randn(4, 6, 8)
    network = Log2Attention().rewrite(prepare(Attention().eval(), batch), [batch])
    for plan in (replace(QuantPlan.default(), functions="plain"), replace(QuantPlan.default(), output=None)):
        with pytest.raises(ConfigError, match=r"powers of two \(log2_attention\), but it is no integer softmax"):
            simulate(network, batch, plan)


def test_a_softmax_that_is_no_attention_stays() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1), nn.Linear(4, 4)).eval()
    assert not attentions(prepare(model, torch.randn(2, 8)))
