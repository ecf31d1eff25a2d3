"""One call from Python: every form of data, the bits of the command line, and one clear line for everything else."""

from __future__ import annotations

import sys
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

import pow2quant
from pow2quant import config, models, reading
from pow2quant.cli import main
from pow2quant.datasets import sources
from pow2quant.errors import ConfigError, DataError, ModelError, UnsupportedModelError
from pow2quant.methods.adaround import AdaRound
from pow2quant.methods.bias_correction import BiasCorrection
from pow2quant.reading import Signature
from pow2quant.runs.quantizing import requested
from tests.kinds import SOURCE

QUICK = {"report": {"statistics": False, "latency": False}, "ptq": {"calibration_batches": 4}}


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(SOURCE)
    names: dict[str, Any] = {}
    exec(compile(SOURCE, str(file), "exec"), names)
    return file, names


def quick(model: Any, data: Any, **more: Any) -> pow2quant.Result:
    return pow2quant.quantize(model, data, config=QUICK, **{"progress": False, **more})


def test_the_embedded_default_is_the_command_line_s(tmp_path: Path) -> None:
    here = pow2quant.quantize(models.trained_digits_cnn(), "digits", config=QUICK, progress=False)
    named = pow2quant.quantize(config=QUICK, progress=False, output=tmp_path / "named")
    assert (here.folder / "model.onnx").read_bytes() == (named.folder / "model.onnx").read_bytes()
    assert named.folder == tmp_path / "named"
    assert here.report["metrics"]["top1"]["quantized"] == here.report["final_accuracy"] > 97


def test_arguments_win_over_the_configuration_though_they_are_the_defaults() -> None:
    narrow = {**QUICK, "quantization": {"weight": {"bitwidth": 4}}, "backend": "aimet"}
    for bits, width in ((None, 4), ("w8a8", 8)):
        base, _, _ = requested(nn.Linear(3, 2), "digits", bits, None, None, None, "custom", None, narrow, False)
        assert base.quantization.weight.bits == width
        assert base.backend == "custom"


def test_a_result_is_saved_exported_and_shown(
    mine: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, names = mine
    model = names["classifier"]().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = pow2quant.quantize(model, names["labelled"](), progress=False)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result.encodings["0.weight"].is_power_of_two
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (saved := result.save("~/run")) == tmp_path / "run"
    assert (saved / "model.onnx").read_bytes() == (result.folder / "model.onnx").read_bytes()
    assert result.export("c", tmp_path / "c").exists()
    with pytest.raises(ModelError, match="the network is quantized already; give the float one"):
        quick(result.model, names["labelled"]())
    text, html = repr(result), result._repr_html_()
    for word in (str(result.verdict)[:40], "top-1", "onnxruntime", "least signal to noise", "0.weight"):
        assert word in text, word
        assert word in html, word
    sim = result.simulation
    again = sim.calibrate([x for x, _ in names["labelled"]()])
    assert again.keys() == result.encodings.keys()
    folder = result.folder
    del result, sim
    assert not folder.exists()


class Dicts(Dataset[Any]):
    def __init__(self, key: str = "label") -> None:
        self.key = key

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((1, 8, 8), index / 16), self.key: index % 3}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for i in range(16):
            yield torch.full((1, 8, 8), i / 16), i % 3


class Array:
    """As TensorFlow and JAX have them: numpy can read it."""

    def __init__(self, of: Tensor) -> None:
        self.of = of.numpy()
        self.shape = self.of.shape

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self.of, dtype)


class Foreign:
    """Batches of another library: no length, and arrays of its own."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(Array(X[:8]), Array(Y[:8])), (Array(X[8:]), Array(Y[8:]))])


@dataclass
class Pair:
    image: Tensor
    label: Tensor


class Attributes(dict[str, Any]):
    """As configuration libraries have it: an attribute that is no key is a KeyError."""

    __getattr__ = dict.__getitem__


class Items:
    """A data set of a class of its own; items: what it holds."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Randomly(nn.Module):
    """Drops in evaluation, too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x.flatten(1), 0.5)


def program() -> Any:
    """Exported for one image, without a dimension of any size."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    return torch.export.export(net.eval(), (X[:1],))


