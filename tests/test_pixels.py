"""`--input pixels`: the normalization in the first layer, exact for every padding; bytes through all executors."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant import config, runs
from pow2quant.artifact import takes_pixels
from pow2quant.backends.fold import fold_batch_norm
from pow2quant.backends.pixels import fold_normalization
from pow2quant.config import RunConfig
from pow2quant.errors import ConfigError, DataError, UnsupportedModelError
from pow2quant.frontends.prepare import prepare
from pow2quant.runs.pixels import Pixels

MEAN, STD = (0.2, 0.4, 0.6), (0.25, 0.5, 0.2)  # 255 * mean is whole: the padding is exact
WHOLE = (51 / 255, 102 / 255, 153 / 255)


class Two(nn.Module):
    """Two convolutions read the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3)],
        [nn.Conv2d(3, 4, 3, padding=1, bias=False)],
        [nn.Conv2d(3, 4, 5, padding=(2, 1), stride=2, dilation=2)],
        [nn.Conv2d(3, 4, (5, 3), padding="same")],
        [nn.Conv2d(3, 6, 3, padding=1, groups=3)],
        [nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(3, 4, 3, padding=1)],
        [Two()],
    ],
    ids=["bare", "padded", "strided", "same", "grouped", "zero-pad", "two readers"],
)
@pytest.mark.parametrize("mean", [WHOLE, WHOLE[:1]])
def test_the_folded_network_is_the_float_one_on_pixels(layers: list[nn.Module], mean: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    how = Pixels(mean, STD[: len(mean)], 255)
    model = nn.Sequential(*layers, nn.ReLU()).eval()
    pixels = torch.randint(0, 256, (2, 3, 9, 9)).float()
    expected = model(how.normalized(pixels))
    network = fold_normalization(fold_batch_norm(prepare(model, how.normalized(pixels))), how.mean, how.std, how.white)
    assert torch.allclose(network(pixels), expected, atol=2e-5)


def test_padding_is_rounded_to_the_nearest_pixel() -> None:
    model, pixels = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1)).eval(), torch.full((1, 3, 4, 4), 100.0)
    network = fold_normalization(prepare(model, pixels), (0.485, 0.456, 0.406), STD, 255)
    weight, bias = network.get_parameter("0.weight"), network.get_parameter("0.bias")
    padded = torch.stack([F.pad(pixels[:, c], (1,) * 4, value=v) for c, v in enumerate((124.0, 116.0, 104.0))], 1)
    assert torch.allclose(network(pixels), F.conv2d(padded, weight, bias), atol=1e-6)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Residual(), r"add \(Add\) reads the network's input"),
        (nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 2, 1)), r"0 \(MaxPool2d\) reads"),
        (nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 2, 3)), r"reads the network's input"),
    ],
)
def test_what_cannot_take_the_normalization_is_one_error(model: nn.Module, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        fold_normalization(prepare(model.eval(), torch.rand(1, 3, 8, 8)), MEAN, STD, 255)


def test_values_that_are_no_pixels_are_named() -> None:
    how = Pixels(MEAN, STD, 255)
    pixels = torch.randint(0, 256, (4, 3, 5, 5)).float()
    assert torch.equal(how.pixels(how.normalized(pixels), "test"), pixels)
    with pytest.raises(DataError, match="test, batch 0: --input pixels, but"):
        how.pixels(how.normalized(pixels + 0.3), "test, batch 0")
    with pytest.raises(DataError, match="gives no bytes"):
        how.pixels(how.normalized(pixels + 20), "test")


DATA = """
import torch
from torch import nn
from torch.utils.data import TensorDataset



def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(72, 4)
    )

def data(config):
    torch.manual_seed(0)
    pixels, labels = torch.randint(0, 200, (192, 3, 10, 10)), torch.randint(0, 4, (192,))
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean or (0.0,), config.std or (1.0,)))
    images = (pixels / 255 - mean) / std
    return TensorDataset(images[:64], labels[:64]), TensorDataset(images[64:], labels[64:])
"""


def configured(folder: Path, **values: object) -> RunConfig:
    (folder / "own.py").write_text(DATA)
    chosen = {"model.name": f"{folder}/own.py:network", "data.dataset": f"{folder}/own.py:data"}
    chosen |= {"data.mean": [0.485, 0.456, 0.406], "data.std": [0.229, 0.224, 0.225], "data.input": "pixels"}
    chosen |= {"report.statistics": False, "report.latency": False}
    return config.with_values(RunConfig(), chosen | values)


def test_a_run_on_pixels_is_proved_and_says_what_it_takes(tmp_path: Path) -> None:
    result = runs.ptq(configured(tmp_path), tmp_path / "run")
    report = result.report
    assert (report["input"], report["verdict"]["claim"]) == ("pixels", "proved")
    model = onnx.load(tmp_path / "run" / "model.onnx")
    assert takes_pixels(model)
    name = model.graph.input[0].name
    detail = report["final_quantization_details"][name]
    assert (detail["scale"], detail["zero_point"], detail["signed"], detail["bitwidth"]) == (1.0, 0, False, 8)
    plain = runs.ptq(configured(tmp_path, **{"data.input": "float"}), tmp_path / "f")
    assert report["initial_accuracy"] == plain.report["initial_accuracy"]
    assert report["final_sqnr_db"] > plain.report["final_sqnr_db"] - 1
    assert not takes_pixels(onnx.load(tmp_path / "f" / "model.onnx"))
    validated = runs.validate(tmp_path / "run")
    assert validated.agrees
    runs.export(tmp_path / "run", "c")
    assert "bytes as the camera gives them" in (tmp_path / "run" / "export" / "c" / "model.h").read_text()
    runs.export(tmp_path / "run", "integers")
    assert json.loads((tmp_path / "run" / "export" / "integers" / "program.json").read_text())["pixels"]
    assert "bytes as the camera" in (tmp_path / "run" / "export" / "integers" / "README.md").read_text()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data.mean": None}, "needs data.mean and data.std"),
        ({"quantization.input.bitwidth": 16}, "needs quantization.input as a byte"),
        ({"quantization.input.symmetric": True}, "needs quantization.input as a byte"),
    ],
)
def test_what_pixels_need_is_named(values: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        runs.ptq(configured(tmp_path, **values), tmp_path / "run")
