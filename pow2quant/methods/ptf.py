"""Power-of-two factors: every channel of a residual stream in front of norms gets a shift of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, fx, nn

from pow2quant.backends.base import SILENT, Batch, Progress
from pow2quant.config import QuantPlan, integer
from pow2quant.errors import DataError
from pow2quant.frontends import modules as m
from pow2quant.frontends.modules import CONVOLUTIONS
from pow2quant.frontends.operators import called
from pow2quant.methods.equalization import run_hooked

BITS = 8
"""For so many bits shifts are chosen where activations stay float."""


def squared_errors(x: Tensor, most: int, bits: int) -> Tensor:
    """The squared error of every channel of x (n, C) for shifts of 0 to `most`, in units of the step s, (most + 1, C).

    A channel with shift a has the step 2^a s, and the same codes as every other one. s is the step of the whole tensor
    by 2^most: s = (max - min) / (2^bits - 1) / 2^most (FQ-ViT, Lin et al. 2022, "Power-of-Two Factor").
    """
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    s = ((high - low) / (2**bits - 1) / 2**most).clamp(min=torch.finfo(torch.float32).tiny)
    ends = (low / s / 2**most).round(), (high / s / 2**most).round()
    units = (x / s).double()
    errors = [units - (units / 2**a).round().clamp(*ends) * 2**a for a in range(most + 1)]
    return torch.stack([error.square().sum(0) for error in errors])


@dataclass
class Stream:
    """Tensors that have the same channels: what sums and moves make of each other.

    norms: the nodes that read them. writers: what computes them, as (module, dimension of its channels in each of its
    parameters). broken: whether anything else reads or computes them; their channels then stay as they are.
    """

    norms: list[fx.Node] = field(default_factory=list)
    writers: list[tuple[nn.Module, int]] = field(default_factory=list)
    broken: bool = False


def streams(network: fx.GraphModule) -> list[Stream]:
    """The streams that norms over the last dimension read, and that can be scaled without another operation."""
    uses = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    found: list[Stream] = []
    seen: dict[fx.Node, int] = {}
    for node in network.graph.nodes:
        if _is_norm(network, node) and node.all_input_nodes[0] not in seen:
            found.append(_Tracer(network, uses, calls, seen).stream(node.all_input_nodes[0]))
    return [stream for stream in found if not stream.broken]


def _is_norm(network: fx.GraphModule, node: fx.Node) -> bool:
    module = called(network, node)
    return isinstance(module, m.ShiftedNorm) and len(module.normalized_shape) == 1


class _Tracer:
    """Follows one stream through the graph. seen: by node, how many dimensions from the end its channels lie."""

    def __init__(
        self, network: fx.GraphModule, uses: Counter[int], calls: Counter[Any], seen: dict[fx.Node, int]
    ) -> None:
        self.network, self.uses, self.calls, self.seen = network, uses, calls, seen
        self.found = Stream()

    def stream(self, node: fx.Node) -> Stream:
        pending = [(node, 1)]
        while pending:
            node, place = pending.pop()
            if node in self.seen:
                self.found.broken |= self.seen[node] != place
                continue
            self.seen[node] = place
            pending += self._sources(node, place)
            for user in node.users:
                pending += self._read(user, node, place)
        return self.found

    def _sources(self, node: fx.Node, place: int) -> list[tuple[fx.Node, int]]:
        """What has the same channels in front of a node; a writer is noted."""
        module, rank = called(self.network, node), len(node.meta["shape"])
        if isinstance(module, (m.Add, m.Sub, m.Concat)):
            self.found.broken |= isinstance(module, m.Concat) and module.dim % rank == rank - place
            return [(source, place) for source in node.all_input_nodes]
        if module is not None and (before := _moved(module, node, place)) is not None:
            return [(node.all_input_nodes[0], before)]
        own = None if module is None else _written(module, rank, place)
        alone = module is not None and all(self.uses[id(p)] == 1 for p in module.parameters())
        if module is None or own is None or not alone or self.calls[node.target] > 1:
            self.found.broken = True
        else:
            self.found.writers.append((module, own))
        return []

    def _read(self, user: fx.Node, node: fx.Node, place: int) -> list[tuple[fx.Node, int]]:
        """What has the same channels behind a node; a norm is noted."""
        module = called(self.network, user)
        if module is None:  # it is a result of the network
            self.found.broken = True
            return []
        if _is_norm(self.network, user):
            self.found.norms.append(user)
            self.found.broken |= place != 1 or self.calls[user.target] > 1
            return []
        if isinstance(module, (m.Add, m.Sub, m.Concat)):
            return [(user, place)]
        rank = len(user.meta["shape"]) if user.all_input_nodes[0] is node else 0
        for behind in range(1, rank + 1):
            if _moved(module, user, behind) == place:
                return [(user, behind)]
        self.found.broken |= not (isinstance(module, m.Expand) and user.all_input_nodes[0] is not node)
        return []


def _moved(module: nn.Module, node: fx.Node, place: int) -> int | None:
    """Where the channels of a moved tensor lie in front of the move, from the end; None where it is no such move."""
    before, after = node.all_input_nodes[0].meta["shape"] if node.all_input_nodes else (), node.meta["shape"]
    axis, channels = len(after) - place, after[len(after) - place]
    if isinstance(module, m.Permute):
        return len(before) - module.dims[axis] % len(before)
    if isinstance(module, m.Slice):
        return None if any(int(cut[0]) % len(before) == axis for cut in module.slices) else place
    if isinstance(module, m.Take):
        return None if module.dim % len(before) == axis else place
    if isinstance(module, m.ZeroPad):
        return None if any(module.pads[2 * (place - 1) : 2 * place]) else place
    if isinstance(module, m.Expand):
        return place if len(before) == len(after) and module.dim % len(after) != axis else None
    if isinstance(module, (m.Reshape, nn.Flatten)):
        inner = torch.Size(after[axis + 1 :]).numel()
        places = [p for p in range(1, len(before) + 1) if before[len(before) - p] == channels]
        return next((p for p in places if torch.Size(before[len(before) - p + 1 :]).numel() == inner), None)
    return None


def _written(module: nn.Module, rank: int, place: int) -> int | None:
    """The dimension, from the end, of a writer's parameters that holds the channels; 0: their first one."""
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return 0 if place == (1 if isinstance(module, nn.Linear) else rank - 1) else None
    if isinstance(module, m.Constant):
        value = module.value
        return place if value.ndim >= place and value.shape[-place] > 1 else None
    is_norm = isinstance(module, m.ShiftedNorm) and len(module.normalized_shape) == 1 and module.weight is not None
    return 1 if place == 1 and (is_norm or isinstance(module, m.Embedding)) else None


