"""What random networks grow by: layers, activations, pools, arithmetic and moves, each a function of the grower."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tests import random_blocks

if TYPE_CHECKING:
    from tests.random_networks import Grower


class Function(nn.Module):
    """A function of tensors, so that all steps are modules; fx traces through it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


LAYERS: dict[int, Any] = {
    3: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d),
    4: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d),
    5: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AvgPool3d),
}
"""By the rank of what they read, batch included."""


def _conv(g: Grower, at: int) -> None:
    x = g.values[at]
    channels, rank = x.shape[1], x.ndim
    kind = LAYERS[rank]
    groups = channels if g.rng.random() < 0.25 else 1
    out = channels * g.small(1, 2) if groups > 1 else g.small(1, 3, 4, 7, 8)
    if g.rng.random() < 0.2:
        stride = g.small(1, 2)
        layer: nn.Module = kind[1](
            channels, out, g.small(2, 3), stride, g.small(0, 1), stride - 1, groups, bias=g.coin()
        )
    else:
        same = g.rng.random() < 0.2
        stride = 1 if same else g.small(1, 1, 2)
        padding: Any = "same" if same else g.small(0, 1, 2)
        layer = kind[0](channels, out, g.small(1, 2, 3), stride, padding, g.small(1, 1, 2), groups, bias=g.coin())
    _spread(g, layer)
    result = g.take(layer, at)
    if result is not None and g.rng.random() < 0.25:
        norm = kind[2](out)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        result = g.take(norm, result)
    if result is not None and g.rng.random() < 0.4:
        _activation(g, result)


def _spread(g: Grower, layer: nn.Module) -> None:
    """Weights whose channels differ in size; sometimes one channel is zero, or biases are large."""
    weight: Any = layer.weight
    weight.mul_(2.0 ** torch.randint(-3, 3, (weight.shape[0], *[1] * (weight.ndim - 1))))
    if g.rng.random() < 0.1:
        weight[0] = 0
    bias: Any = layer.bias
    if bias is not None and g.coin():
        bias.mul_(8)


def _linear(g: Grower, at: int) -> None:
    layer = nn.Linear(g.values[at].shape[-1], g.small(1, 3, 5, 8), g.coin())
    _spread(g, layer)
    g.take(layer, at)


ACTIVATIONS: dict[str, Callable[[Grower], nn.Module]] = {
    "relu": lambda g: nn.ReLU(g.coin()),
    "relu6": lambda g: nn.ReLU6(),
    "hardtanh": lambda g: nn.Hardtanh(-float(g.small(0, 1, 2)), float(g.small(1, 3))),
    "clamp": lambda g: Function(_clamp(float(g.small(-2, -1, 0)), float(g.small(1, 4)))),
    "sigmoid": lambda g: nn.Sigmoid(),
    "tanh": lambda g: nn.Tanh(),
    "hardsigmoid": lambda g: nn.Hardsigmoid(),
    "hardswish": lambda g: nn.Hardswish(),
    "silu": lambda g: nn.SiLU(),
    "gelu": lambda g: nn.GELU(str(g.rng.choice(["none", "tanh"]))),
    "elu": lambda g: nn.ELU(float(g.small(1, 2)) / 2),
    "leaky": lambda g: nn.LeakyReLU(float(g.rng.choice([0.01, 0.125, 0.2]))),
}


def _clamp(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.clamp(low, high)


def _activation(g: Grower, at: int) -> None:
    clips = ["relu", "relu", "relu", "relu6", "hardtanh", "clamp"]
    name = str(g.rng.choice([*ACTIVATIONS, "prelu", *clips] if g.functions else clips))
    g.take(ACTIVATIONS[name](g) if name in ACTIVATIONS else nn.PReLU(g.small(1, g.values[at].shape[1])), at)


def _pool(g: Grower, at: int) -> None:
    rank, kernel = g.values[at].ndim, g.small(2, 2, 3)
    more: Any = {"stride": g.small(1, 2, kernel), "padding": g.small(0, 0, 1), "ceil_mode": g.rng.random() < 0.15}
    if g.coin():
        g.take(LAYERS[rank][3](kernel, **more), at)
    else:
        g.take(LAYERS[rank][4](kernel, **more, count_include_pad=g.coin()), at)


def _mean(g: Grower, at: int) -> None:
    rank, keep = g.values[at].ndim, g.coin()
    if rank == 4 and g.coin():
        g.take(nn.AdaptiveAvgPool2d(1), at)
        return
    dims = (2, 3) if rank == 4 and g.coin() else (rank - 1,)
    g.take(lambda x: x.mean(dims, keepdim=keep), at)


def _partner(g: Grower, at: int) -> int:
    """Another tensor that broadcasts with this one, or the same."""
    shape = g.values[at].shape
    fitting = [
        i
        for i, x in enumerate(g.values)
        if x.ndim == len(shape) and all(a == b or a == 1 for a, b in zip(x.shape[1:], shape[1:], strict=True))
    ]
    return int(g.rng.choice(fitting))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Grower, int], None]:
    def grow(g: Grower, at: int) -> None:
        pair = (at, _partner(g, at))
        g.take(function, *(pair if g.coin() else pair[::-1]))

    return grow


