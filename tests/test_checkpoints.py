"""Checkpoints as people have them give the network that they were saved of; all else is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from pow2quant import models
from pow2quant.errors import WeightsError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()


def changed(change: Callable[[nn.Sequential], Any]) -> nn.Module:
    made = network()
    change(made)
    return made


def pruned(net: nn.Sequential) -> None:
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.l1_unstructured(net[3], "bias", 0.5)


class Within(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"model": network()})

    def forward(self, x: torch.Tensor) -> Any:
        return self.net["model"](x)


State = dict[str, Any]
SAVED: dict[str, tuple[Callable[[], nn.Module], Callable[[State], Any]]] = {
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(network()).eval(), lambda s: s),
    "averaged alone": (lambda: torch.optim.swa_utils.AveragedModel(network()).eval(), lambda s: {"model_ema": s}),
    "timm": (network, lambda s: {"state_dict": s, "state_dict_ema": {k: 0 * v for k, v in s.items()}}),
    "lightning": (network, lambda s: {"state_dict": prefixed("model.", s) | {"criterion.weight": torch.ones(2)}}),
    "two prefixes": (Within, lambda s: s),
    "parallel and compiled": (network, lambda s: {"model": prefixed("module._orig_mod.", s)}),
    "counted by thop": (network, lambda s: s | {"total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)}),
    "pruned": (lambda: changed(pruned), lambda s: s),
    "weight norm": (lambda: changed(lambda net: parametrizations.weight_norm(net[3])), lambda s: s),
    "weight norm as it was": (
        lambda: changed(lambda net: parametrizations.weight_norm(net[0])),
        lambda s: {
            k.replace("0.parametrizations.weight.original0", "0.weight_g").replace(
                "0.parametrizations.weight.original1", "0.weight_v"
            ): v
            for k, v in s.items()
        },
    ),
    "params": (network, lambda s: {"params": s, "epoch": 3}),
}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("name", SAVED)
def test_it_is_the_network_that_was_saved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, saved = SAVED[name]
    source, images = make(), torch.rand(2, 1, 8, 8)
    torch.save(saved(dict(source.state_dict())), tmp_path / "checkpoint.pth")
    loaded = network()
    models.load_weights(loaded, tmp_path / "checkpoint.pth")
    with torch.no_grad():
        assert torch.equal(loaded(images), source(images))


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (lambda s: prefixed("model.", {k: v for k, v in s.items() if k != "0.weight"}), "6 unexpected|missing"),
        (lambda s: s | {"mask": torch.ones(3)}, "1 unexpected \\(mask\\)"),
        (lambda s: {"optimizer": {}, "epoch": 1}, "holds no state dict"),
    ],
)
def test_what_does_not_fit_is_still_an_error(saved: Callable[[State], Any], expected: str, tmp_path: Path) -> None:
    torch.save(saved(dict(network().state_dict())), tmp_path / "checkpoint.pth")
    with pytest.raises(WeightsError, match=expected):
        models.load_weights(network(), tmp_path / "checkpoint.pth")
