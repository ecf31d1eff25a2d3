"""Masks that are computed from the inputs: what padding is taken out, in every executor, however it is written."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pow2quant import QuantPlan, prepare, simulate
from pow2quant.frontends import modules as m
from tests.prepared import outcome

T = 6
EARLIER = torch.ones(T, T).tril().bool()


class Reader(nn.Module):
    """Attention over tokens. attend: (self, q, k, v, tokens) -> what it gives for (N, 2, T, 4) each."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.embedding, self.qkv, self.out = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        q, k, v = self.qkv(self.embedding(x)).view(len(x), T, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(self.attend(self, q, k, v, x).transpose(1, 2).reshape(len(x), T, 8))


def by_hand(scores):
    return lambda s, q, k, v, x: scores(q @ k.mT * 0.5, x).softmax(-1) @ v


def masked(mask):
    return lambda s, q, k, v, x: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(x))


def row(x):
    return x[:, None, None]


FORMS = {
    "truth values": masked(lambda x: row(x != 0)),
    "filled": by_hand(lambda a, x: a.masked_fill(row(x == 0), -torch.inf)),
    "chosen": by_hand(lambda a, x: torch.where(row(x > 0), a, torch.finfo().min)),
    "added": by_hand(lambda a, x: a + (1 - row((x != 0).long()).float()) * torch.finfo().min),
    "subtracted": by_hand(lambda a, x: a - row(x == 0).float() * 1e9),
    "infinity": masked(lambda x: torch.zeros(len(x), 1, 1, T).masked_fill(row(x == 0), -torch.inf)),
}
MORE = {
    "and causal": masked(lambda x: row(x != 0) & EARLIER),
    "causal before": by_hand(lambda a, x: a.masked_fill(~EARLIER, -1e9).masked_fill(row(x == 0), -1e9)),
    "of pairs": masked(lambda x: ((x > 9)[:, None] == (x > 9)[:, :, None])[:, None]),
    "of a layer": lambda s, q, k, v, x: (
        s.layer(s.embedding(x), ~EARLIER, src_key_padding_mask=x == 0).view(len(x), T, 2, 4).transpose(1, 2)
    ),
}


def tokens(seed):
    x = torch.randint(1, 20, (4, T), generator=torch.Generator().manual_seed(seed))
    return x * (torch.arange(T) < torch.tensor([T, 1, 3, 4])[:, None])


def test_however_a_mask_is_written_the_codes_are_the_same():
    results = []
    for name, attend in FORMS.items():
        network = prepare(Reader(attend).eval(), tokens(0))
        (softmax,) = [x for x in network.modules() if isinstance(x, m.MaskedSoftmax)]
        assert softmax.asks, name
        assert softmax.mask is None, name
        assert not any(isinstance(x, (m.Select, m.Add)) for x in network.modules()), name
        sim = simulate(network, tokens(0), QuantPlan.default())
        sim.calibrate([tokens(1)])
        with torch.no_grad():
            results.append(sim.model(tokens(2)))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("name", ["added", *MORE])
def test_every_executor_leaves_the_padding_out(name, tmp_path):
    found = outcome(prepare(Reader((FORMS | MORE)[name]).eval(), tokens(0)), [(tokens(1),), (tokens(2),)], tmp_path)
    assert found.pop("proved")
    assert "integers" not in found
    assert set(found.values()) == {0}


def test_padding_that_calibration_does_not_hold_is_left_out_too():
    full = torch.randint(1, 20, (8, T), generator=torch.Generator().manual_seed(3))
    sim = simulate(prepare(Reader(FORMS["filled"]).eval(), full), full, QuantPlan.default())
    sim.calibrate([full])
    (truth,) = [e for name, e in sim.encodings().items() if "compare" in name]
    assert truth.fake_quantize(np.array([0, 1], np.float32)).tolist() == [0, 1]


class Asked(Reader):
    """The mask as an input of its own; the mean of the tokens that it keeps."""

    def forward(self, x, attention_mask):
        hidden = (1.0 - row(attention_mask).float()) * -10000.0
        q, k, v = self.qkv(self.embedding(x)).view(len(x), T, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.mT / 2 + hidden).softmax(-1) @ v).transpose(1, 2).reshape(len(x), T, 8)
        kept = attention_mask.unsqueeze(-1).float()
        return self.out((y * kept).sum(1) / kept.sum(1).clamp(min=1e-9))


def test_a_mask_as_an_input_of_its_own(tmp_path):
    x = tokens(1)
    network = prepare(Asked(None).eval(), (x, (x != 0).long()))
    assert any(isinstance(module, m.MaskedSoftmax) and module.asks for module in network.modules())
    batches = [(y, (y != 0).long()) for y in (x, tokens(2))]
    found = outcome(network, batches, tmp_path)
    assert {found[name] for name in found if name.startswith("onnxruntime")} == {0}


class Longest(nn.Module):
    """The largest value of every feature over the tokens that are no padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(20, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.embedding(x).masked_fill((x == 0).unsqueeze(-1), -torch.inf).max(1).values)


def test_what_is_taken_out_in_front_of_a_maximum_is_the_least_value(tmp_path):
    x, model = tokens(1), Longest().eval()
    network = prepare(model, x)
    assert torch.equal(network(x), model(x))
    found = outcome(network, [(x,), (tokens(2),)], tmp_path)
    assert {found[name] for name in found if name.startswith("onnxruntime")} == {0}


class Counting(nn.Module):
    """Integers of any sign, compared and as real numbers."""

    def forward(self, x):
        return (x >= 0).float() - (x == -50).float() + x.float() / 8


def test_integers_beyond_what_calibration_saw_are_the_same_everywhere(tmp_path):
    x = torch.randint(-100, 300, (6, 8), generator=torch.Generator().manual_seed(0))
    far = x.where(x < 200, -50) * torch.tensor([[1]] * 3 + [[9]] * 3)
    found = outcome(prepare(Counting().eval(), x), [(x,), (far,)], tmp_path)
    assert "integers" not in found
    assert {found[name] for name in found if name != "proved"} == {0}


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


FLOORS = {
    "counts limited in front of a pool": (lambda x: F.max_pool2d(torch.where(x > -2000, x, -2000.0), 2), 2e4),
    "the best of what is kept": (lambda x: torch.where(x > 0, x, -1e4).topk(3)[0], 1.0),
    "the least of all": (lambda x: torch.where(x > 0, x, -1e4).topk(3, largest=False)[0], 1.0),
    "a bound on likelihoods": (lambda x: torch.where(x - 1502 > -1500, x - 1502, -1500.0).softmax(-1), 1.0),
    "a largest value below the number": (lambda x: torch.where(x > -3e3, x, -1e3).amax(-1), 5e3),
}


@pytest.mark.parametrize("name", FLOORS)
def test_a_number_among_the_values_is_no_mask(name):
    function, size = FLOORS[name]
    x = size * torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prepare(Applied(function).eval(), x)(x), function(x), rtol=1e-6, atol=1e-6)


def test_a_mask_is_told_by_the_scores_that_it_is_added_to():
    """Of windows that were shifted: -100 beside scores of a few units."""
    mask = torch.zeros(6, 6)
    mask[:3, 3:], mask[3:, :3] = -100, -100
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    network = prepare(Applied(lambda x: (x + mask).softmax(-1)).eval(), x)
    assert [type(module) for module in network.children()] == [m.MaskedSoftmax]
    wide = prepare(Applied(lambda x: (x + mask).softmax(-1)).eval(), 100 * x)
    assert [type(module) for module in wide.children()] != [m.MaskedSoftmax]
