"""Factors and masks in front of a softmax become part of it: the codes are the same however attention is written."""

import math

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from pow2quant import QuantPlan, prepare, simulate
from pow2quant.frontends import modules as m
from pow2quant.frontends.onnx.network import read_network
from pow2quant.frontends.scores import gather_scores
from tests.prepared import outcome

T, C = 5, 6
LATER = torch.ones(T, T).triu(1).bool()
X = torch.randn(4, T, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Two heads of C values. attend: (self, q, k, v) -> what it gives for (N, 2, T, C) each."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(1)
        self.attend, self.qkv, self.out = attend, nn.Linear(8, 6 * C), nn.Linear(2 * C, 3)
        self.bias = nn.Parameter(torch.randn(2, T, T))
        self.register_buffer("mask", torch.zeros(T, T).masked_fill(LATER, -torch.inf))

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], T, 3, 2, C).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(self.attend(self, q, k, v).transpose(1, 2).reshape(x.shape[0], T, 2 * C))


def by_hand(scores):
    return lambda s, q, k, v: scores(s, q, k.transpose(-2, -1)).softmax(-1) @ v


FULL = {
    "of PyTorch": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "on the product": by_hand(lambda s, q, k: q @ k / math.sqrt(C)),
    "on q": by_hand(lambda s, q, k: (q * C**-0.5) @ k),
    "on k": by_hand(lambda s, q, k: q @ (k.mT * C**-0.5).mT),
    "on both": by_hand(lambda s, q, k: (q * C**-0.25) @ (k * C**-0.25)),
    "einsum": lambda s, q, k, v: (torch.einsum("bhqd,bhkd->bhqk", q, k) * C**-0.5).softmax(-1) @ v,
}
CAUSAL = {
    "of PyTorch": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "truth values": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=~LATER),
    "minus infinity": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=s.mask),
    "filled": by_hand(lambda s, q, k: (q @ k / math.sqrt(C)).masked_fill(LATER, -torch.inf)),
    "filled with the least": by_hand(lambda s, q, k: (q @ k * C**-0.5).masked_fill(LATER, torch.finfo().min)),
    "added": by_hand(lambda s, q, k: s.mask + (q * C**-0.5) @ k),
    "subtracted": by_hand(lambda s, q, k: (q * C**-0.5) @ k - LATER.float() * 1e9),
    "chosen": by_hand(lambda s, q, k: torch.where(LATER, -1e9, q @ k / math.sqrt(C))),
    "scaled behind the mask": by_hand(lambda s, q, k: (q @ k).masked_fill(LATER, -1e9) / math.sqrt(C)),
}


def codes(network):
    sim = simulate(network, X, QuantPlan.default(), backend="custom")
    sim.calibrate([X])
    with torch.no_grad():
        return sim.model(X)


@pytest.mark.parametrize(("forms", "masked"), [(FULL, False), (CAUSAL, True)], ids=["full", "causal"])
def test_however_attention_is_written_the_codes_are_the_same(forms, masked):
    results = {}
    for name, attend in forms.items():
        network = prepare(Attention(attend).eval(), X)
        (softmax,) = [module for module in network.modules() if isinstance(module, m.MaskedSoftmax)]
        assert softmax.factor == float(torch.tensor(C**-0.5)), name
        assert (softmax.mask is not None) == masked, name
        assert not any(isinstance(module, (m.Scale, m.Masked, m.Add)) for module in network.modules()), name
        results[name] = codes(network)
    first = results["of PyTorch"]
    assert all(torch.equal(first, result) for result in results.values())


@pytest.mark.parametrize("name", ["truth values", "subtracted"])
def test_masked_attention_is_proved(name, tmp_path):
    found = outcome(prepare(Attention(CAUSAL[name]).eval(), X), [(X,), (X[:2] / 2,)], tmp_path)
    assert found.pop("proved")
    assert "integers" not in found
    assert set(found.values()) == {0}


class Several(nn.Module):
    """Attention in several forms, one behind the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        forms = [CAUSAL["truth values"], biased]
        self.blocks = nn.ModuleList(Attention(attend) for attend in forms)
        self.multihead = nn.MultiheadAttention(8, 2, batch_first=True)
        self.back = nn.Linear(3, 8)

    def forward(self, x):
        x = x + self.multihead(x, x, x, need_weights=False)[0]
        for block in self.blocks:
            x = x + self.back(block(x))
        return x


def biased(s, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=s.bias)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_the_codes_from_a_file_are_those_from_pytorch(dynamo, tmp_path):
    model = Several().eval()
    how = {"dynamic_shapes": [{0: torch.export.Dim.DYNAMIC}]} if dynamo else {"dynamic_axes": {"x": {0: "n"}}}
    path = tmp_path / "m.onnx"
    torch.onnx.export(model, (X,), path, dynamo=dynamo, input_names=["x"], verbose=False, **how)
    assert torch.equal(codes(model), codes(read_network(path)))


@pytest.mark.parametrize(
    "attend",
    [
        by_hand(lambda s, q, k: -(q @ k)),
        by_hand(lambda s, q, k: q @ k + s.bias),
        lambda s, q, k, v: (lambda scores: scores.softmax(-1) @ v + scores.mean(-1, keepdim=True))(q @ k.mT * 0.3),
    ],
    ids=["negative", "an ordinary bias", "read by another"],
)
def test_what_else_stands_in_front_stays(attend):
    model = Attention(attend).eval()
    network = prepare(model, X)
    assert any(isinstance(module, (m.Scale, m.Add)) for module in network.modules())
    assert sum(isinstance(module, m.Softmax) for module in network.modules()) == 1
    assert torch.allclose(network(X), model(X), atol=1e-5)


def test_a_row_without_values_gives_no_numbers():
    nothing = torch.zeros(T, T)
    nothing[2] = -torch.inf
    network = prepare(Attention(by_hand(lambda s, q, k: q @ k + nothing)).eval(), X)
    assert torch.isnan(network(X)).any()
    hidden = prepare(Attention(by_hand(lambda s, q, k: (q @ k).masked_fill(nothing < 0, -1e9))).eval(), X)
    assert torch.isfinite(hidden(X)).all()


def test_of_what_an_expanded_constant_follows_no_factor_is_taken():
    """Its second operand counts by its shape alone."""
    root = {"q": m.Constant(torch.randn(1, T, C)), "halved": m.Scale(0.5), "expand": m.Expand()}
    root |= {"product": m.MatMul(), "softmax": m.Softmax(-1)}
    graph = fx.Graph()
    x, k = graph.placeholder("x"), graph.placeholder("k")
    like, q = graph.call_module("halved", (x,)), graph.call_module("q")
    scores = graph.call_module("product", (graph.call_module("expand", (q, like)), k))
    graph.output(graph.call_module("softmax", (scores,)))
    network = fx.GraphModule(root, graph)
    given = {"x": torch.randn(3, 2), "k": torch.randn(3, C, T)}
    shapes = {"x": (3, 2), "k": (3, C, T), "halved": (3, 2), "q": (1, T, C), "expand": (3, T, C)}
    for node in graph.nodes:
        node.meta = {"shape": shapes.get(str(node.target), (3, T, T)), "free": ()}
    wanted = network(**given)
    assert gather_scores(network) == []
    network.recompile()
    assert torch.equal(network(**given), wanted)
