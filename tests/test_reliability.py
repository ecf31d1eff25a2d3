"""Bad input of every kind ends in one clear error: files from strangers, a user's own code, labels, names, streams."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from pow2quant import cli, config, datasets, foreign, models, prepare
from pow2quant.cli import listing, main
from pow2quant.config import DataConfig
from pow2quant.datasets import image_files, sampling, sources
from pow2quant.errors import ConfigError, DataError, FileFormatError, ModelError, OutputError, WeightsError
from pow2quant.reading import Checked
from pow2quant.runs import unfinished
from pow2quant.training import checkpoint, schedule
from tests.attacks import files, good


@pytest.mark.parametrize("bomb", [pytest.param(text, id=name) for name, text in files.bombs()])
def test_a_configuration_that_would_grow_is_refused(bomb: str, tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(bomb)
    with pytest.raises(ConfigError):
        config.load(tmp_path / "bomb.yaml")


def test_aliases_that_repeat_little_are_legal(tmp_path: Path) -> None:
    text = "quantization: {overrides: {a: &same {weight: {bitwidth: 4}}, b: *same}}"
    (tmp_path / "aliases.yaml").write_text(text)
    assert set(config.load(tmp_path / "aliases.yaml").quantization.overrides) == {"a", "b"}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "it")
    for read in (config.load, lambda p: models.load_weights(nn.Linear(1, 1), p), checkpoint.load):
        with pytest.raises((ConfigError, WeightsError, FileFormatError), match=r"is a folder|a pipe or a device"):
            read(tmp_path / "it")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_files_of_the_system_are_not_opened(tmp_path: Path) -> None:
    """/proc/kmsg is a regular file, of no size, that waits for ever."""
    for name in ("kmsg", "self/environ"):
        with pytest.raises(FileFormatError, match="is empty"):
            foreign.check_is_file(f"/proc/{name}")
        assert foreign.text(f"/proc/{name}", 100) == ""


@pytest.mark.parametrize("command", ["ptq", "qat", "sweep --grid seed=1", "search --constraint size=1MB"])
def test_an_output_that_goes_round_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert main([*command.split(), "--output", str(tmp_path / "loop")]) == 2
    assert "loop: " in capsys.readouterr().err


def test_nothing_is_beside_the_root() -> None:
    with pytest.raises(OutputError, match="/: cannot be written"):
        unfinished.folder_of(Path("/"))


def test_json_has_a_depth() -> None:
    for text in ("[" * 100000, '{"a":' * 200 + "1" + "}" * 200, "[" * 101 + "]" * 101):
        with pytest.raises(ValueError, match="deep"):
            foreign.parsed(text)
    assert foreign.parsed("[" * 99 + "]" * 99)


class Ragged(TensorDataset):
    targets: Any = ([1], [1, 2], [])


def picture(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number, 9, 9)).save(path)


def folder_of_images(path: Path) -> DataConfig:
    for part in ("train", "test"):
        for label in ("a", "b"):
            for number in range(3):
                picture(path / part / label / f"{number}.png", number)
    return DataConfig("imagefolder", str(path), resize=8, crop=8)


@pytest.mark.parametrize(
    "make",
    [
        lambda place: os.mkfifo(place / "0.png"),
        lambda place: (place / "0.png").symlink_to("/dev/zero"),
        lambda place: (place / "0.png").symlink_to("/proc/self/maps"),
        lambda place: (place / "0.png").symlink_to("0.png"),
    ],
)
def test_what_is_no_image_is_named(make: Callable[[Path], None], tmp_path: Path) -> None:
    chosen = folder_of_images(tmp_path)
    (tmp_path / "test" / "a" / "0.png").unlink()
    make(tmp_path / "test" / "a")
    with pytest.raises(DataError, match=r"0\.png"):
        list(datasets.load(chosen).test)


def test_what_pillow_would_start_a_program_for_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(DataError, match=r"0\.png: not a readable image \(cannot identify"):
        image_files.image(str(tmp_path / "0.png"))


def test_links_in_folders_of_images_lead_nowhere(tmp_path: Path) -> None:
    """A class may be a link; a loop, the root and /proc inside a class are not followed."""
    chosen = folder_of_images(tmp_path / "images")
    (tmp_path / "images" / "train" / "b").rename(tmp_path / "elsewhere")
    (tmp_path / "images" / "train" / "b").symlink_to(tmp_path / "elsewhere")
    inside = tmp_path / "images" / "train" / "a" / "deep"
    picture(inside / "9.png")
    for name, target in (("loop", "."), ("parent", "../.."), ("root", "/"), ("proc", "/proc")):
        (inside / name).symlink_to(target)
    assert sum(len(images) for images, _ in datasets.load(chosen).calibration) == 3 + 1 + 3
    (tmp_path / "images" / "train" / "c").symlink_to("..")
    (tmp_path / "images" / "test" / "c").symlink_to("..")
    with pytest.raises(DataError, match="link to where it lies"):
        datasets.load(chosen)


def linear() -> dict[Any, Any]:
    return dict(nn.Linear(2, 2).state_dict())


def circular() -> Any:
    state = linear()
    state["state_dict"] = state
    return state


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (circular, "contains itself"),
        (lambda: dict(enumerate(linear().values())), "names in a state dict are text"),
        (lambda: {(k, 1): v for k, v in linear().items()}, "names in a state dict are text"),
        (lambda: {k.encode(): v for k, v in linear().items()}, "names in a state dict are text"),
        (lambda: linear() | {"weight": torch.ones(2, 2).to_sparse()}, "weight is sparse"),
        (lambda: linear() | {"weight": torch.ones(2, 2, device="meta")}, "weight has no values"),
        (lambda: linear() | {"weight": torch.ones(2, 2, dtype=torch.complex64)}, "complex"),
    ],
)
def test_weights_of_strange_kinds_are_refused(state: Callable[[], Any], words: str, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=words):
        models.load_weights(nn.Linear(2, 2), tmp_path / "weights.pt")


@pytest.mark.parametrize("made", ["nn.LazyLinear(2)", "nn.Linear(2, 2, device='meta')"])
def test_a_network_without_values_is_refused(made: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(f"from torch import nn\ndef net():\n    return {made}\n")
    with pytest.raises(WeightsError, match="has no"):
        models.build(f"{tmp_path / 'net.py'}:net")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((4, 1, 8, 8), "M8[s]"), np.arange(4)),
        (np.zeros((4, 1, 8, 8), "U3"), np.arange(4)),
        (np.zeros((4, 1, 8, 8), np.float32), np.zeros(4, [("a", "i4")])),
        (np.zeros((4, 1, 8, 8), np.float32), np.arange(3)),
    ],
)
def test_arrays_that_are_no_images_and_labels_are_refused(images: Any, labels: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train_x=images, train_y=labels, test_x=images, test_y=labels)
    with pytest.raises(DataError, match=r"x\.npz: (train_[xy]: holds (text|an array of)|not one label for each)"):
        datasets.load(DataConfig(str(tmp_path / "x.npz")))


def test_arrays_are_read_in_any_order_of_bytes_and_text_is_named(tmp_path: Path) -> None:
    images, labels = np.arange(256, dtype=">f4").reshape(4, 1, 8, 8) / 256, np.arange(4, dtype=">i8")
    np.savez(tmp_path / "big.npz", train_x=images, train_y=labels, test_x=images, test_y=labels)
    read = next(iter(datasets.load(DataConfig(str(tmp_path / "big.npz"))).test))
    assert np.array_equal(read[0].numpy(), images)
    assert read[1].tolist() == [0, 1, 2, 3]
    np.savez(tmp_path / "words.npz", train_x=images, train_y=labels, test_x=images, test_y=np.array(list("abca")))
    with pytest.raises(DataError, match=r"words\.npz: test_y: holds text \('a'\); expected numbers, class indices"):
        datasets.load(DataConfig(str(tmp_path / "words.npz")))


@pytest.mark.parametrize("targets", [3, {}, {1: 2}, object(), [object()], "abc"])
def test_targets_that_are_no_labels_are_not_looked_at(targets: Any) -> None:
    dataset = Ragged(torch.rand(3, 2))
    dataset.targets = targets
    assert sources._labels(Subset(dataset, [0])) is None
    assert sources._labels(dataset) is None
    assert sampling.labels_at_hand(Checked(DataLoader(dataset), "it")) is None


@pytest.mark.parametrize("name", ["\0", "a\0b", "\ud800"])
def test_names_that_no_file_can_hold_are_refused(name: str) -> None:
    network = nn.Sequential()
    network.add_module(name, nn.Linear(2, 2))
    with pytest.raises(ModelError, match="holds what no file can hold"):
        prepare(network, torch.rand(1, 2))


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.rand(3, 2), torch.arange(3).to_sparse()),
        TensorDataset(torch.rand(3, 2), torch.arange(3, device="meta")),
        Subset(TensorDataset(torch.rand(3, 2), torch.arange(3)), [0, 7]),
        Ragged(torch.rand(3, 2)),
    ],
)
def test_labels_of_no_use_are_not_at_hand(dataset: Any) -> None:
    assert sampling.labels_at_hand(Checked(DataLoader(dataset), "it")) is None


NAMES = ("in", "class", "lambda", 'a"b', "a'b", "a\nb", "\\", "*/", "{x}", "1", "名", "$(x)")


@pytest.mark.parametrize("name", NAMES)
def test_modules_may_have_any_name(name: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = nn.Sequential(nn.Conv2d(2, 2, 1))
            self.b = nn.ModuleDict({name: nn.Conv2d(1, 2, 3), f"{name}2": inner, "z": nn.ReLU()})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b["z"](self.b[f"{name}2"](self.b[name](x)))

    network, x = Odd().eval(), torch.rand(2, 1, 5, 5)
    assert torch.equal(prepare(network, x)(x), network(x))


@pytest.mark.parametrize(
    "statement", ["raise SystemExit(3)", "raise GeneratorExit", "raise type('E', (BaseException,), {})"]
)
@pytest.mark.parametrize(
    "place", ["def net():\n    ", "def data():\n    ", "class Net(nn.Module):\n  def forward(self, x):\n    "]
)
def test_whatever_own_code_raises_is_one_line(
    statement: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = good.CODE + f"\n\n{place}{statement}\n" + ("\n\nnet = Net\n" if "Net(" in place else "")
    assert main(good.put(tmp_path, code)) == 2
    assert "mine.py, line" in capsys.readouterr().err
    assert not list(tmp_path.glob("pow2quant-crash*"))


def loss(training: config.TrainingConfig) -> torch.Tensor:
    made = schedule.criterion_of(training, "CrossEntropyLoss")
    return schedule.loss_of(made, torch.zeros(2, 3), torch.zeros(2).long())


@pytest.mark.parametrize("role", ["criterion", "optimizer", "scheduler"])
@pytest.mark.parametrize("result", ["None", "3", "lambda *a: 'x'", "object()"])
def test_what_training_is_given_must_be_what_it_is_called(role: str, result: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"def thing(*a, **k):\n    return {result}\n")
    values = {f"training.{role}": {"type": f"{tmp_path / 'mine.py'}:thing", "x": 1}}
    training = config.with_values(config.RunConfig(), values).training
    weight = nn.Parameter(torch.zeros(2, 2))
    calls = {
        "optimizer": lambda: schedule.optimizer_of(training, [weight]),
        "scheduler": lambda: schedule.Schedule(training, torch.optim.SGD([weight], 0.1), 10),
        "criterion": lambda: loss(training),
    }
    with pytest.raises(ConfigError, match=f"training.{role}"):
        calls[role]()


@pytest.mark.parametrize("name", ["TripletMarginLoss", "BCELoss", "CTCLoss", "CosineEmbeddingLoss", "Identity"])
def test_a_criterion_that_compares_something_else_is_named(name: str) -> None:
    training = config.with_values(config.RunConfig(), {"training.criterion": name}).training
    with pytest.raises(ConfigError, match=r"training\.criterion"):
        loss(training)


@pytest.mark.parametrize("structure", files._STRUCTURES)
def test_a_foreign_checkpoint_is_refused_or_plain(structure: str, tmp_path: Path) -> None:
    from safetensors.torch import save

    (tmp_path / "c").write_bytes(save({}, metadata={checkpoint.STRUCTURE: structure}))
    with suppress(FileFormatError):
        checkpoint.load(tmp_path / "c")


def test_a_defect_leaves_a_file_with_nothing_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(listing, "idle", eval("lambda *_: {}['private-text']"))  # not in a file of a user's own
    assert main(["list", "--seed", "7", "--output", "private-folder"]) == 70
    (file,) = tmp_path.glob("pow2quant-crash-*.txt")
    assert file.name in capsys.readouterr().err
    text = file.read_text()
    assert "KeyError" in text
    assert "pow2quant/cli/listing.py" in text
    assert "command: list --seed --output" in text
    assert "private" not in text
    assert str(tmp_path) not in text


def test_no_memory_is_no_defect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "idle", eval("lambda *_: torch.empty(1 << 60)", {"torch": torch}))
    assert main(["list"]) == 2
    assert "not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_defect(closed: str, tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m pow2quant list --output out {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "list.json").read_text().startswith("{")


def test_a_line_of_an_error_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptq", "--backend", "\ud800" + "x" * 100000]) == 2
    assert 100 < len(capsys.readouterr().err) <= cli.MOST + 20
