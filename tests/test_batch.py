"""Networks that move the batch, or join it with another dimension, in integers; and graphs that mix samples."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pow2quant.adapters import onnx_qdq
from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.prepare import prepare
from pow2quant.integer.lower import lower
from pow2quant.validation import engine, ort
from tests.prepared import outcome
from tests.quantized_graphs import Graph, encoding

A = encoding(-4, 128)


class Attention(nn.Module):
    """PyTorch's own multi-head attention, which puts the batch second inside."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.attention, self.mask = nn.MultiheadAttention(8, 2, batch_first=True), mask

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False, attn_mask=self.mask)[0]


class Turned(nn.Module):
    """Sums, products, averages and the choice of a step with the batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.offset = nn.Parameter(torch.randn(5, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.layer(x.transpose(0, 1)) + self.offset)
        y = y * torch.sigmoid(y) + y.mean(0)
        y = torch.cat([y, y[1:3].flip(0)])
        return y.amax(-1, keepdim=True).permute(1, 2, 0) + y[-1].unsqueeze(-1)


class Joined(nn.Module):
    """The batch behind the heads, in one dimension with them, and apart again."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        y = x.reshape(count, 5, 2, 3).permute(2, 0, 1, 3).reshape(2 * count, 5, 3)
        return torch.matmul(y, y.transpose(1, 2)).softmax(-1).reshape(2, count, 25).transpose(0, 1)


@pytest.mark.parametrize(
    ("network", "width"),
    [(Attention(), 8), (Attention(torch.ones(5, 5).tril() == 0), 8), (Turned(), 6), (Joined(), 6),
     (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 8)],
    ids=["attention", "causal attention", "turned", "joined", "encoder layer"],
)  # fmt: skip
def test_the_batch_may_lie_anywhere(network, width, tmp_path):
    torch.manual_seed(0)
    batches = [(torch.randn(n, 5, width),) for n in (4, 32, 8)]
    found = outcome(prepare(network.eval(), batches[0]), batches, tmp_path)
    assert found.pop("proved")
    assert set(found.values()) == {0}, found
    assert len(found) == 4


def reshaped(shapes, perm=None, op=None, **attributes):
    """x (N, 4, 6) behind a Transpose, Reshapes, another operation."""
    g = Graph()
    name = g.input("x", (4, 6), A)
    if perm:
        name = g.node("Transpose", "t", [name], A, perm=perm)
    for i, shape in enumerate(shapes):
        name = g.node("Reshape", f"r{i}", [name, g.constant(f"s{i}", np.int64(shape))], A)
    if op:
        name = g.node(op, "o", [name], encoding(-8) if op == "Softmax" else A, **attributes)
    return g.artifact(name)


@pytest.mark.parametrize(
    "shapes",
    [[(-1, 6), (-1, 4, 6)], [(-1, 2, 12)], [(-1, 2, 3), (-1, 8, 3)], [(-1, 8, 3), (-1, 24)]],
    ids=str,
)
def test_a_batch_that_comes_back_is_the_first_dimension(shapes):
    artifact = reshaped(shapes)
    for batch in ort.random_batches(onnx_qdq.to_qdq(artifact), 3):
        assert np.array_equal(
            engine.executor(lower(artifact)).run(batch)[0], ort.plain(onnx_qdq.to_qdq(artifact)).run(batch)[0]
        )


@pytest.mark.parametrize(
    ("artifact", "text"),
    [
        (reshaped([(-1, 6), (-1, 4, 6)], perm=[1, 0, 2]), "Reshape r1: mixes the samples"),
        (reshaped([(6, -1), (-1, 24)], perm=[1, 0, 2]), "Reshape r0: mixes the samples"),
        (reshaped([(2, -1)]), "Reshape r0: mixes the samples"),
        (reshaped([], op="Softmax", axis=0), "Softmax o"),
        (reshaped([(-1, 6)], op="Softmax", axis=0), "Softmax o"),
        (reshaped([], perm=[1, 0, 2], op="Softmax", axis=1), "Softmax o"),
    ],
)  # fmt: skip
def test_what_mixes_samples_is_refused(artifact, text):
    with pytest.raises(UnsupportedModelError, match=text):
        lower(artifact)


class Tokens(nn.Module):
    """An encoder of tokens with places, as BERT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(300, 8), nn.Embedding(5, 8), nn.LayerNorm(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.norm(self.words(x) + self.places(torch.arange(5))))[:, 0]


def test_tokens_run_in_integers_and_in_c(tmp_path):
    torch.manual_seed(0)
    batches = [(torch.randint(0, 300, (n, 5)),) for n in (4, 32, 16)]
    found = outcome(prepare(Tokens().eval(), batches[0]), batches, tmp_path)
    assert found.pop("proved")
    assert set(found.values()) == {0}, found
    assert len(found) == 4
