"""Rows of `frontends.aten`: functions of a tensor as PyTorch has them, prepared to modules that compute the same.

That it is the same is checked by `prepare` itself, operation by operation and as a whole, on random values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant import prepare
from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends import modules as m
from tests.prepared import outcome

Function = Callable[..., Any]

MAPS: dict[str, Function] = {
    "celu": F.celu, "selu": F.selu, "elu": lambda x: F.elu(x, 1.3), "mish": F.mish, "softsign": F.softsign,
    "softplus": lambda x: F.softplus(x, 2.0), "logsigmoid": F.logsigmoid, "threshold": lambda x: F.threshold(x, 0.1, 2),
    "softshrink": F.softshrink, "hardshrink": F.hardshrink, "tanhshrink": F.tanhshrink, "rrelu": F.rrelu, "glu": F.glu,
    "abs": torch.abs, "sqrt": lambda x: torch.sqrt(x * x), "rsqrt": lambda x: torch.rsqrt(x * x + 1), "exp": torch.exp,
    "logarithms": lambda x: [f(x.abs() + 0.1) for f in (torch.log, torch.log1p, torch.log2, torch.log10)],
    "integers": lambda x: [f(x) for f in (torch.sign, torch.floor, torch.ceil, torch.round)],
    "exp2": torch.exp2, "sin": torch.sin, "cos": torch.cos, "erf": torch.erf,
    "sort": lambda x: (x.sort(1, descending=True)[0], x.median(2)[0], x.kthvalue(2, 3, keepdim=True)[0]),
    "added at places": lambda x: torch.zeros_like(x).index_add(2, torch.tensor([0, 0, 5]), x[:, :, :3], alpha=0.5),
    "scattered": lambda x: x.scatter_add(3, torch.tensor([1, 1, 2]).expand(len(x), 8, 6, 3), x[..., :3]),
    "written": lambda x: x.scatter(2, torch.tensor([[[[1], [0]]]]).expand(len(x), 8, 2, 1), x[:, :, :2, :1] * 2),
    "written numbers": lambda x: x.scatter(1, torch.zeros(len(x), 1, 6, 6, dtype=torch.int64), 0.25),
    "rows of numpy": lambda x: x + torch.from_numpy(np.full((len(x), 8, 1, 1), 0.5, np.float32)),
    "no values yet": lambda x: torch.empty_like(x).copy_(x) + 1, "place": lambda x: x.max(1)[1].float() * x[:, 0],
    "some or all": lambda x: ((x > 0).any(1) ^ (x > 0).all(1)).float(), "cumprod": lambda x: x.cumprod(2),
    "x ** 2": lambda x: x**2, "x ** 3": lambda x: x**3, "2 ** x": lambda x: 2**x,
    "x.abs() ** 0.5": lambda x: x.abs() ** 0.5, "x % 0.7": lambda x: x % 0.7, "x // 0.7": lambda x: x // 0.7,
    "div floor": lambda x: torch.div(x, 3, rounding_mode="floor"), "2 / x": lambda x: 2 / (x * x + 1),
    "x / y": lambda x: x / (x * x + 1), "clamp low": lambda x: x.clamp(min=0.1), "clamp high": lambda x: x.clamp(max=1),
    "clamp between": lambda x: x.clamp(0.1, 1), "clamp by tensors": lambda x: torch.clamp(x, x * 0.5, x.abs() + 1),
    "maximum": lambda x: torch.maximum(x, -x), "minimum": lambda x: torch.minimum(x, x * 0.5),
    "max of two": lambda x: torch.max(x, x * 2), "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "where a number": lambda x: torch.where(x <= 0.3, 1.0, x), "mask": lambda x: x * (x > 0).float(),
    "masks joined": lambda x: x * ((x > 0.1) & ~(x >= 1) | (x < -1)).float(), "not equal": lambda x: (x != 0).float(),
    "compared tensors": lambda x: torch.where(x > x.flip(3), x, x * 2),
    "masked_fill": lambda x: x.masked_fill(torch.eye(6) > 0, -1.0), "tril": lambda x: torch.tril(x),
    "sum": lambda x: x.sum((2, 3)), "amax": lambda x: x.amax((2, 3)), "amin": lambda x: x.amin(1),
    "max along": lambda x: x.max(2)[0], "min along": lambda x: x.min(2, keepdim=True)[0],
    "std": lambda x: x.std((2, 3)),
    "var": lambda x: x.var(1, unbiased=False), "norm": lambda x: torch.norm(x, dim=1),
    "norm 1": lambda x: torch.norm(x, p=1, dim=(1, 2)), "norm inf": lambda x: torch.norm(x, p=torch.inf, dim=1),
    "logsumexp": lambda x: torch.logsumexp(x, 1), "prod": lambda x: torch.prod(x, 1), "cumsum": lambda x: x.cumsum(1),
    "topk": lambda x: torch.topk(x.flatten(1), 5)[0], "argmax": lambda x: (x, x.argmax(1)),
    "normalize": lambda x: F.normalize(x, dim=1), "log_softmax": lambda x: F.log_softmax(x, 1),
    "masked softmax": lambda x: F.softmax((x / 2).masked_fill(torch.eye(6) > 0, -torch.inf), -1),
    "softmax with a bias": lambda x: F.softmax(x * 0.3 + torch.full((6, 6), -1e9).triu(1), -1),
    "einsum of three": lambda x: torch.einsum("nchw,ncw,hk->nkc", x, x[:, :, 0], torch.ones(6, 2)),
    "einsum with dots": lambda x: torch.einsum("...hw,...kw->...hk", x, x * 2),
    "einsum of rows with dots": lambda x: torch.einsum("...w,wk", x, torch.eye(6)[:, :4]),
    "cdist": lambda x: torch.cdist(x, x[:, :, :3] * 2), "cdist to rows": lambda x: torch.cdist(x, torch.eye(6), p=1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x * 2 + 1), "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": F.instance_norm, "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "local_response_norm": nn.LocalResponseNorm(3), "lp_pool": lambda x: F.lp_pool2d(x, 2, 2),
    "max_pool with ceil": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg_pool with ceil": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg_pool with a divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
    "adaptive average": lambda x: F.adaptive_avg_pool2d(x, (4, 5)),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (4, 1)),
    "nearest by 1.5": lambda x: F.interpolate(x, scale_factor=1.5),
    "nearest down": lambda x: F.interpolate(x, size=(3, 4)),
    "nearest-exact": lambda x: F.interpolate(x, size=(9, 7), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear by 1.3": lambda x: F.interpolate(x, scale_factor=1.3, mode="bilinear"),
    "bilinear, corners": lambda x: F.interpolate(x, size=(11, 4), mode="bilinear", align_corners=True),
    "bilinear, smoothed": lambda x: F.interpolate(x, size=(4, 3), mode="bilinear", antialias=True),
    "bicubic": lambda x: F.interpolate(x, size=(9, 12), mode="bicubic"),
    "area": lambda x: F.interpolate(x, size=(4, 4), mode="area"),
    "grid_sample": lambda x: F.grid_sample(
        x, torch.linspace(-1, 1, 18).view(1, 3, 3, 2).expand(len(x), -1, -1, -1), align_corners=False
    ),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2), "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2), "unfold": lambda x: F.unfold(x, (2, 3), 1, 1, 2),
    "x.unfold": lambda x: x.unfold(2, 3, 2), "reflect": lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"),
    "replicate": lambda x: F.pad(x, (1, 1, 0, 2), mode="replicate"),
    "circular": lambda x: F.pad(x, (1, 1, 2, 2), "circular"),
    "pad by a value": lambda x: F.pad(x, (1, 1, 0, 2), value=-1.0), "crop": lambda x: F.pad(x, (-1, -1, 1, -2)),
    "repeat": lambda x: x.repeat(1, 2, 1, 3), "tile": lambda x: x.tile(1, 2, 1, 1), "flip": lambda x: x.flip(2, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1), "roll": lambda x: torch.roll(x, (1, -2), (3, 1)),
    "expand": lambda x: x.mean(2, keepdim=True).expand(-1, -1, 8, -1), "index": lambda x: x[:, [0, 2]],
    "index two": lambda x: x[:, :, torch.tensor([[0], [2]]), torch.tensor([1, 3])],
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 0])),
    "gather": lambda x: x.gather(1, torch.arange(6).expand(len(x), 1, 6, 6)), "movedim": lambda x: x.movedim(1, -1),
    "hstack": lambda x: torch.hstack([x, x]), "stack": lambda x: torch.stack([x, x * 2], 1), "mT": lambda x: x @ x.mT,
    "zeros": lambda x: torch.cat([x + torch.zeros_like(x), x.new_zeros(len(x), 1, 6, 6)], 1),
    "einsum": lambda x: torch.einsum("nchw,nkhw->nck", x, x), "einsum of one": lambda x: torch.einsum("nchw->nhc", x),
    "einsum by a matrix": lambda x: torch.einsum("nchw,ck->nkhw", x, torch.linspace(-1, 1, 24).view(8, 3)),
    "a column": lambda x: x.mean((1, 2, 3)).unsqueeze(1) * 2, "a column by None": lambda x: x.amax((1, 2, 3))[:, None],
    "baddbmm": lambda x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2], beta=0.5),
    "addmm": lambda x: torch.addmm(torch.ones(4), x.flatten(1), torch.eye(288, 4), beta=0.5, alpha=2),
    "tangents": lambda x: [f(x) for f in (torch.tan, torch.atan, torch.sinh, torch.cosh, torch.asinh, torch.expm1)],
    "without fraction": lambda x: (x.trunc(), (x * 3).frac(), torch.fmod(x, 0.7), x.round(decimals=1)),
    "div trunc": lambda x: torch.div(x, 0.3, rounding_mode="trunc"),
    "addcdiv": lambda x: torch.addcdiv(x, x, x * x + 1, value=0.5),
    "lerp": lambda x: (torch.lerp(x, x.flip(3), 0.3), torch.lerp(x, x.flip(2), x.sigmoid())),
    "hypot": lambda x: torch.hypot(x, x + 1), "logaddexp": lambda x: torch.logaddexp(x, x * 2),
    "times a vector": lambda x: (x @ torch.linspace(-1, 1, 6), torch.mv(x.flatten(1), torch.ones(288))),
    "diagonals": lambda x: [x.diagonal(offset, 2, 3) for offset in (0, 1, -2)] + [x.diagonal(0, 3, 1)],
    "index_fill": lambda x: x.index_fill(2, torch.tensor([0, -1]), 0.5),
    "fold": lambda x: F.fold(F.unfold(x, 2, stride=2), 6, 2, stride=2),
    "fold with overlaps": lambda x: F.fold(F.unfold(x, (3, 2), 2, 1, (2, 1)), 6, (3, 2), 2, 1, (2, 1)),
    "every other": lambda x: torch.zeros_like(x).slice_scatter(x[:, 1::2] * 2, 1, 1, None, 2),
    "finite": lambda x: torch.where(x.isnan() | ~x.isfinite(), 0, x) + x.nan_to_num(),
    "cosine_similarity to rows": lambda x: F.cosine_similarity(x, torch.linspace(-1, 1, 8).view(8, 1, 1), dim=1),
    "defined by PyTorch": lambda x: (
        x.rot90(1, (2, 3)), torch.sinc(x), torch.logit(x.sigmoid(), 1e-3),
        torch.tensordot(x, torch.eye(8, 3), ([1], [0])),
        torch.kron(x, torch.ones(1, 1, 2, 1)), torch.ldexp(x, torch.tensor(-1)), torch.deg2rad(x),
        torch.linalg.cross(x[:, :3], x[:, 3:6], dim=1),
    ),
    "broadcast with constants": lambda x: torch.broadcast_tensors(x, torch.ones(6), torch.ones(8, 1, 1))[0]
    + sum(torch.broadcast_tensors(torch.linspace(0, 1, 6), x)),
    "einsum of rows": lambda x: torch.einsum("nchw,chk->nwk", x, torch.linspace(-1, 1, 144).view(8, 6, 3)),
    "einsum to sums": lambda x: torch.einsum("oc,nchw->nh", torch.linspace(-1, 1, 24).view(3, 8), x),
    "einsum by a matrix each": lambda x: torch.einsum("nchw,cwk->nchk", x, torch.linspace(-1, 1, 96).view(8, 6, 2)),
}  # fmt: skip
"""Functions of (N, 8, 6, 6)."""

TOKENS: dict[str, Function | nn.Module] = {
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "causal attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention with a mask": lambda x: F.scaled_dot_product_attention(x, x, x, torch.eye(5) < 1),
    "MultiheadAttention": nn.MultiheadAttention(8, 2, batch_first=True),
    "LSTM": nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True),
    "LSTM without bias": nn.LSTM(8, 6, bias=False, batch_first=True),
    "GRU": nn.GRU(8, 6, 2, batch_first=True), "GRU, both ways": nn.GRU(8, 6, batch_first=True, bidirectional=True),
    "RNN": nn.RNN(8, 6, batch_first=True), "RNN with ReLU": nn.RNN(8, 6, nonlinearity="relu", batch_first=True),
    "TransformerEncoderLayer": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
}  # fmt: skip
"""Of (N, 5, 8)."""

CELLS = [nn.LSTMCell(8, 6), nn.GRUCell(8, 6), nn.RNNCell(8, 6), nn.GRUCell(8, 6, bias=False)]
VOLUMES = [
    *(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.ConvTranspose3d(2, 3, 2, 2),
        nn.BatchNorm3d(2),
        nn.MaxPool3d(2),
        nn.AvgPool3d(2),
    ),
    *(nn.AdaptiveMaxPool3d(3), nn.AdaptiveAvgPool3d((2, 3, 4)), nn.Upsample(scale_factor=2, mode="trilinear")),
    *(nn.ReflectionPad3d(1), nn.InstanceNorm3d(2), nn.GroupNorm(1, 2), nn.Upsample(scale_factor=2)),
]


class Calls(nn.Module):
    """A layer of parameters, and something behind it."""

    def __init__(self, what: Function | nn.Module) -> None:
        super().__init__()
        self.part = what if isinstance(what, nn.Module) else None
        self.function = what

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.part, nn.MultiheadAttention):
            return self.part(x, x, x, need_weights=False)[0]
        return self.function(x) if self.part is None else self.part(x)


@pytest.mark.parametrize("name", MAPS)
def test_function_of_a_map(name):
    prepare(Calls(MAPS[name]).eval(), torch.randn(2, 8, 6, 6))


LENGTHS = {
    "embedding": lambda x: F.normalize(x.mean((2, 3))),
    "descriptors": lambda x: F.normalize(F.relu(x - 1), dim=1),
    "cosine similarity": lambda x: F.cosine_similarity(x[:, :4], x[:, 4:]),
    "over a map": lambda x: x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_division_by_a_length_is_in_integers(name, tmp_path):
    batches = [(torch.randn(3, 8, 6, 6),) for _ in range(2)]
    found = outcome(prepare(Calls(LENGTHS[name]).eval(), batches[0]), batches, tmp_path)
    assert found.pop("proved")
    assert set(found.values()) == {0}
    assert len(found) == 4


@pytest.mark.parametrize("name", TOKENS)
def test_function_of_tokens(name):
    prepare(Calls(TOKENS[name]).eval(), torch.randn(2, 5, 8))


@pytest.mark.parametrize("module", CELLS, ids=repr)
def test_recurrent_cell(module):
    prepare(Calls(module).eval(), torch.randn(2, 8))


@pytest.mark.parametrize("module", VOLUMES, ids=repr)
def test_module_of_a_volume(module):
    prepare(Calls(module).eval(), torch.randn(2, 2, 6, 6, 6))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_convolution_with_another_border(mode):
    network = prepare(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode).eval(), torch.randn(2, 3, 6, 6))
    assert sum(isinstance(module, m.Take) for module in network.modules()) == 2


@pytest.mark.parametrize(
    "module", [nn.Embedding(50, 4), nn.EmbeddingBag(50, 4), nn.EmbeddingBag(50, 4, mode="max")], ids=repr
)
def test_embedding(module):
    network = prepare(module.eval(), torch.randint(0, 50, (2, 6)))
    (placeholder,) = [n for n in network.graph.nodes if n.op == "placeholder"]
    assert placeholder.meta["dtype"] == torch.int64


INTEGERS = {
    "one_hot": lambda x: F.one_hot(x, 50).float(),
    "equal to a range": lambda x: (x.int().unsqueeze(-1) == torch.arange(50, dtype=torch.int32)).float(),
    "no padding": lambda x: (x != 0).unsqueeze(-1).float(),
    "a number first": lambda x: (torch.tensor(20) >= x).unsqueeze(-1).float(),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_compared_with_constants(name, tmp_path):
    batches = [(torch.randint(0, 50, (2, 6)),) for _ in range(2)]
    found = outcome(prepare(Calls(INTEGERS[name]).eval(), batches[0]), batches, tmp_path)
    assert found["onnxruntime, no optimization"] == found["onnxruntime, all optimizations"] == 0


@pytest.mark.parametrize(
    ("function", "names"),
    [(lambda x: (x[:, 1:] == x[:, :-1]).float(), "both computed"), (lambda x: (x > 0.5).float(), "other numbers")],
)
def test_other_comparisons_of_integers_are_named(function, names):
    with pytest.raises(UnsupportedModelError, match=names):
        prepare(Calls(function).eval(), torch.randint(0, 50, (2, 6)))


def test_bilinear_layer():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Bilinear(8, 8, 4)

        def forward(self, x):
            return self.layer(x, x * 2)

    prepare(Pair().eval(), torch.randn(2, 8))


def test_a_mask_becomes_part_of_the_softmax():
    network = prepare(Calls(MAPS["softmax with a bias"]).eval(), torch.randn(2, 8, 6, 6))
    (module,) = [module for module in network.modules() if isinstance(module, m.MaskedSoftmax)]
    assert module.factor == pytest.approx(0.3)
    assert bool((module.mask <= -1e9).any())
    assert not any(isinstance(other, (m.Constant, m.Scale, m.Add)) for other in network.modules())


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: torch.fft.rfft2(x).real, "fft_rfft2"),
        (lambda x: F.grid_sample(x[:, None], torch.tanh(x[:, :3, None].permute(0, 2, 3, 4, 1))), "in 3-D"),
        (lambda x: x.sort(0)[1], "along the batch"),
        (lambda x: torch.xlogy(x.sigmoid(), x.sigmoid() + 0.1), r"xlogy\(\) is not supported"),
        (lambda x: torch.std_mean(x, 1)[0], r"std_mean\(\) is not supported"),
        (lambda x: x.nan_to_num(neginf=-5.0), r"nan_to_num\(\) of infinite values"),
        (lambda x: F.fractional_max_pool2d(x, 2, 3), "fractional_max_pool2d"),
        (lambda x: torch.tril(x.mean((2, 3))), "tril is not prepared as it is written"),
        (lambda x: F.max_pool1d(x[:, 0, 0], 2), "write x.unsqueeze"),
        (nn.GRU(6, 4), "use batch_first=True"),
        (nn.LSTM(6, 4, proj_size=2, batch_first=True), "lstm .*proj_size"),
    ],
)
def test_what_is_not_supported_is_named(function, names):
    with pytest.raises(UnsupportedModelError, match=names):
        prepare(Calls(function).eval(), torch.randn(2, 8, *[6] * (1 if isinstance(function, nn.RNNBase) else 2)))
