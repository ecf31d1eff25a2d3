"""Networks and weights: every way in works, and every way in which a file can be wrong is one clear line."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pow2quant import datasets, models
from pow2quant.config import DataConfig
from pow2quant.errors import ModelError, WeightsError


@pytest.fixture(scope="module")
def digits():
    return datasets.load(DataConfig())


@pytest.fixture(scope="module")
def trained(digits):
    return models.train_digits(models.build("digits-cnn"), digits, seed=0)


def equal(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def complaint(error: type[Exception], call, *arguments) -> str:
    with pytest.raises(error) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_default_network_is_small_and_holds_what_is_hard():
    model = models.build("digits-cnn")
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 60_000
    assert {nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Linear} <= set(
        map(type, model.children())
    )
    assert model.depthwise.groups == model.depthwise.in_channels > 1
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert models.build("digits-cnn", num_classes=4)(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_the_default_network_learns_the_digits(trained, digits):
    with torch.no_grad():
        right = sum(int((trained(images).argmax(1) == labels).sum()) for images, labels in digits.test)
    assert right / 450 >= 0.95, "seeds 0 to 3 end between 98.7 and 99.8 per cent"
    assert not trained.training


def test_training_depends_on_the_seed_alone(trained, digits):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again, other = copy.deepcopy(trained), copy.deepcopy(trained)
    models.train_digits(again, datasets.load(DataConfig(batch_size=50)), seed=0)
    models.train_digits(other, digits, seed=1, epochs=1)
    assert equal(trained, again)
    assert not equal(trained, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "classes"), [("resnet18", 7), ("googlenet", 5), ("mobilenet_v2", None)])
def test_torchvision(name, classes):
    model = models.build(f"torchvision:{name}", num_classes=classes)
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, classes or 1000)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digit-cnn", "did you mean digits-cnn?"),
        ("resnet18", "torchvision:resnet18"),
        ("torchvision:resnet19", "torchvision:resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "unknown model"),
        ("qqq", "known: digits-cnn, torchvision:NAME, timm:NAME, net.onnx, path/to/file.py:factory"),
    ],
)
def test_an_unknown_name_gets_a_hint(name, hint):
    assert hint in complaint(ModelError, models.build, name)


USER = """
from torch import nn
from layers_of_user import WIDTH

class Net(nn.Linear):
    def __init__(self, num_classes=2):
        super().__init__(WIDTH, num_classes)

def factory():
    return nn.Sequential(nn.Linear(WIDTH, 4))

def lazy():
    import lazy_of_user
    return nn.Linear(lazy_of_user.WIDTH, 2)

def failing():
    raise RuntimeError("no such layer")

def text():
    return "a network"

def demanding(width):
    return nn.Linear(width, 2)

def poisoned():
    model = nn.Linear(2, 2)
    nn.init.constant_(model.bias, float("nan"))
    return model
"""


@pytest.fixture
def user(tmp_path):
    (tmp_path / "layers_of_user.py").write_text("WIDTH = 3\n")
    (tmp_path / "lazy_of_user.py").write_text("WIDTH = 5\n")
    (tmp_path / "net.py").write_text(USER)
    return tmp_path / "net.py"


def test_a_factory_in_a_file(user):
    assert models.build(f"{user}:factory")[0].out_features == 4
    assert models.build(f"{user}:Net", num_classes=9).out_features == 9
    assert models.build(f"{user}:factory", num_classes=9)[0].out_features == 4  # takes no num_classes, decides itself
    assert models.build(f"{user}:lazy").in_features == 5


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("failing", "net.py, line 17: RuntimeError: no such layer"),
        ("text", "made a str, not a torch.nn.Module"),
        ("demanding", "TypeError: demanding() missing 1 required positional argument: 'width'"),
        ("factroy", "has no 'factroy'; it has Net, factory, lazy, failing, text, demanding, poisoned"),
        ("poisoned", "net.py:poisoned: bias holds NaN or infinity in 2 of 2 values"),
    ],
)
def test_a_factory_that_fails_is_named(factory, expected, user):
    assert expected in complaint(ModelError, models.build, f"{user}:{factory}")


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.fixture
def source():
    torch.manual_seed(1)
    return net()


def prefixed(prefix: str):
    return lambda state: {prefix + name: value for name, value in state.items()}


CHECKPOINTS = {
    "plain": lambda state: state,
    "lightning": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "net": lambda state: {"net": prefixed("module.")(state), "acc": 93.1},
    "nested": lambda state: {"model": {"state_dict": state}},
    "data parallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled data parallel": prefixed("module._orig_mod."),
    "compiled layers": lambda state: {name.replace(".", "._orig_mod."): value for name, value in state.items()},
    "old, without counters": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_usual_checkpoint_is_understood(checkpoint, source, tmp_path):
    torch.save(CHECKPOINTS[checkpoint](dict(source.state_dict())), tmp_path / "w.pt")
    model = net()
    models.load_weights(model, tmp_path / "w.pt")
    assert equal(model, source)


def test_safetensors(source, tmp_path):
    save_file(prefixed("module.")(source.state_dict()), tmp_path / "w.safetensors")
    model = net()
    models.load_weights(model, str(tmp_path / "w.safetensors"))
    assert equal(model, source)


def test_a_module_that_is_called_module_keeps_its_name(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    source, model = Wrapped(), Wrapped()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    models.load_weights(model, tmp_path / "w.pt")
    assert equal(model, source)
    torch.save(prefixed("module.")(source.state_dict()), tmp_path / "w.pt")
    models.load_weights(model, tmp_path / "w.pt")
    assert equal(model, source)


def test_the_auxiliary_heads_of_googlenet_are_left_out(tmp_path):
    model = models.build("torchvision:googlenet", num_classes=3)
    heads = {"aux1.conv.conv.weight": torch.zeros(1), "aux2.fc2.bias": torch.zeros(1)}
    torch.save({**model.state_dict(), **heads}, tmp_path / "w.pth")
    models.load_weights(model, tmp_path / "w.pth")
    torch.save(heads, tmp_path / "aux.pth")
    assert "2 unexpected (aux1.conv.conv.weight, aux2.fc2.bias)" in complaint(
        WeightsError, models.load_weights, net(), tmp_path / "aux.pth"
    )


class Intruder:
    """Unpickled naively, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["torch.save", "torch.save, old format", "pickle 2", "pickle 4", "among tensors"])
