"""Integer functions against float: ours beside the approximations of published integer-only transformers.

    python benchmarks/functions.py

Prints a markdown table: for rows of random 8-bit codes at several scales, the largest and the mean absolute error
against float64, before the result is rounded to its grid. I-BERT (Kim et al., 2021, https://arxiv.org/abs/2101.01321):
second-order polynomials. I-ViT (Li and Gu, 2023, https://arxiv.org/abs/2207.01405): Shiftmax and ShiftGELU, shifts and
additions. The approximations are computed in float64, so that what is measured is the approximation, not how its
integers are rounded, but for the shifts inside I-ViT's exponentials, which belong to them.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pow2quant.frontends import modules as m
from pow2quant.pow2_constraints import Encoding, IntGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

EXPONENTS = (-6, -5, -4, -3, -2)
"""The inputs' scales are 2^k."""

ROWS, LENGTH = 2000, 64


def ibert_exp(x: Floats) -> Floats:
    """exp(x) of x <= 0: 0.3585 (p + 1.353)^2 + 0.344, halved z times; x = p - z ln 2 (equations 13 to 15)."""
    z = np.floor(-x / math.log(2))
    return np.ldexp(0.3585 * (x + z * math.log(2) + 1.353) ** 2 + 0.344, -z.astype(int))


def shift_exp(codes: NDArray[np.int64], k: int) -> Floats:
    """exp of codes <= 0 in units of 2^k: x log2(e) as x + x / 2 - x / 16, 2^-f as 1 - f / 2 (I-ViT, algorithm 1)."""
    scaled = codes * 2**10  # in finer units, so that shifts of small codes keep their bits
    power = np.ldexp((scaled + (scaled >> 1) - (scaled >> 4)).astype(np.float64), k - 10)
    whole = np.floor(-power)
    return np.ldexp(1 + (power + whole) / 2, -whole.astype(int))


def ibert_gelu(x: Floats) -> Floats:
    """x / 2 (1 + L(x / sqrt 2)), L = sgn(x) (a (min(|x|, -b) + b)^2 + 1), a = -0.2888, b = -1.769 (equation 8)."""
    a, b, y = -0.2888, -1.769, x / math.sqrt(2)
    return x / 2 * (1 + np.sign(y) * (a * (np.minimum(np.abs(y), -b) + b) ** 2 + 1))


def shift_gelu(codes: NDArray[np.int64], k: int) -> Floats:
    """x sigmoid(1.702 x), with 1.702 x as x + x / 2 + x / 8 + x / 16 and `shift_exp` (I-ViT, algorithm 2)."""
    scaled = codes * 2**10
    wide = scaled + (scaled >> 1) + (scaled >> 3) + (scaled >> 4)
    top = np.maximum(wide.max(-1, keepdims=True), 0)
    exponential, other = shift_exp(wide - top, k - 10), shift_exp(-top, k - 10)
    return np.ldexp(codes.astype(np.float64), k) * exponential / (exponential + other)


def normalized(exponential: Floats) -> Floats:
    """Divided by the sum of each row."""
    return exponential / exponential.sum(-1, keepdims=True)


def ours(module: m.Exact, codes: NDArray[np.int64], k: int) -> Floats:
    """What an integer definition gives, before it is rounded to the result's grid."""
    source = Encoding(np.asarray(np.float32(2.0**k)), np.zeros((), np.int64), IntGrid(8, signed=True))
    target = Encoding(np.asarray(np.float32(2.0**-8)), np.zeros((), np.int64), IntGrid(8, signed=False))
    defined = module.definition(codes.shape, source, target)
    assert defined is not None
    return module.integers(torch.from_numpy(codes.astype(np.float64)), defined, source).double().numpy()


Integer = Callable[["NDArray[np.int64]", int], "Floats"]


def candidates() -> dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, Integer]]]:
    """By function: the float one, and those in integers."""

    def below(codes: NDArray[np.int64]) -> NDArray[np.int64]:
        return codes - codes.max(-1, keepdims=True)

    norm = m.LayerNorm(LENGTH)
    return {
        "Softmax": (
            nn.Softmax(-1),
            {
                "pow2quant: a table, one division": lambda q, k: ours(m.Softmax(-1), q, k),
                "I-BERT: polynomial": lambda q, k: normalized(ibert_exp(np.ldexp(below(q).astype(float), k))),
                "I-ViT: Shiftmax": lambda q, k: normalized(shift_exp(below(q), k)),
            },
        ),
        "GELU": (
            nn.GELU(),
            {
                "pow2quant: a table": lambda q, k: table(m.GELU(), q, k),
                "I-BERT: polynomial": lambda q, k: ibert_gelu(np.ldexp(q.astype(float), k)),
                "I-ViT: ShiftGELU": shift_gelu,
            },
        ),
        "LayerNorm": (
            nn.LayerNorm(LENGTH).double(),
            {"pow2quant: integer root, one division": lambda q, k: ours(norm, q, k)},
        ),
    }


def table(module: m.Exact, codes: NDArray[np.int64], k: int) -> Floats:
    """What a table is made of: the function of every code, in float32."""
    return module.plain(torch.from_numpy(np.ldexp(codes.astype(np.float32), k))).double().numpy()


def main() -> None:
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    rng = np.random.default_rng(0)
    print("| function | in integers | largest error | mean error |\n|---|---|---|---|")
    for name, (function, integers) in candidates().items():
        for title, integer in integers.items():
            apart = []
            for k in EXPONENTS:
                codes = rng.integers(-128, 128, (ROWS, LENGTH))
                with torch.no_grad():
                    real = function(torch.from_numpy(np.ldexp(codes.astype(float), k))).numpy()
                    apart.append(np.abs(integer(codes, k) - real))
            print(f"| {name} | {title} | {max(a.max() for a in apart):.1e} | {np.mean(apart):.1e} |")


if __name__ == "__main__":
    main()