X, Y = torch.rand(16, 1, 8, 8), torch.arange(16) % 3
FORMS: dict[str, Any] = {
    "loader": lambda: DataLoader(TensorDataset(X, Y), 4),
    "pair of loaders": lambda: (DataLoader(TensorDataset(X, Y), 4), DataLoader(TensorDataset(X, Y), 8)),
    "dataset": lambda: TensorDataset(X, Y),
    "arrays": lambda: (X.double().numpy(), Y.numpy().astype(np.int32)),
    "columns": lambda: {"image": X, "label": Y},
    "tuples": lambda: [(X[:8], Y[:8]), (X[8:], Y[8:])],
    "lists": lambda: [[X[:8], Y[:8]], [X[8:], Y[8:]]],
    "numpy batches": lambda: [(X[i : i + 8].numpy(), Y[i : i + 8].numpy()) for i in (0, 8)],
    "half": lambda: [(X.half(), Y)],
    "bfloat16": lambda: [(X.bfloat16(), Y)],
    "samples": lambda: [(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "samples in dictionaries": lambda: [{"image": x, "label": int(y)} for x, y in zip(X, Y, strict=True)],
    "array samples": lambda: [(x.numpy(), np.int64(y)) for x, y in zip(X, Y, strict=True)],
    "columns in a list": lambda: [X.numpy(), Y.numpy()],
    "arrays of another library": lambda: (Array(X), Array(Y)),
    "batches of another library": Foreign,
    "dataclasses": lambda: [Pair(X, Y)],
    "a dictionary whose keys are attributes": lambda: [Attributes(image=X, label=Y)],
    "a mapping that is no dict": lambda: [UserDict(image=X, label=Y)],
    "splits": lambda: {"train": DataLoader(TensorDataset(X, Y), 4), "validation": (X[:0], Y[:0]), "test": (X, Y)},
    "dict loader": lambda: DataLoader(Dicts(), 4),
    "generator": lambda: ((X[i : i + 4], Y[i : i + 4]) for i in range(0, 16, 4)),
    "stream": lambda: DataLoader(Stream(), 4),
    "pair": lambda: ([X[:8], X[8:]], (X, Y)),
}


@pytest.mark.parametrize("form", FORMS)
def test_data_as_people_have_them(form: str) -> None:
    data = sources.data_of(FORMS[form](), form, 8, 8)
    for part in (data.calibration, data.test):
        for _ in range(2):
            batches = list(part)
            assert sum(len(x) for x, _ in batches) == 16
            assert all(x.shape[1:] == (1, 8, 8) and x.dtype == torch.float32 for x, _ in batches)
    labels = torch.cat([y for _, y in data.test])
    assert sorted(labels.tolist()) == sorted(Y.tolist())


def test_a_shuffling_loader_is_the_same_in_every_pass_and_takes_no_numbers() -> None:
    for generator in (None, torch.Generator()):
        loader = DataLoader(TensorDataset(X, Y), 4, shuffle=True, generator=generator)
        data = sources.data_of(loader, "loader", 8, 8)
        torch.manual_seed(3)
        first, second = (torch.cat([x for x, _ in data.test]) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, X)
        drawn = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(1))


ONE, TWO = Signature(("x",), 1), Signature(("x", "y"), 2)
OPTIONAL = Signature(("x", "mask"), 1)
A, B = torch.rand(2, 5), torch.rand(2, 3)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batch", "signature", "inputs", "targets"),
    [
        (A, ONE, 1, None),
        ([A], ONE, 1, None),
        ((A, LABELS), ONE, 1, LABELS),
        ((A, LABELS), OPTIONAL, 1, LABELS),
        ((A, B), TWO, 2, None),
        ((A, B, LABELS), TWO, 2, LABELS),
        (((A, B), LABELS), TWO, 2, LABELS),
        ({"x": A, "y": B, "label": LABELS}, TWO, 2, LABELS),
        (({"x": A, "y": B}, LABELS), TWO, 2, LABELS),
        ({"image": A, "target": LABELS}, ONE, 1, LABELS),
        ({"x": A, "labels": LABELS}, Signature(("x", "labels"), 1), 1, LABELS),
        ({"x": A, "mask": B}, OPTIONAL, 1, B),
        ([A, [0, 1]], ONE, 1, LABELS),
    ],
)
def test_inputs_and_targets_are_told_apart(batch: Any, signature: Signature, inputs: int, targets: Any) -> None:
    found, beside = reading.read(batch, signature, "here")
    leaves = [found] if isinstance(found, Tensor) else [*(found.values() if isinstance(found, dict) else found)]
    assert [x.shape for x in leaves] == [A.shape, B.shape][:inputs]
    assert beside is None if targets is None else torch.equal(beside, targets)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([X, X / 0], "batch 1: holds NaN or infinity"),
        ([(X * 255).byte()], "batch 0: expected float32, got torch.uint8; scale it as in training"),
        ([X, X[:, :, :4]], "batch 1: has the shape (N, 1, 4, 8), batches before it (N, 1, 8, 8)"),
        ([X, X[:0]], "batch 1: has the shape (0, 1, 8, 8), so no samples"),
        ([], "is empty"),
        ([("a",)], "batch 0: holds a str where the network takes a tensor"),
        (7, "is a int; expected a DataLoader or another iterable of batches"),
        ([(X, Y + 1)], "label 3 is no class; legal: 0 to 2"),
        ([{"picture": X, "name": "n"}], "a dictionary with the keys picture, name; the network's arguments are input"),
        ((X, Y[:3]), "arrays of different lengths: 16, 3"),
        ((X, X[:4], Y, Y[:4]), "16, 4, 16, 4; a split goes as ((X_train, y_train), (X_test, y_test))"),
        (Items((Image.new("L", (8, 8)), 0)), "found <class 'PIL.Image.Image'> (images: add ToTensor)"),
        ((X, np.array(["a", "b"] * 8)), "holds text ('a'); expected numbers, class indices"),
    ],
)
def test_data_that_cannot_be_used_are_one_line(data: Any, expected: str, mine: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(DataError) as raised:
        quick(mine[1]["classifier"](), data)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({"bits": "8"}, ConfigError, "bits: '8' is not legal; legal: wNaM"),
        ({"bits": "w99a8"}, ConfigError, "quantization.weight.bitwidth: 99 is not legal"),
        ({"target": "mars"}, ConfigError, "target: 'mars' is unknown; known: "),
        ({"methods": ["adarund"]}, ConfigError, "ptq.methods"),
        ({"methods": [7]}, ConfigError, "methods: 7 is no method; give a name (aciq, adaround"),
        ({"model": nn.Linear}, ConfigError, "model: expected an nn.Module, a name or a path, got the class Linear"),
        ({"model": models.digits_cnn}, ConfigError, "got a function; call it, if it makes one"),
        ({"model": "weights.pt"}, ModelError, "weights.pt is a file of weights; a network is path/to/file.py:factory"),
        ({"model": Randomly()}, UnsupportedModelError, "depends on more than its inputs (random numbers, dropout"),
        ({"model": program()}, UnsupportedModelError, "1.reshape: depends on the batch size"),
        ({"methods": {"adaround": 5}}, ConfigError, "methods: {'adaround': 5} is no method; give a name (aciq"),
        ({"methods": {5: {}}}, ConfigError, "methods: {5: {}} is no method; give a name (aciq, adaround"),
        ({"methods": AdaRound}, ConfigError, "methods: the class AdaRound is no method; give a name"),
        ({"data": Items((X[:8], Y[:8]))}, ModelError, "seems to be a batch: give DataLoader(data, batch_size=None)"),
        ({"output": 3}, ConfigError, "output: expected a path, got a int"),
        ({"progress": "yes"}, ConfigError, "progress: 'yes' is not legal; legal: True, False, or an object with track"),
        ({"progress": Items}, ConfigError, "progress: the class Items is not legal"),
        ({"metric": lambda y, t: "0.5"}, ConfigError, "gave a str, not a number"),
        ({"metric": lambda y, t: sys.exit(1)}, ConfigError, "called with outputs and targets: SystemExit: 1"),
        ({"data": None}, ConfigError, "data: needed for calibration"),
        ({"task": "guessing"}, ConfigError, 'task: "guessing" is not legal; legal: one of classification, detection'),
        ({"metric": "mea"}, ConfigError, "metric: 'mea' is unknown; known here: top1; otherwise torchmetrics:NAME"),
        ({"data": [X[:, 0, 0]]}, ModelError, "the network fails on a sample of (1, 8) float32"),
        ({"data": X, "metric": "top1"}, ConfigError, "metric: the data have no targets to compare with"),
        ({"data": list(X)}, ModelError, "a batch seems to be one sample: stack samples to (N, ...)"),
        ({"data": (100 * X).long()}, ModelError, "the network seems to want floats, scaled as in training: x.float()"),
        ({"data": X.movedim(1, -1)}, ModelError, "the network seems to want the channels first: x.movedim(-1, 1)"),
        ({"model": nn.Linear(2, 2).state_dict()}, ConfigError, "load a state dict into the network"),
        ({"metric": lambda y, t: y.shapes}, ConfigError, "called with outputs and targets: AttributeError: 'Tensor'"),
        (
            {"metric": 7},
            ConfigError,
            "metric: 7 is not legal; legal: one of top1, a function, or an object",
        ),
        ({"metric": lambda y, t: {"a": 1, "b": 2}}, ConfigError, "gave 2 values (a, b); return one"),
        ({"metric": lambda y, t: float("nan")}, ConfigError, "gave nan; a network cannot be judged by it"),
        ({"metric": lambda y: 1}, ConfigError, "called with outputs and targets: TypeError: "),
        ({"task": "detection"}, ConfigError, "task: detection has no metric of its own"),
        ({"task": "segmentation"}, DataError, "segmentation needs (N, C, …)"),
    ],
)
def test_arguments_that_cannot_be_used_are_one_line(
    arguments: dict[str, Any], error: type[Exception], expected: str, mine: tuple[Path, dict[str, Any]]
) -> None:
    given = {"model": mine[1]["classifier"](), "data": (X, Y)} | arguments
    with pytest.raises(error) as raised:
        quick(**given)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("labels", [Y, F.one_hot(Y, 3), F.one_hot(Y, 3).float(), Y[:, None], Y.float()])