def test_code_in_a_file_of_weights_never_runs(how, tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "w.pt"
    if "pickle" in how:
        path.write_bytes(pickle.dumps(Intruder(victim), protocol=int(how[-1])))
    else:
        state = {"0.weight": torch.zeros(1), "x": Intruder(victim)} if how == "among tensors" else Intruder(victim)
        torch.save(state, path, _use_new_zipfile_serialization="old" not in how)
    message = complaint(WeightsError, models.load_weights, net(), path)
    expected = r"truncated, or not a file of weights" if how == "pickle 4" else r"holds Python objects \(\w*\.open\)"
    assert re.search(rf"w\.pt: {expected}", message)
    assert not victim.exists()


def test_a_whole_pickled_model_says_what_to_save_instead(source, tmp_path):
    torch.save(source, tmp_path / "model.pt")
    assert "save it with torch.save(model.state_dict(), ...)" in complaint(
        WeightsError, models.load_weights, net(), tmp_path / "model.pt"
    )


def test_weights_that_do_not_fit_are_counted_and_named(source, tmp_path):
    state = dict(source.state_dict())
    del state["3.bias"], state["1.running_mean"]
    state["0.weight"] = torch.zeros(4, 1, 5, 5)
    state |= {f"head.{i}": torch.zeros(1) for i in range(7)}
    torch.save(state, tmp_path / "w.pt")
    message = complaint(WeightsError, models.load_weights, net(), tmp_path / "w.pt")
    assert "2 missing (1.running_mean, 3.bias)" in message
    assert "7 unexpected (head.0, head.1, head.2, head.3, head.4, ...)" in message
    assert "1 of another shape (0.weight: (4, 1, 5, 5) in the file, (4, 1, 3, 3) in the network)" in message


def test_a_model_is_untouched_by_weights_that_are_refused(source, tmp_path):
    model = net()
    before = copy.deepcopy(model)
    state = dict(source.state_dict())
    state["3.bias"] = torch.tensor([1.0, float("nan")])
    torch.save(state, tmp_path / "w.pt")
    complaint(WeightsError, models.load_weights, model, tmp_path / "w.pt")
    assert equal(model, before)


@pytest.mark.parametrize(("tensor", "value"), [("0.weight", float("nan")), ("1.running_var", float("inf"))])
def test_a_tensor_that_is_not_finite_is_named(tensor, value, source, tmp_path):
    source.state_dict()[tensor].view(-1)[1] = value
    torch.save(source.state_dict(), tmp_path / "w.pt")
    size = source.state_dict()[tensor].numel()
    expected = f"w.pt: {tensor} holds NaN or infinity in 1 of {size} values"
    assert expected in complaint(WeightsError, models.load_weights, net(), tmp_path / "w.pt")


def test_build_loads_weights(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    assert equal(models.build("digits-cnn", weights=tmp_path / "w.pt"), trained)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("length", [0, 5, 100, -100])
def test_a_damaged_file_is_named(suffix, length, source, tmp_path):
    whole, broken = tmp_path / f"whole{suffix}", tmp_path / f"broken{suffix}"
    save_file(source.state_dict(), whole) if suffix == ".safetensors" else torch.save(source.state_dict(), whole)
    broken.write_bytes(whole.read_bytes()[:length])
    problem = "truncated, or not a file of weights" if length else "cannot be read: is empty"
    assert f"broken{suffix}: {problem}" in complaint(WeightsError, models.load_weights, net(), broken)


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "notes.pt").write_text("just some text, and a little more of it\n")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "counts.pt")
    for name, expected in [
        ("missing.pt", "missing.pt: cannot be read: no such file"),
        ("notes.pt", "notes.pt: truncated, or not a file of weights"),
        ("list.pt", "list.pt: holds no state dict"),
        ("counts.pt", "counts.pt: holds no state dict"),
    ]:
        assert expected in complaint(WeightsError, models.load_weights, net(), tmp_path / name)


def test_timm_is_used_where_it_is_installed_and_asked_for_where_not() -> None:
    if importlib.util.find_spec("timm") is None:
        assert "pip install timm" in complaint(ModelError, models.build, "timm:resnet18")
    else:
        assert sum(p.numel() for p in models.build("timm:resnet18", num_classes=7).parameters()) > 0
        assert "timm:resnet18" in complaint(ModelError, models.build, "timm:resnet1")
