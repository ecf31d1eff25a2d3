"""What else random networks grow by: norms, attention, tokens, resizing, constant operands, extremes, reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from tests.random_networks import Grower


def softmax(g: Grower, at: int) -> None:
    """Over the last dimension or over channels."""
    g.take(nn.Softmax(-1 if g.coin() else 1), at)


def norm(g: Grower, at: int) -> None:
    """Layer, RMS, group or instance norm, with or without factors and offsets."""
    x, affine = g.values[at], g.coin()
    channels, last = x.shape[1], x.shape[-1]
    kinds: list[nn.Module] = [
        nn.LayerNorm(list(x.shape[g.small(1, -1) :]), eps=10.0 ** -g.small(3, 5), elementwise_affine=affine),
        nn.LayerNorm(last, elementwise_affine=affine),
        nn.RMSNorm(last, eps=1e-5, elementwise_affine=affine),
        nn.GroupNorm(g.small(*(n for n in range(1, channels + 1) if channels % n == 0)), channels, affine=affine),
    ]
    if x.ndim > 2:
        kinds.append((nn.InstanceNorm1d if x.ndim == 3 else nn.InstanceNorm2d)(channels, affine=affine))
    made = kinds[g.rng.integers(len(kinds))]
    for parameter in made.parameters():
        parameter.normal_(1 - g.small(0, 1))
    g.take(made, at)


def resize(g: Grower, at: int) -> None:
    """Nearest or linear, up or down, by a factor or to a size."""
    x = g.values[at]
    how: dict[str, Any] = {"mode": str(g.rng.choice(["nearest", "bilinear"] if g.functions else ["nearest"]))}
    if how["mode"] == "bilinear":
        how["align_corners"] = g.coin()
    if g.coin():
        how["scale_factor"] = float(g.small(2, 3))
    else:
        how["size"] = tuple(max(1, n * g.small(1, 2) // g.small(1, 2)) for n in x.shape[2:])
    g.take(lambda x: F.interpolate(x, **how), at)


def tokens(g: Grower, at: int) -> None:
    """(N, C, H, W) -> (N, H W, C), and a linear layer on every token."""
    moved = g.take(lambda x: x.flatten(2).transpose(1, 2), at)
    if moved is not None:
        g.take(nn.Linear(g.values[moved].shape[-1], g.small(2, 4, 6)), moved)


class Attention(nn.Module):
    """Self-attention over (N, T, C), written out or as PyTorch has it."""

    def __init__(self, channels: int, heads: int, written: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.heads, self.written = heads, written

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.written:
            mixed = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


def attention(g: Grower, at: int) -> None:
    """Self-attention with one or two heads; sometimes with a sum around it."""
    channels = g.values[at].shape[-1]
    heads = g.small(*(n for n in (1, 2) if channels % n == 0))
    modules: list[nn.Module] = [Attention(channels, heads, g.coin())]
    if g.functions:
        whole = nn.MultiheadAttention(channels, heads, batch_first=True)
        modules.append(Own(whole, lambda f, x: f(x, x, x, need_weights=False)[0]))
    found = g.take(modules[g.rng.integers(len(modules))], at)
    if found is not None and g.coin():
        g.take(torch.add, at, found)


class Own(nn.Module):
    """Calls a module in a way of its own."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


class Beside(nn.Module):
    """A tensor and a constant one: a buffer, or a parameter."""

    def __init__(self, constant: Tensor, function: Callable[[Tensor, Tensor], Tensor], trained: bool) -> None:
        super().__init__()
        if trained:
            self.constant: Tensor = nn.Parameter(constant)
        else:
            self.register_buffer("constant", constant)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.constant)


FUNCTIONS_OF_TWO: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add,
    torch.sub,
    lambda x, c: c - x,
    torch.mul,
    torch.maximum,
    torch.minimum,
    lambda x, c: torch.where(c > 0, x, c),
    lambda x, c: torch.where(x > c, x, 0.5 * x),
    lambda x, c: x + c * (x > 0),
)


def constant(g: Grower, at: int) -> None:
    """A constant operand: of one value, one per channel, per last dimension, or as large as a sample."""
    x = g.values[at]
    shapes = [(), (1,), (x.shape[1], *[1] * (x.ndim - 2)), x.shape[-1:], x.shape[1:]]
    values = torch.randn(shapes[g.rng.integers(len(shapes))]) * 2.0 ** g.small(-3, 0, 3) * x.abs().mean()
    g.take(Beside(values, FUNCTIONS_OF_TWO[g.rng.integers(len(FUNCTIONS_OF_TWO))], g.coin()), at)


def reduce(g: Grower, at: int) -> None:
    """The largest, the least or the sum of a dimension or two."""
    rank, keep = g.values[at].ndim, g.coin()
    dims = (rank - 2, rank - 1) if rank == 4 and g.coin() else (g.small(*range(1, rank)),)
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.amax(dims, keep),
        lambda x: x.amin(dims, keep),
        lambda x: x.sum(dims, keep),
    ]
    g.take(kinds[g.rng.integers(len(kinds))], at)


def rearrange(g: Grower, at: int) -> None:
    """Values in other places: repeated, picked, turned around, cut in parts, channels to pixels."""
    x, rank = g.values[at], g.values[at].ndim
    dim = g.small(*range(1, rank))
    size = x.shape[dim]
    picked = torch.from_numpy(g.rng.integers(0, size, g.small(1, 2, 3)))
    kinds: list[nn.Module | Callable[[Tensor], Tensor]] = [
        lambda x: x.index_select(dim, picked),
        lambda x: x.flip(dim),
        lambda x: x.roll(1, dim),
        lambda x: x.chunk(2, dim)[0],
        lambda x: torch.cat(x.split(max(1, size // 2), dim)[::-1], dim),
        lambda x: x.repeat(*(2 if i == dim else 1 for i in range(rank))),
        lambda x: x.repeat_interleave(2, dim),
        lambda x: x.narrow(dim, size // 2, 1),
    ]
    if rank == 4:
        kinds += [nn.PixelUnshuffle(2), nn.ChannelShuffle(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d((1, 0, 0, 1))]
        kinds.append(lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2))
    g.take(kinds[g.rng.integers(len(kinds))], at)


ALL_RANKS, IMAGES, TOKENS = (2, 3, 4), (4,), (3,)

CHOICES: dict[str, tuple[tuple[int, ...], Callable[[Grower, int], None]]] = {
    "softmax": (ALL_RANKS, softmax),
    "norm": (ALL_RANKS, norm),
    "resize": (IMAGES, resize),
    "tokens": (IMAGES, tokens),
    "attention": (TOKENS, attention),
    "constant": (ALL_RANKS, constant),
    "reduce": (ALL_RANKS, reduce),
    "rearrange": (ALL_RANKS, rearrange),
}
"""As `random_steps.CHOICES`."""