def test_labels_as_people_write_them_are_the_same_classes(labels: Tensor, mine: tuple[Path, dict[str, Any]]) -> None:
    first, second = random_split(TensorDataset(X, labels), [10, 6], torch.Generator().manual_seed(0))
    loaders = [DataLoader(part, batch_size=5) for part in (first, second)]
    short = QUICK | {"ptq": {"max_eval_batches": 1}}
    found = pow2quant.quantize(mine[1]["classifier"](), loaders, config=short, progress=False)
    assert found.report["task"] == "classification"
    assert found.report["evaluation"]["images"] == 5


def test_a_table_of_pandas_is_its_values() -> None:
    pandas = pytest.importorskip("pandas")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    table = pandas.DataFrame(np.random.default_rng(0).random((16, 4)), columns=list("abcd"))
    found = quick(net, (table, pandas.Series(Y.numpy())))
    plain = quick(net, (table.to_numpy(), Y))
    assert (found.folder / "model.onnx").read_bytes() == (plain.folder / "model.onnx").read_bytes()
    with pytest.raises(DataError, match="holds an array of object; expected numbers"):
        quick(net, table.assign(a="text"))


class ByName(nn.Module):
    """Takes its inputs by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(2, 3)

    def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
        return torch.relu(self.a(left)) + self.b(right)


class ByAnyName(ByName):
    def forward(self, **given: Tensor) -> Tensor:
        return super().forward(**given)


def test_a_network_that_takes_its_inputs_by_name_only() -> None:
    torch.manual_seed(0)
    left, right = torch.rand(16, 5), torch.rand(16, 2)
    named, any_name = ByName(), ByAnyName()
    any_name.load_state_dict(named.state_dict())
    columns = {"left": left, "right": right, "label": Y}
    found = [quick(named, columns), quick(named, (left, right, Y)), quick(any_name, columns)]
    for each in found:
        assert (each.report["task"], each.agrees) == ("classification", True)
        assert each.report["metrics"] == found[0].report["metrics"]
        with torch.no_grad():
            assert torch.equal(each.model(left, right), found[0].model(left, right))


class Whole(nn.Module):
    """Takes a batch as it is, in one argument: by key, or by place."""

    def __init__(self, *keys: Any) -> None:
        super().__init__()
        self.keys, self.body = keys, nn.Linear(5, 3)

    def forward(self, batch: Any) -> Tensor:
        return self.body(sum(torch.relu(batch[key]) for key in self.keys))


def test_a_network_that_takes_a_whole_batch() -> None:
    torch.manual_seed(0)
    x, z = torch.rand(16, 5), torch.randn(16, 5)
    ways = {
        "a known key": (Whole("image"), [{"image": x, "label": Y}], [{"image": x}]),
        "two keys": (Whole("image", "more"), {"image": x, "more": z, "label": Y}, [{"image": x, "more": z}]),
        "a dictionary and labels": (Whole("image"), [({"image": x}, Y)], [{"image": x}]),
        "a list and labels": (Whole(0, 1), [([x, z], Y)], [[x, z]]),
    }
    for way, (net, data, called) in ways.items():
        found = quick(net, data)
        assert (found.report["task"], found.agrees) == ("classification", True), way
        with torch.no_grad():
            top1 = 100 * float((net(*called).argmax(1) == Y).double().mean())
        assert found.report["metrics"]["top1"]["float"] == pytest.approx(top1, abs=1e-3), way


def test_a_network_under_autocast_is_compared_in_float32() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return torch.relu(self.body(x))

    torch.manual_seed(0)
    net, x = Cast(), torch.rand(16, 5)
    assert net(x).dtype == torch.bfloat16
    assert quick(net, (x, Y)).agrees


class AtTimes(nn.Module):
    """Features and an integer, such as a time step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layer(x) + time[:, None]


