"""Data: what comes out of the batches, bit for bit, and what is said about a folder that is wrong."""

from __future__ import annotations

import pickle
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import transforms

from pow2quant import datasets
from pow2quant.config import DataConfig
from pow2quant.datasets.settings import DEFAULTS
from pow2quant.errors import ConfigError, DataError
from tests.reading import all_of, complaint

CIFAR = DataConfig("cifar10", batch_size=7)


rng = np.random.default_rng(0)


def test_digits_are_split_by_class_and_scaled():
    data = datasets.load(DataConfig(batch_size=100))
    (calibration, labels), (test, test_labels) = all_of(data.calibration), all_of(data.test)
    assert (len(calibration), len(test), data.num_classes, data.input_shape) == (1347, 450, 10, (1, 8, 8))
    assert data.class_names == tuple("0123456789")
    bunch = load_digits()
    split = train_test_split(bunch.images, bunch.target, test_size=0.25, stratify=bunch.target, random_state=0)
    assert np.array_equal(test[:, 0].numpy() * 16, split[1])
    assert np.array_equal(test_labels.numpy(), split[3])
    rows = {image.tobytes(): label for image, label in zip(bunch.images, bunch.target, strict=True)}
    both = torch.cat([calibration, test])
    assert {(image * 16).double().numpy().tobytes() for image in both} == rows.keys()
    assert [rows[(image * 16).double().numpy().tobytes()] for image in both] == torch.cat(
        [labels, test_labels]
    ).tolist()
    assert (both.dtype, labels.dtype) == (torch.float32, torch.int64)
    counts = torch.bincount(test_labels), torch.bincount(torch.cat([labels, test_labels]))
    assert ((counts[0] / counts[1] - 0.25).abs() < 0.01).all()


def test_calibration_is_in_one_shuffled_order_whatever_the_seed():
    torch.manual_seed(1)
    images, labels = all_of(datasets.load(DataConfig()).calibration)
    torch.manual_seed(2)
    data = datasets.load(DataConfig(batch_size=33))
    for _ in range(2):
        again, _ = all_of(data.calibration)
        assert torch.equal(images, again)
    assert len(set(labels[:64].tolist())) == 10
    assert len(data.calibration) == -(-1347 // 33)


def test_training_batches_follow_torchs_generator():
    data = datasets.load(DataConfig(batch_size=64), train_batch_size=100)
    assert len(data.train) == 13
    torch.manual_seed(5)
    first, second = all_of(data.train)[0], all_of(data.train)[0]
    assert len(first) == 1300
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    all_of(data.calibration), all_of(data.test)  # reading these takes no number from the generator
    assert torch.equal(all_of(data.train)[0], first)


def cifar_arrays(train: int = 23, test: int = 9) -> dict[str, np.ndarray]:
    return {
        "train_x": rng.integers(0, 256, (train, 32, 32, 3), dtype=np.uint8),
        "train_y": rng.integers(0, 10, train),
        "test_x": rng.integers(0, 256, (test, 32, 32, 3), dtype=np.uint8),
        "test_y": np.arange(test) % 10,
    }


@pytest.fixture
def archive(tmp_path):
    arrays = cifar_arrays()
    np.savez(tmp_path / "cifar10.npz", **arrays)
    return replace(CIFAR, path=str(tmp_path)), arrays


def through_torchvision(arrays: np.ndarray, mean, std) -> torch.Tensor:
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    return torch.stack([transform(Image.fromarray(array)) for array in arrays])


def test_cifar10_is_normalized_as_torchvision_does_to_the_last_bit(archive):
    config, arrays = archive
    data = datasets.load(config)
    images, labels = all_of(data.test)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    assert torch.equal(images, through_torchvision(arrays["test_x"], mean, std))
    assert labels.tolist() == arrays["test_y"].tolist()
    assert (data.class_names[:2], data.input_shape) == (("airplane", "automobile"), (3, 32, 32))
    other, _ = all_of(datasets.load(replace(config, mean=(0.5,), std=(0.25,))).test)
    assert torch.equal(other, through_torchvision(arrays["test_x"], (0.5,) * 3, (0.25,) * 3))


def test_calibration_images_are_the_training_images_as_they_are(archive):
    config, arrays = archive
    images, labels = all_of(datasets.load(replace(config, mean=(0.0,), std=(1.0,))).calibration)
    found = sorted(
        (image.mul(255).round().byte().permute(1, 2, 0).numpy().tobytes(), int(y))
        for image, y in zip(images, labels, strict=True)
    )
    assert found == sorted((x.tobytes(), int(y)) for x, y in zip(arrays["train_x"], arrays["train_y"], strict=True))


def test_training_images_of_cifar10_are_shifted_and_flipped(tmp_path):
    arrays = cifar_arrays(train=1)
    np.savez(tmp_path / "cifar10.npz", **arrays)
    data = datasets.load(replace(CIFAR, path=str(tmp_path), mean=(0.0,), std=(1.0,)))
    padded = np.pad(arrays["train_x"][0], ((4, 4), (4, 4), (0, 0)))
    crops = {
        padded[y : y + 32, x : x + 32][:, ::step].tobytes(): (y, x, step)
        for y in range(9)
        for x in range(9)
        for step in (1, -1)
    }
    seen = set()
    for _ in range(200):
        ((images, _),) = data.train
        seen.add(crops[images[0].mul(255).round().byte().permute(1, 2, 0).numpy().tobytes()])
    assert {step for _, _, step in seen} == {1, -1}
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9))