@dataclass(frozen=True)
class Ptf:
    """Power-of-two factors for residual streams in front of LayerNorm and RMSNorm, a shift for each channel.

    FQ-ViT's (Lin et al. 2022), one vector of shifts for a whole stream: they go into the layers that write it, which
    keep one exponent for each output channel, and come back as shifts inside the norms that read it. So no operation is
    added, and the float network computes the same bits. most: the largest shift, K. A stream stays as it is where
    anything but sums, moves and norms over the last dimension reads it, as behind the norms of a post-norm encoder.
    """

    deterministic: ClassVar[bool] = True

    most: Annotated[int, integer(1, 8)] = 3

    @torch.no_grad()
    def rewrite(
        self,
        network: fx.GraphModule,
        batches: Iterable[Batch],
        progress: Progress = SILENT,
        plan: QuantPlan | None = None,
    ) -> fx.GraphModule:
        """Rewrites in place, and returns the network. Raises DataError for no batches."""
        found = streams(network)
        bits = BITS if plan is None or plan.output is None else plan.output.bits
        errors = self._errors(network, [node for stream in found for node in stream.norms], batches, bits)
        for stream in found:
            shifts = torch.stack([errors[str(node.target)] for node in stream.norms]).sum(0).argmin(0)
            shifts = (shifts - shifts.min()).float()
            for module, dimension in stream.writers:
                _divide(module, dimension, shifts.exp2())
            for node in stream.norms:
                norm = network.get_submodule(str(node.target))
                norm.register_buffer("shifts", shifts + getattr(norm, "shifts", 0.0))
        progress.note(f"ptf: {len(found)} streams in front of {sum(len(s.norms) for s in found)} norms")
        return network

    def _errors(
        self, network: fx.GraphModule, norms: list[fx.Node], batches: Iterable[Batch], bits: int
    ) -> dict[str, Tensor]:
        """The `squared_errors` of what enters each norm, by module, added up over the batches."""
        total: dict[str, Tensor] = {}

        def look(name: str, module: nn.Module, entering: tuple[Tensor, ...]) -> None:
            total[name] = total.get(name, 0.0) + squared_errors(entering[0].flatten(0, -2), self.most, bits)

        names = [str(node.target) for node in norms]
        hooks = [network.get_submodule(n).register_forward_pre_hook(partial(look, n)) for n in names]
        run_hooked(network, batches, hooks)
        if hooks and not total:
            raise DataError("the calibration data are empty")
        return total


def _divide(module: nn.Module, dimension: int, factors: Tensor) -> None:
    """Divides a writer's channels by factors (C,); dimension: of its parameters, from the end; 0: the first one."""
    for parameter in module.parameters():
        behind = dimension - 1 if dimension else parameter.ndim - 1
        parameter.div_(factors.view(-1, *[1] * behind))