def test_integers_that_become_one_are_said() -> None:
    for most, expected in ((1000, ["real: integers become real numbers in steps of 4"]), (100, [])):
        data = [(torch.randn(8, 6), torch.randint(0, most, (8,))) for _ in range(4)]
        found = quick(AtTimes().eval(), data, task="none").report["verdict"]["warnings"]
        assert [text.partition(";")[0] for text in found if "steps" in text] == expected


class Attending(nn.Module):
    """Attention to what a mask keeps; reals of a mask may be anything between 0 and 1."""

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2) / 3 + (1 - kept.float()[:, None]) * -1e4
        return scores.softmax(-1) @ x


def test_a_mask_that_widens_the_scores_is_said() -> None:
    for kind, expected in ((torch.float32, 1), (torch.int64, 0), (torch.bool, 0)):
        data = [(torch.randn(8, 5, 6), (torch.rand(8, 5) > 0.3).to(kind)) for _ in range(4)]
        found = quick(Attending().eval(), data, task="none").report["verdict"]["warnings"]
        assert sum("few scores are told apart" in text for text in found) == expected


def test_of_several_targets_the_first_is_judged(mine: tuple[Path, dict[str, Any]]) -> None:
    """As data sets have them that give an index or a file's name beside the label."""
    net, numbers = mine[1]["classifier"](), torch.arange(16)
    plain = quick(net, DataLoader(TensorDataset(X, Y), 8))
    for extra in (numbers, numbers.float()):
        found = quick(net, DataLoader(TensorDataset(X, Y, extra), 8))
        assert (found.report["task"], found.report["metrics"]) == ("classification", plain.report["metrics"])
    named = quick(net, [(X, Y, [f"{i}.png" for i in numbers])])
    assert (named.report["task"], named.report["metrics"]) == ("classification", plain.report["metrics"])
    judged = quick(net, DataLoader(TensorDataset(X, Y, numbers), 8), metric=lambda y, t: len(t))
    assert judged.report["metrics"]["<lambda>"]["float"] == 2, "a metric of one's own gets them all"


