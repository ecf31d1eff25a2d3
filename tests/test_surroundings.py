"""What a program has set up around a call: threads, gradients that are off, autocast."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pow2quant
from pow2quant.config import from_mapping
from pow2quant.errors import ConfigError, DataError, ModelError
from pow2quant.three_steps import qat

QUICK = {"report": {"statistics": False, "latency": False}}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).eval()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(24, 3, 6, 6), torch.arange(24) % 3


def quantized(model: nn.Module, data: tuple[Tensor, Tensor], **options: object) -> Tensor:
    result = pow2quant.quantize(model, data, progress=False, config=QUICK, **options)  # type: ignore[arg-type]
    assert result.agrees
    found: Tensor = result.model(data[0])
    return found


def test_several_threads_quantize_at_a_time(data: tuple[Tensor, Tensor]) -> None:
    networks = [network(seed) for seed in range(3)]
    alone = [quantized(model, data) for model in networks]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda model: quantized(model, data), networks))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_gradients_that_are_off_are_on_where_something_learns(data: tuple[Tensor, Tensor]) -> None:
    methods = [{"adaround": {"iterations": 5}}]
    with torch.no_grad():
        without = quantized(network(), data, methods=methods)
    assert torch.equal(without, quantized(network(), data, methods=methods))


def test_autocast_is_to_be_left_first(data: tuple[Tensor, Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match=r"torch\.autocast is on"):
        quantized(network(), data)


def test_a_bias_of_few_bits_takes_the_default_method(data: tuple[Tensor, Tensor]) -> None:
    config = QUICK | {"quantization": {"bias": {"bitwidth": 8}}}
    for seed in range(3):
        assert pow2quant.quantize(network(seed), data, progress=False, config=config).agrees


def test_maps_without_channels_are_images_and_vectors_are_none(data: tuple[Tensor, Tensor]) -> None:
    class Depth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(3, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[:, 0].sigmoid()

    images = data[0], torch.rand(24, 6, 6)
    result = pow2quant.quantize(Depth().eval(), images, task="image-to-image", progress=False, config=QUICK)
    assert list(result.report["metrics"]) == ["psnr", "ssim"]
    with pytest.raises(DataError, match=r"outputs of the network are \(24, 3\); images are"):
        quantized(network(), (data[0], torch.rand(24, 3)), task="image-to-image")


def test_a_teacher_that_takes_other_inputs_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def network(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "def teacher(): return nn.Linear(5, 10)\n"
    )
    training = {"epochs": 1, "distillation": 0.5, "teacher": {"name": f"{tmp_path}/mine.py:teacher"}}
    with pytest.raises(ModelError, match=r"training\.teacher: .*teacher fails on a sample of the data"):
        qat(from_mapping({"model": {"name": f"{tmp_path}/mine.py:network"}, "training": training}), tmp_path / "run")
