"""Folders of images: what counts as a class or an image, what values images keep, and what resizing does to them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

from pow2quant import datasets
from pow2quant.cli import main
from pow2quant.config import DataConfig
from pow2quant.datasets.resizing import described, enlarging
from pow2quant.errors import ConfigError, DataError

RAW = DataConfig("imagefolder", resize=4, crop=4, mean=(0.0,), std=(1.0,), batch_size=64)
rng = np.random.default_rng(7)


def png(values: NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits per channel: (H, W) grey, or (H, W, 2) with alpha, 3 colours, 4 colours with alpha."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff(values: NDArray[np.generic], kind: int, white: bool = False, planar: bool = False) -> bytes:
    """An uncompressed TIFF of (H, W) or (H, W, 3); kind: 1 unsigned, 2 signed, 3 float.

    white: grey is white at 0. planar: a channel behind the other.
    """
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else 3
    bits, data = 8 * values.itemsize, values.tobytes()
    rest = 8 + 2 + 12 * 11 + 4
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, bits if channels == 1 else rest),
        (259, 3, 1, 1),
        (262, 3, 1, (0 if white else 1) if channels == 1 else 2),
        (273, 4, 1, rest + 6),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (284, 3, 1, 2 if planar else 1),
        (339, 3, 1, kind),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + struct.pack("<3H", *[bits] * 3) + data


def packed_tiff(values: NDArray[np.uint16]) -> bytes:
    """A TIFF of (H, W, 3), each row deflated by itself."""
    height, width, _ = values.shape
    strips = [zlib.compress(row.tobytes()) for row in values]
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [16] * 3), (259, 3, [8]), (262, 3, [2]), (273, 4, [])]
    tags += [(277, 3, [3]), (278, 4, [1]), (279, 4, [len(s) for s in strips]), (284, 3, [1]), (339, 3, [1] * 3)]
    behind = 8 + 2 + 12 * len(tags) + 4
    start = behind + 6 + 6 + 4 * 2 * height  # lists of three shorts twice, places and lengths of strips
    tags[5] = (273, 4, [start + sum(map(len, strips[:i])) for i in range(height)])
    entries, lists = b"", b""
    for tag, kind, content in tags:
        packed = struct.pack(f"<{len(content)}{'H' if kind == 3 else 'I'}", *content)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", behind + len(lists))
        lists += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, kind, len(content)) + place
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + lists + b"".join(strips)


def folder(path: Path, files: dict[str, bytes]) -> DataConfig:
    """A folder whose training and test images of one class are these."""
    for part in ("train", "test"):
        (path / part / "a").mkdir(parents=True)
        for name, data in files.items():
            (path / part / "a" / name).write_bytes(data)
    return DataConfig(**{**RAW.__dict__, "path": str(path)})


def only(config: DataConfig) -> torch.Tensor:
    """The only test image."""
    ((images, _),) = datasets.load(config).test
    return images[0]


def fill(path: Path, size: tuple[int, int] = (6, 5), count: int = 5) -> None:
    path.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path / f"{i}.png")


SHADES = rng.integers(0, 2**16, (4, 4), dtype=np.uint16)
COLOURS = rng.integers(0, 2**16, (4, 4, 4), dtype=np.uint16)
FLOATS = rng.random((4, 4), dtype=np.float32)
WHITE = np.float32(65535)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("grey.png", png(SHADES), SHADES / WHITE),
        ("grey.tif", tiff(SHADES, 1), SHADES / WHITE),
        ("grey.pgm", b"P5 4 4 65535\n" + SHADES.astype(">u2").tobytes(), SHADES / WHITE),
        ("float.tif", tiff(FLOATS, 3), FLOATS),
        ("white.tif", tiff(SHADES, 1, white=True), 1 - SHADES / WHITE),
        ("white_float.tif", tiff(FLOATS, 3, white=True), 1 - FLOATS),
        ("packed.tif", packed_tiff(COLOURS[..., :3]), COLOURS[..., :3].transpose(2, 0, 1) / WHITE),
        ("colours.png", png(COLOURS[..., :3]), COLOURS[..., :3].transpose(2, 0, 1) / WHITE),
        ("alpha.png", png(COLOURS), COLOURS[..., :3].transpose(2, 0, 1) / WHITE),
        ("colours.tif", tiff(COLOURS[..., :3].copy(), 1), COLOURS[..., :3].transpose(2, 0, 1) / WHITE),
    ],
)
def test_images_of_more_than_8_bits_keep_their_values(
    name: str, data: bytes, expected: NDArray[np.float64], tmp_path: Path
) -> None:
    image = only(folder(tmp_path, {name: data}))
    assert image.dtype == torch.float32
    assert torch.equal(image, torch.from_numpy(expected.astype(np.float32)).expand(3, 4, 4))


def test_a_16_bit_image_is_near_the_same_image_in_8_bits(tmp_path: Path) -> None:
    """Resized, cropped and normalized alike."""
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "8.png")
    one = folder(tmp_path / "deep", {"0.png": png(pixels.astype(np.uint16) * 257)})
    other = folder(tmp_path / "plain", {"0.png": (tmp_path / "8.png").read_bytes()})
    assert (only(one) - only(other)).abs().max() < 1 / 255


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("far.tif", tiff(FLOATS * 900, 3), "holds float values from "),
        ("negative.tif", tiff(FLOATS - 1, 3), "holds float values from "),
        ("nan.tif", tiff(FLOATS * np.float32("nan"), 3), "holds float values from nan to nan"),
        ("signed.tif", tiff(SHADES.astype(np.int16), 2), "holds values as TIFF I;16S"),
        ("wide.tif", tiff(SHADES.astype(np.int32), 2), "holds values as TIFF I;32S"),
        ("alpha.png", png(COLOURS[..., :2]), "holds values as PNG LA;16B"),
        ("planar.tif", tiff(COLOURS[..., :3].copy(), 1, planar=True), "holds one channel of more than 8 bits behind"),
        ("colours.ppm", b"P6 4 4 65535\n" + COLOURS[..., :3].astype(">u2").tobytes(), "holds values as PPM RGB"),
        ("double.tif", tiff(FLOATS.astype(np.float64), 3), "not a readable image"),
    ],
)
def test_images_whose_values_would_be_lost_are_refused_by_name(
    name: str, data: bytes, reason: str, tmp_path: Path
) -> None:
    config = folder(tmp_path, {name: data})
    with pytest.raises(DataError) as raised:
        only(config)
    assert str(raised.value).startswith(f"{tmp_path}/test/a/{name}: {reason}")
    assert "legal: 8 bits per channel" in str(raised.value) or reason.startswith("not")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_images_of_8_bits_are_what_pillow_makes_of_them(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).convert(mode)
    name = "0.tif" if mode in ("CMYK", "YCbCr") else "0.png"
    image.save(tmp_path / name)
    config = folder(tmp_path / "set", {name: (tmp_path / name).read_bytes()})
    assert torch.equal(only(config), transforms.ToTensor()(Image.open(tmp_path / name).convert("RGB")))


def test_hidden_folders_are_no_classes_and_hidden_files_no_images(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX"):
            fill(tmp_path / part / name)
        fill(tmp_path / part / "cat" / ".thumbnails")
        (tmp_path / part / "cat" / "._0.png").write_bytes(b"resource fork")
    fill(tmp_path / "test" / ".cache")
    data = datasets.load(DataConfig("imagefolder", str(tmp_path), resize=4, crop=4))
    assert data.class_names == ("cat", "dog")
    assert [len(images) for images, _ in data.test] == [10]
    assert sum(len(images) for images, _ in data.calibration) == 10


@pytest.mark.parametrize(("train", "test"), [("Training", "Testing"), ("train", "valid"), ("TRAIN", "Validation")])
def test_splits_are_known_by_their_usual_names(train: str, test: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / train / name)
        fill(tmp_path / test / name, count=3)
    data = datasets.load(DataConfig("imagefolder", str(tmp_path), resize=4, crop=4))
    assert data.class_names == ("a", "b")
    assert sum(len(images) for images, _ in data.test) == 6


def test_webp_is_read(tmp_path: Path) -> None:
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.webp", lossless=True)
    config = folder(tmp_path / "set", {"0.webp": (tmp_path / "0.webp").read_bytes()})
    assert torch.equal(only(config), transforms.ToTensor()(pixels))


def test_hidden_folders_are_no_classes_without_a_split(tmp_path: Path) -> None:
    for name in ("a", "b", ".git"):
        fill(tmp_path / name)
    data = datasets.load(DataConfig("imagefolder", str(tmp_path), resize=4, crop=4))
    assert (data.class_names, [labels.tolist() for _, labels in data.test]) == (("a", "b"), [[0, 1]])


def test_what_resizing_does_is_said(tmp_path: Path) -> None:
    fill(tmp_path / "a", (32, 32))
    fill(tmp_path / "b", (32, 32))
    bare = datasets.load(DataConfig("imagefolder", str(tmp_path)))
    assert bare.notes == ("images: 32x32 -> 256 -> 224 (shorter side 256, central 224x224)",)
    assert bare.warnings == (
        "images are enlarged, such as 32x32 to a shorter side of 256; if the network was trained on their own size, "
        "give --resize 32 --crop 32",
    )
    own = datasets.load(DataConfig("imagefolder", str(tmp_path), resize=32, crop=32))
    assert (own.notes, own.warnings) == (("images: 32x32 -> 32 -> 32 (shorter side 32, central 32x32)",), ())
    digits = datasets.load(DataConfig(resize=16))
    assert digits.notes == ("images: 8x8 -> 16 (shorter side 16)",)
    assert "8x8 to a shorter side of 16" in digits.warnings[0]
    assert datasets.load(DataConfig()).notes == ()


def test_images_of_several_sizes() -> None:
    sizes = [(500, 375), (20, 300), (640, 480)] + [(600, 400)] * 7
    assert described(sizes, 256, 224).startswith("images: 20x300 to 640x480 -> 256 -> 224 (")
    assert enlarging(sizes, 256) is None, "one of ten is no reason to warn"
    few = enlarging([*sizes, (30, 25)], 256)
    assert few is not None
    assert few.startswith("2 of 11 images are enlarged, such as 20x300 to a shorter side of 256")
    assert enlarging(sizes, None) is None


def test_a_crop_larger_than_the_images_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.crop: 9 is larger than the images, 8; give data\.resize too"):
        datasets.load(DataConfig(crop=9))


def test_a_function_that_cannot_follow_says_so(tmp_path: Path) -> None:
    file = tmp_path / "data.py"
    file.write_text("def load(): raise AssertionError")
    with pytest.raises(ConfigError, match=r"data\.crop: .*data\.py:load takes no argument, so it cannot follow"):
        datasets.load(DataConfig(f"{file}:load", crop=4))


@pytest.mark.parametrize("command", ["ptq", "qat", "search", "sweep", "compare"])
def test_labels_that_the_network_cannot_name_are_an_error(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        fill(tmp_path / "images" / name, (8, 8))
    (tmp_path / "net.py").write_text(NETWORK)
    flags = ["--model", f"{tmp_path}/net.py:network", "--data", "imagefolder", "--data-path", f"{tmp_path}/images"]
    extra = {"search": ["--constraint", "accuracy_drop=1%"], "sweep": ["--grid", "seed=0"], "compare": ["--seeds", "0"]}
    command_line = [command, *flags, "--resize", "8", *extra.get(command, []), "--output", str(tmp_path / "out")]
    assert main(command_line) == (1 if command in ("sweep", "compare") else 2)
    said = "".join(capsys.readouterr())
    assert "label 2 is no class of the network, which has 2 outputs; legal: 0 to 1" in said


NETWORK = """
from torch import nn
def network(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
"""


@pytest.mark.parametrize("command", ["ptq", "qat", "search", "sweep", "compare"])
def test_every_command_that_takes_data_takes_the_flags(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        fill(tmp_path / "images" / name, (12, 10))
    (tmp_path / "net.py").write_text(NETWORK)
    flags = ["--model", f"{tmp_path}/net.py:network", "--data", "imagefolder", "--data-path", f"{tmp_path}/images"]
    sized = [*flags, "--resize", "9", "--crop", "8", "--mean", "0.25", "--std", "0.5,0.5,0.5"]
    output = ["--output", str(tmp_path / "out"), "--method", "none"]
    extra = {
        "qat": ["--epochs", "1"],
        "search": ["--candidates", "4,8", "--constraint", "average_bits=6", "--objective", "accuracy"],
        "sweep": ["--grid", "quantization.weight.bitwidth=8"],
        "compare": ["--widths", "8:8", "--seeds", "0"],
    }
    assert main([command, *sized, *output, *extra.get(command, [])]) == 0
    assert "images: 12x10 -> 9 -> 8 (shorter side 9, central 8x8)" in capsys.readouterr().err
    assert main([command, *flags, "--mean", "0.5;0.5", *output]) == 2
    assert "--mean" in capsys.readouterr().err