class Doubled:
    """A method of the user's own: installed nowhere."""

    def apply(self, sim: Any, batches: Any) -> None:
        self.seen = sum(len(x) for x in batches)


def test_methods_by_name_and_by_object(mine: tuple[Path, dict[str, Any]]) -> None:
    _, names = mine
    ways = (["bias_correction"], "bias_correction", [BiasCorrection()], BiasCorrection(), [{"bias_correction": {}}])
    found = [quick(names["classifier"](), names["labelled"](), methods=each) for each in ways]
    assert len({(r.folder / "model.onnx").read_bytes() for r in found}) == 1
    rounded = quick(names["classifier"](), (X, Y), bits="w4a8", methods=[AdaRound(iterations=3)])
    assert rounded.report["pipeline_steps"] == ["align", "calibrate", "output_mse", "adaround", "export"]
    assert config.load(rounded.folder / "config.yaml").ptq.methods[-1].parameters["iterations"] == 3  # type: ignore[index]
    own = Doubled()
    mixed = quick(names["classifier"](), (X, Y), methods=[own, "bias_correction"])
    assert mixed.report["pipeline_steps"] == ["calibrate", "Doubled", "BiasCorrection", "export"]
    assert own.seen == 16


def test_what_was_given_as_an_object_is_named_when_it_is_asked_for_again(
    mine: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(mine[1]["classifier"](), (X, Y), output=tmp_path / "run")
    assert main(["validate", str(tmp_path / "run")]) == 2
    assert "python:tuple: were given in Python as an object" in capsys.readouterr().err
    assert main(["validate", str(tmp_path / "run" / "model.onnx"), "--quiet"]) == 0


def test_a_dictionary_of_outputs_and_a_network_under_data_parallel() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, features: Tensor, scale: Tensor) -> dict[str, Tensor]:
            h = torch.relu(self.body(features)) + scale
            return {"classes": self.a(h), "box": self.b(h)}

    torch.manual_seed(0)
    data = {"features": torch.rand(16, 5), "scale": torch.rand(16, 8), "label": Y}
    result = quick(nn.DataParallel(Heads()).double(), data)
    assert result.agrees
    assert result.report["validation"][0]["elements"] == 16 * 5
    assert result.report["task"] == "classification"


def test_what_people_try_first_works_or_says_what_to_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(ConfigError, match=r"for a network in Python: quantize\(model, data\)"):
        pow2quant.ptq(net, X)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="example: needed"):
        pow2quant.simulate(net)
    sim, other = pow2quant.simulate(net, X[:1]), pow2quant.simulate(net, X[:1])
    assert sim.calibrate(DataLoader(TensorDataset(X, Y), 4)) == other.calibrate(X.split(4))
    artifact = sim.export(X[:1])
    (written,) = pow2quant.export(artifact, "qdq", str(tmp_path / "out"))
    assert written == tmp_path / "out" / "model.onnx"
    with pytest.raises(ConfigError, match="output: needed"):
        pow2quant.export(artifact, "c")
