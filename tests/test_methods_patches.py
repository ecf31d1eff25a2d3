"""Patches of a layer's input: with its weights they make its output, all of them or some."""

import math

import pytest
import torch
from torch import nn

from pow2quant import prepare
from pow2quant.backends.pixels import fold_normalization
from pow2quant.methods.patches import patches, some_patches

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear of a sequence": (nn.Linear(6, 4), (5, 3, 6)),
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 8)),
    "oblong": (nn.Conv2d(4, 6, (3, 1), padding=(0, 2), dilation=(2, 1)), (2, 4, 7, 8)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (2, 4, 7, 8)),
    "one-sided": (nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4, 7, 8)),
    "one dimension": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_is_its_patches_times_its_weights(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    expected = expected.flatten(0, -2) if isinstance(layer, nn.Linear) else expected.movedim(1, -1).flatten(0, -2)
    found = patches(layer, x)
    weight = layer.weight.view(len(found), -1, found.shape[2])
    product = (found @ weight.mT).movedim(0, 1).flatten(1) + layer.bias
    torch.testing.assert_close(product, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("linear")])
@pytest.mark.parametrize("most", [1, 5, 20, 1000])
def test_some_patches_are_spread_over_every_image(name: str, most: int) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = patches(layer, x).mT.unflatten(2, (len(x), -1))
    step = math.ceil(whole.shape[3] / most) | 1
    assert torch.equal(some_patches(layer, x, most), whole[..., ::step].flatten(2))


def test_of_a_layer_that_takes_pixels_too() -> None:
    """Its padding is in front of it from then on."""
    x = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    network = prepare(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), x)
    fold_normalization(network, (0.5,) * 3, (0.25,) * 3, 255)
    (layer,) = (m for m in network.modules() if isinstance(m, nn.Conv2d))
    assert patches(layer, x).shape == (1, 2 * 6 * 6, 27)
    assert some_patches(layer, x, 1000).shape == (1, 27, 2 * 6 * 6)