def test_ten_thousand_images_take_well_under_two_seconds(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **cifar_arrays(train=10, test=10_000))
    start = time.process_time()
    data = datasets.load(replace(CIFAR, path=str(tmp_path), batch_size=250))
    assert sum(len(images) for images, _ in data.test) == 10_000
    assert time.process_time() - start < 2


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did, and names numpy's functions as numpy 1 did: what CIFAR-10 is made of."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_text(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    def save_global(self, value, name=None):
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or value.__name__}\n".encode())
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text
    dispatch[type(np.ndarray.__reduce__)] = dispatch[type] = dispatch[type(save_text)] = dispatch[type(len)] = (
        save_global
    )


@pytest.fixture
def python_batches(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    arrays = cifar_arrays(train=25)
    parts = {f"data_batch_{i + 1}": ("train", slice(5 * i, 5 * i + 5)) for i in range(5)}
    for name, (part, where) in {**parts, "test_batch": ("test", slice(None))}.items():
        planes = arrays[f"{part}_x"][where].transpose(0, 3, 1, 2).reshape(-1, 3072)
        batch = {
            "batch_label": name,
            "data": np.ascontiguousarray(planes),
            "labels": arrays[f"{part}_y"][where].tolist(),
        }
        with (folder / name).open("wb") as file:
            Python2Pickler(file, protocol=2).dump(batch)
    return replace(CIFAR, path=str(tmp_path)), arrays, folder


def test_cifar10_in_its_original_files(python_batches, tmp_path):
    config, arrays, folder = python_batches
    np.savez(tmp_path / "same.npz", **arrays)
    same = datasets.load(replace(config, path=str(tmp_path / "same.npz")))
    for path in (tmp_path, folder):
        data = datasets.load(replace(config, path=str(path)))
        for part in ("calibration", "test"):
            for ours, theirs in zip(all_of(getattr(data, part)), all_of(getattr(same, part)), strict=True):
                assert torch.equal(ours, theirs)


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_damaged_cifar10_files_are_named(python_batches, tmp_path):
    config, _, folder = python_batches
    whole = (folder / "test_batch").read_bytes()
    for content in (b"", whole[:1000], pickle.dumps({"data": np.zeros((2, 7)), "labels": [1, 2]}), pickle.dumps([1])):
        (folder / "test_batch").write_bytes(content)
        assert "test_batch: not a CIFAR-10 batch" in complaint(config)
    (folder / "test_batch").write_bytes(pickle.dumps(Intruder(tmp_path / "victim")))
    said = complaint(config)
    assert any(f"test_batch: not a CIFAR-10 batch (holds {name})" in said for name in ("io.open", "_io.open")), said
    assert not (tmp_path / "victim").exists()
    (folder / "data_batch_4").unlink()
    assert "data_batch_4: is missing; expected data_batch_1 ... data_batch_5 and test_batch" in complaint(config)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"test_y": np.full(9, 10)}, "label 10 is no class; legal: 0 to 9"),
        ({"test_y": np.zeros(8, int)}, "expected 9 integer labels, got (8,) int64"),
        ({"test_x": np.zeros((9, 3, 32, 32), np.uint8)}, "expected images of (N, 32, 32, 3) uint8, got (9, 3, 32, 32)"),
        ({"test_x": np.zeros((9, 32, 32, 3), np.float32)}, "expected images of (N, 32, 32, 3) uint8"),
        ({"test_x": np.zeros((0, 32, 32, 3), np.uint8), "test_y": np.zeros(0, int)}, "the test set is empty"),
    ],
)
def test_a_wrong_archive_is_named(change, expected, tmp_path):
    np.savez(tmp_path / "cifar10.npz", **{**cifar_arrays(), **change})
    assert expected in complaint(replace(CIFAR, path=str(tmp_path)))


def test_a_truncated_archive_is_named(archive, tmp_path):
    file = tmp_path / "cifar10.npz"
    file.write_bytes(file.read_bytes()[:5000])
    assert "cifar10.npz: expected train_x, train_y, test_x, test_y" in complaint(archive[0])


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = {
        "train": rng.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        "t10k": rng.integers(0, 256, (4, 28, 28), dtype=np.uint8),
    }
    for part, images in arrays.items():
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(len(images), dtype=np.uint8) % 10))
    return DataConfig("mnist", str(tmp_path)), arrays["t10k"], raw