def _gate(g: Grower, at: int) -> None:
    """Squeeze and excite: a tensor times a function of its own mean."""
    channels = g.values[at].shape[1]
    found = g.take(nn.AdaptiveAvgPool2d(1), at)
    layer = nn.Conv2d(channels, channels, 1)
    found = found and g.take(layer, found)
    found = found and g.take(nn.Sigmoid() if g.coin() else nn.Hardsigmoid(), found)
    if found:
        g.take(torch.mul, at, found)


def _matmul(g: Grower, at: int) -> None:
    x = g.values[at]
    others = [i for i, y in enumerate(g.values) if y.ndim == x.ndim and y.shape[:-2] == x.shape[:-2]]
    other = int(g.rng.choice(others))
    if g.values[other].shape[-2] == x.shape[-1]:
        g.take(torch.matmul, at, other)
    elif g.values[other].shape[-1] == x.shape[-1]:
        turned = g.take(lambda x: x.transpose(-1, -2), other)
        if turned:
            g.take(torch.matmul, at, turned)


def _scale(g: Grower, at: int) -> None:
    factor, offset = (float(v) for v in g.rng.choice([-1.0, 0.5, 2.0, 0.3, 1.7], 2))
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda x: x * factor,
        lambda x: x + offset,
        lambda x: offset - x,
        lambda x: x / 4.0,
    ]
    g.take(kinds[g.rng.integers(len(kinds))], at)


def _nothing(g: Grower, at: int) -> None:
    """Operations that change no value, which optimizers remove."""
    x, rank = g.values[at], g.values[at].ndim
    shape = x.shape[1:]
    kinds: list[nn.Module | Callable[[Tensor], Tensor]] = [
        lambda x: x * 1.0,
        lambda x: x + 0.0,
        lambda x: x - 0,
        lambda x: x / 1,
        nn.Identity(),
        nn.Dropout(),
        lambda x: x.contiguous(),
        lambda x: x.flatten(1).reshape(-1, *shape),
        lambda x: x[:, :],
    ]
    if rank == 4:
        kinds.append(lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2))
        kinds.append(nn.ZeroPad2d(0))
    if rank >= 3:
        kinds.append(lambda x: x.transpose(-1, -2).transpose(-1, -2))
        kinds.append(lambda x: x.expand(-1, *shape))
    g.take(kinds[g.rng.integers(len(kinds))], at)


def _move(g: Grower, at: int) -> None:
    x, rank = g.values[at], g.values[at].ndim
    size = x.shape[1]
    kinds: list[nn.Module | Callable[[Tensor], Tensor]] = [
        lambda x: x[:, : max(1, size // 2)],
        lambda x: x[:, ::2],
    ]
    if rank == 4:
        order = [0, *(int(d) for d in g.rng.permutation([1, 2, 3]))]
        kinds += [
            lambda x: x.permute(*order),
            lambda x: x[:, :, 1:],
            lambda x: x.flatten(2),
            nn.ZeroPad2d(tuple(int(p) for p in g.rng.integers(0, 3, 4))),
            nn.Upsample(scale_factor=2),
        ]
    if rank == 3:
        kinds += [lambda x: x.transpose(1, 2), lambda x: x.unsqueeze(1)]
    if rank > 2:
        kinds.append(nn.Flatten())
    g.take(kinds[g.rng.integers(len(kinds))], at)


def _pad_pool(g: Grower, at: int) -> None:
    """Zeros in front of a maximum: they count, where the pool's own padding does not."""
    padded = g.take(nn.ZeroPad2d(tuple(int(p) for p in g.rng.integers(0, 2, 4))), at)
    if padded:
        kind = nn.MaxPool2d if g.rng.random() < 0.8 else nn.AvgPool2d
        g.take(kind(2, g.small(1, 2)), padded)


def _concat(g: Grower, at: int) -> None:
    shape = g.values[at].shape
    fitting = [i for i, x in enumerate(g.values) if x.ndim == len(shape) and x.shape[2:] == shape[2:]]
    parts = [at, *(int(i) for i in g.rng.choice(fitting, g.small(1, 2)))]
    g.take(lambda *tensors: torch.cat(tensors, 1), *parts)


FUNCTIONS = ("gate",)
"""Left out of half of the networks: what holds a function is not proved at every width."""

ALL_RANKS, IMAGES, SEQUENCES = random_blocks.ALL_RANKS, random_blocks.IMAGES, (3, 4)
MAPS, EVERY = (3, 4, 5), (2, 3, 4, 5)

CHOICES: dict[str, tuple[tuple[int, ...], Callable[[Grower, int], None]]] = {
    "conv": (MAPS, _conv),
    "conv again": (MAPS, _conv),
    "conv once more": (MAPS, _conv),
    "linear": (EVERY, _linear),
    "activation": (EVERY, _activation),
    "pool": (MAPS, _pool),
    "pad and pool": (IMAGES, _pad_pool),
    "mean": (MAPS, _mean),
    "add": (EVERY, _binary(torch.add)),
    "add again": (EVERY, _binary(torch.add)),
    "sub": (EVERY, _binary(torch.sub)),
    "mul": (EVERY, _binary(torch.mul)),
    "maximum": (EVERY, _binary(torch.maximum)),
    "minimum": (EVERY, _binary(torch.minimum)),
    "gate": (IMAGES, _gate),
    "matmul": (SEQUENCES, _matmul),
    "scale": (EVERY, _scale),
    "nothing": (EVERY, _nothing),
    "move": (EVERY, _move),
    "concat": (EVERY, _concat),
    **random_blocks.CHOICES,
}
"""What a network may grow by: the ranks of tensors (batch included) that it reads, and how."""
