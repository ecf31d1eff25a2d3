"""Log2-quantized attention: probabilities become powers of two, so that their product with the values is shifts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import fx

from pow2quant.backends.base import SILENT, Batch, Progress
from pow2quant.config import integer
from pow2quant.frontends import modules as m
from pow2quant.frontends.kept import MOVES
from pow2quant.frontends.operators import called


def attentions(network: fx.GraphModule) -> list[fx.Node]:
    """Each softmax along the last axis whose result nothing but products of two activations reads, as the first one."""
    return [
        node
        for node in network.graph.nodes
        if isinstance(softmax := called(network, node), (m.Softmax, m.MaskedSoftmax))
        and (softmax.dim or 0) % len(node.meta["shape"]) == len(node.meta["shape"]) - 1
        and _is_weighed(network, node)
    ]


def _is_weighed(network: fx.GraphModule, node: fx.Node) -> bool:
    return bool(node.users) and all(
        (isinstance(called(network, user), m.MatMul) and user.args[0] is node and user.args[1] is not node)
        or (isinstance(called(network, user), MOVES) and _is_weighed(network, user))
        for user in node.users
    )


@dataclass(frozen=True)
class Log2Attention:
    """The probabilities of attention have so many bits on a log2 grid: 1, 1/2, 1/4, … and 0.

    FQ-ViT's Log-Int-Softmax (Lin et al. 2022): a code is round(-log2(p)), clipped, and its product with the values a
    shift. The integer softmax then needs no division (`pow2quant.functions.Softmax`, levels). bits: 2^bits codes, the
    last of them for 0; a code of 4 bits stands for up to 2^-14, and the files hold such a value in 16 bits.
    """

    deterministic: ClassVar[bool] = True

    bits: Annotated[int, integer(2, 4)] = 4

    @torch.no_grad()
    def rewrite(self, network: fx.GraphModule, batches: Iterable[Batch], progress: Progress = SILENT) -> fx.GraphModule:
        """Changes the softmaxes in place, and returns the network; in float it computes what it did."""
        found = attentions(network)
        for node in found:
            softmax = called(network, node)
            assert isinstance(softmax, m.ExactSoftmax)  # `attentions` has no others
            softmax.levels = 2**self.bits - 1
        progress.note(f"log2_attention: {len(found)} softmaxes")
        return network