def test_mnist_in_its_original_files(mnist):
    config, pixels, raw = mnist
    data = datasets.load(config)
    images, labels = all_of(data.test)
    assert torch.equal(images, through_torchvision(pixels, (0.1307,), (0.3081,)))
    assert labels.tolist() == [0, 1, 2, 3]
    assert (data.input_shape, data.num_classes) == ((1, 28, 28), 10)
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0\0")
    assert "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte" in complaint(config)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    assert "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte" in complaint(config)


def write_images(folder, count: int, size=(20, 16), start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")


@pytest.fixture(params=["test", "val"])
def tree(request, tmp_path):
    for label, name in enumerate(["cat", "dog"]):
        write_images(tmp_path / "train" / name, 3 + label)
        write_images(tmp_path / request.param / name, 2)
    return DataConfig("imagefolder", str(tmp_path), batch_size=3, resize=10, crop=8), tmp_path, request.param


def test_a_folder_of_images_with_a_split(tree):
    config, path, test = tree
    data = datasets.load(config)
    assert (data.class_names, data.num_classes, data.input_shape) == (("cat", "dog"), 2, (3, 8, 8))
    images, labels = all_of(data.test)
    steps = [transforms.Resize(10), transforms.CenterCrop(8), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    files = [*sorted((path / test / "cat").iterdir()), *sorted((path / test / "dog").iterdir())]
    assert torch.equal(images, torch.stack([transform(Image.open(file)) for file in files]))
    assert labels.tolist() == [0, 0, 1, 1]
    assert sorted(all_of(data.calibration)[1].tolist()) == [0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(all_of(data.calibration)[0], all_of(data.calibration)[0])
    assert len(all_of(data.train)[0]) == 6  # seven images in batches of three: the odd one waits for its turn


def test_a_test_folder_without_classes_gives_way_to_val(tree):
    config, path, test = tree
    if test == "val":
        (path / "test").mkdir()
        (path / "test" / "unlabelled.png").write_bytes(next((path / "val" / "cat").iterdir()).read_bytes())
    assert len(all_of(datasets.load(config).test)[1]) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_no_image_is_named(tree, workers):
    config, path, test = tree
    (path / test / "cat" / "001.png").write_bytes(b"this is no image")
    expected = f"{path / test / 'cat' / '001.png'}: not a readable image"
    assert complaint(replace(config, workers=workers)).startswith(expected)


def test_a_folder_without_a_split_is_split_by_class(tmp_path):
    write_images(tmp_path / "b", 11)
    write_images(tmp_path / "a", 7)
    config = DataConfig("imagefolder", str(tmp_path), batch_size=4, resize=16)
    data = datasets.load(config)
    assert data.class_names == ("a", "b")
    assert all_of(data.test)[1].tolist() == [0, 1, 1]
    assert sorted(all_of(data.calibration)[1].tolist()) == [0] * 6 + [1] * 9
    names = ["a/004.png", "b/004.png", "b/009.png"]
    transform = transforms.Compose([transforms.CenterCrop(16), transforms.ToTensor()])
    plain = datasets.load(replace(config, mean=(0.0,), std=(1.0,)))
    assert torch.equal(all_of(plain.test)[0], torch.stack([transform(Image.open(tmp_path / name)) for name in names]))


def test_images_without_classes_have_no_labels(tmp_path):
    write_images(tmp_path, 7)
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    data = datasets.load(DataConfig("imagefolder", str(tmp_path), batch_size=4, resize=16))
    for part in (data.calibration, data.test):
        found = list(part)
        assert [targets for _, targets in found] == [None, None]
        assert sum(len(images) for images, _ in found) == 7


def test_arrays_may_be_named_as_keras_does(tmp_path):
    x, y = np.random.default_rng(0).random((12, 1, 8, 8)).astype(np.float32), np.arange(12) % 3
    np.savez(tmp_path / "keras.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    data = datasets.load(DataConfig(str(tmp_path / "keras.npz"), batch_size=4))
    images, labels = next(iter(data.test))
    assert torch.equal(images, torch.from_numpy(x[:4]))
    assert labels.tolist() == y[:4].tolist()
    np.savez(tmp_path / "one.npz", X=x, y=y)
    images, labels = next(iter(datasets.load(DataConfig(str(tmp_path / "one.npz"), batch_size=4)).test))
    assert torch.equal(images, torch.from_numpy(x[:4]))
    assert labels.tolist() == y[:4].tolist()
    np.savez(tmp_path / "two.npz", a=x, b=x[:5])
    with pytest.raises(DataError, match="arrays of different lengths: a 12, b 5"):
        datasets.load(DataConfig(str(tmp_path / "two.npz")))


@pytest.mark.parametrize("count", [100, 101])
def test_a_warning_says_that_a_generator_gives_more_batches_than_are_used(count):
    data = datasets.load(DataConfig(), given=(torch.zeros(2, 3) for _ in range(count)))
    assert len(data.calibration) == 100
    assert any("the first 100 batches of more are used" in text for text in data.warnings) == (count > 100)


def test_wrong_folders_are_named_with_the_layout_they_should_have(tmp_path):
    config = DataConfig("imagefolder", str(tmp_path))
    layout = "expected train/CLASS/*.jpg and test/ or val/ with the same classes, CLASS/*.jpg, or *.jpg without labels"
    assert complaint(config) == f"{tmp_path}: Couldn't find any class folder in {tmp_path}; {layout}"
    write_images(tmp_path / "train" / "cat", 2)
    assert complaint(config) == f"{tmp_path}: test/ or val/ is missing; {layout}"
    write_images(tmp_path / "test" / "dog", 2)
    assert complaint(config) == f"{tmp_path}: train/ and test/ have different classes: cat, dog"
    (tmp_path / "test" / "cat").mkdir()
    expected = f"{tmp_path / 'test'}: Found no valid file for the classes cat (legal: .jpg, .jpeg, .png, .ppm, "
    assert complaint(config).startswith(expected)
    for dataset in ("imagefolder", "cifar10", "mnist"):
        missing = complaint(DataConfig(dataset, str(tmp_path / "nowhere")))
        assert missing.startswith(f"{tmp_path / 'nowhere'}: no such folder; expected one with ")
        assert complaint(DataConfig(dataset)).startswith(f"data.path: {dataset} needs a folder with ")
    assert complaint(replace(CIFAR, path=str(tmp_path))).startswith(f"{tmp_path}: expected cifar-10-batches-py/")


def test_resolved_says_how_to_repeat_the_run(tree):
    config, path, _ = tree
    bare = replace(config, resize=None, crop=None)
    full = datasets.resolved(bare)
    assert (full.resize, full.crop, full.mean, full.std) == (256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert datasets.resolved(full) == full
    assert torch.equal(all_of(datasets.load(bare).test)[0], all_of(datasets.load(full).test)[0])
    assert datasets.resolved(replace(bare, resize=32)).crop == 32
    assert datasets.resolved(replace(bare, crop=32)).resize == 32
    assert datasets.resolved(DataConfig("cifar10", str(path), mean=(0.5,))).std == (0.2023, 0.1994, 0.2010)
    assert datasets.resolved(DataConfig("somewhere.py:data")) == DataConfig("somewhere.py:data")


@given(st.sampled_from(sorted(DEFAULTS)), st.none() | st.integers(1, 300), st.none() | st.integers(1, 300))
def test_resolved_is_idempotent_and_keeps_what_is_given(dataset, resize, crop):
    config = DataConfig(dataset, resize=resize, crop=crop)
    if resize and crop and crop > resize:
        with pytest.raises(ConfigError, match=rf"data.crop: {crop} is larger than data.resize, {resize}"):
            datasets.resolved(config)
        return
    full = datasets.resolved(config)
    assert datasets.resolved(full) == full
    assert resize in (None, full.resize)
    assert crop in (None, full.crop)
    assert None not in (full.mean, full.std)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"std": (0.5, 0.0, 0.5)}, "data.std: [0.5, 0.0, 0.5] is not legal; legal: a list of finite numbers above 0"),
        ({"mean": (0.5, 0.5)}, "data.mean: 2 values for images of 3 channels"),
        ({"resize": 8, "crop": 9}, "data.crop: 9 is larger than data.resize, 8"),
        ({"dataset": "cifar"}, "data.dataset: 'cifar' is unknown"),
    ],
)
def test_a_normalization_that_does_not_fit_is_a_configuration_error(archive, change, expected):
    assert expected in complaint(replace(archive[0], **change), ConfigError)


def test_images_in_memory_can_be_resized(archive):
    config, arrays = archive
    data = datasets.load(replace(config, resize=40, crop=36, mean=(0.0,), std=(1.0,)))
    assert data.input_shape == (3, 36, 36)
    steps = transforms.Compose(
        [transforms.ToTensor(), transforms.Resize(40, antialias=True), transforms.CenterCrop(36)]
    )
    expected = torch.stack([steps(Image.fromarray(array)) for array in arrays["test_x"]])
    torch.testing.assert_close(all_of(data.test)[0], expected, rtol=0, atol=1e-6)


def test_a_path_that_nothing_reads_and_images_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: .* is not read.*--data imagefolder"):
        datasets.load(DataConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"data\.resize: 1,000,000 is not legal; legal: up to 16,384"):
        datasets.load(DataConfig(resize=1_000_000))
