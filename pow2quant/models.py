"""Networks by name, and their weights: checked before anything is quantized."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pow2quant.checkpoints import fitted, state_dict
from pow2quant.config import from_file, is_in_file, users_code
from pow2quant.errors import DataError, ModelError, WeightsError
from pow2quant.foreign import check_is_file
from pow2quant.frontends.checks import is_mask
from pow2quant.frontends.export import in_eval_mode, module_of
from pow2quant.frontends.onnx.network import read_network
from pow2quant.plugins import names, resolve

TORCHVISION = "torchvision:"
PYTHON = "python:"
"""In front of the name of what was given as an object: a run's configuration says so, and cannot bring it back."""

TIMM = "timm:"

DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "digits_cnn.safetensors"
"""The embedded network's weights, trained by `scripts/train_digits.py`."""


class DigitsCnn(nn.Module):
    """The embedded default for (N, 1, 8, 8): a small network with every structure that quantization has to get right.

    Convolution, batch norm, depthwise convolution, ReLU6, a residual sum, max-pooling, global average pooling, linear.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu1 = nn.ReLU()
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.relu2 = nn.ReLU6()
        self.pointwise = nn.Conv2d(24, 24, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(24)
        self.relu3 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.conv4 = nn.Conv2d(24, 48, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(48)
        self.relu4 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> logits (N, num_classes)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        branch = self.relu2(self.bn2(self.depthwise(x)))
        x = self.maxpool(self.relu3(x + self.bn3(self.pointwise(branch))))
        x = self.relu4(self.bn4(self.conv4(x)))
        logits: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return logits


def digits_cnn(num_classes: int = 10) -> nn.Module:
    """The embedded default network, untrained."""
    return DigitsCnn(num_classes)


def trained_digits_cnn() -> nn.Module:
    """The embedded default network with the weights that the package ships, in eval mode."""
    return build("digits-cnn", weights=DIGITS_WEIGHTS)


def build(name: str, *, num_classes: int | None = None, weights: str | Path | None = None) -> nn.Module:
    """A network in eval mode.

    name: `digits-cnn` or another plug-in's name, `torchvision:NAME` or, where timm is installed, `timm:NAME`
    (architecture only, nothing is downloaded), a float ONNX file
    `path/to/net.onnx`, or `path/to/file.py:factory`. num_classes goes to every factory that
    takes it; others decide themselves.
    weights: a file for `load_weights`; without it the network is as its factory made it.

    torchvision's GoogLeNet and Inception come without auxiliary heads and without `transform_input`: for torchvision's
    own weights normalize with mean 0.5 and std 0.5.

    Raises ModelError for an unknown name, or naming the file where the user's factory fails; WeightsError for weights
    that do not fit or are not finite.
    """
    if name.startswith(PYTHON):
        raise ModelError(
            f"{name}: was given in Python as an object; name a network that can be made again "
            "(--model file.py:factory), or use the run's files: model.onnx, report.json"
        )
    if name.startswith(TORCHVISION):
        model = _from_torchvision(name.removeprefix(TORCHVISION), num_classes)
    elif name.startswith(TIMM):
        model = _from_timm(name.removeprefix(TIMM), num_classes)
    elif name.endswith(".onnx"):
        model = read_network(name)
    elif is_in_file(name):
        factory = from_file(name, ModelError)
        with users_code(name, ModelError):
            model = module_of(_call(factory, num_classes))
    elif name in names("models"):
        model = _call(resolve("models", name), num_classes)
    else:
        raise _unknown(name)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name}: made a {type(model).__name__}, not a torch.nn.Module")
    if weights is not None:
        load_weights(model, weights)
    check_finite(model.state_dict(), name)
    return in_eval_mode(model)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a state dict from `.safetensors`, or from what `torch.save` wrote, without running code from the file.

    Checkpoints are read as people have them, see `checkpoints`: nested, averaged, with prefixes, pruned.
    Raises WeightsError: the file is missing, truncated or holds code; tensors are missing, unexpected, of another shape
    (it names up to five of each) or not finite.
    """
    state = fitted(state_dict(_read(Path(path)), path), model.state_dict())
    state = _without_heads(state, model)
    misfit = _misfit(state, model.state_dict())
    if misfit:
        raise WeightsError(f"{path}: does not fit the network: {misfit}")
    check_finite(state, str(path))
    model.load_state_dict(state, strict=False)


def check_finite(state: Mapping[str, Any], source: str) -> None:
    """Raises WeightsError, naming the tensor, when one holds NaN or infinity and is no mask."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            _check_has_values(name, value, source)
        if isinstance(value, Tensor) and value.is_floating_point():
            wrong = int((~torch.isfinite(value)).sum())
            if wrong and not is_mask(value):
                raise WeightsError(f"{source}: {name} holds NaN or infinity in {wrong} of {value.numel()} values")


def _check_has_values(name: str, value: Tensor, source: str) -> None:
    """Raises WeightsError, naming the tensor, for one that is not plain numbers beside each other."""
    if isinstance(value, UninitializedParameter | UninitializedBuffer):
        raise WeightsError(f"{source}: {name} has no shape yet (a lazy module): call the network once in its factory")
    if value.is_meta:
        raise WeightsError(f"{source}: {name} has no values (device meta)")
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_complex():
        kind = "quantized" if value.is_quantized else "complex" if value.is_complex() else "sparse or nested"
        raise WeightsError(f"{source}: {name} is {kind}; legal: plain floats")


class _Digits(Protocol):
    """`datasets.Data`, as far as training looks at it."""

    @property
    def calibration(self) -> Iterable[tuple[Tensor, Tensor]]: ...


def train_digits(model: nn.Module, dataset: _Digits, seed: int, epochs: int = 15, batch_size: int = 32) -> nn.Module:
    """Trains a small network from scratch on the images of `dataset.calibration` (all training images, unaugmented).

    The embedded default reaches 99 % of the held-out digits in two seconds. The result depends on `seed` alone, not on
    the state of the model or of torch's generator, which stays as it was. Returns the model in eval mode.
    """
    batches = list(dataset.calibration)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    outputs = model(images[:1]).shape[1]
    if int(labels.max()) >= outputs:
        raise DataError(
            f"model.num_classes: {outputs} are too few, the data have the label {int(labels.max())}; legal: "
            f"{int(labels.max()) + 1} or more"
        )
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        steps = -(-len(images) // batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * steps)
        model.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                scheduler.step()
    return model.eval()


def _call(factory: Callable[..., Any], num_classes: int | None) -> Any:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError) as error:
        raise ModelError(f"{factory!r} cannot be called to make a network: {error}") from None
    takes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    return factory(num_classes=num_classes) if takes and num_classes is not None else factory()


def _from_torchvision(name: str, num_classes: int | None) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise _unknown(TORCHVISION + name)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}  # its initialization takes half a minute
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _from_timm(name: str, num_classes: int | None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"{TIMM}{name}: needs timm, which is not installed: pip install timm ({error})") from None
    if name not in timm.list_models():
        near = [TIMM + known for known in get_close_matches(name, timm.list_models(), n=3)]
        raise ModelError(f"unknown model {TIMM + name!r}; did you mean {', '.join(near) or 'another'}?")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _unknown(name: str) -> ModelError:
    from torchvision import models

    if Path(name).suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"):
        return ModelError(
            f"model: {name} is a file of weights; a network is path/to/file.py:factory, with --weights {name}"
        )
    ours = [*sorted(names("models")), *(TORCHVISION + known for known in models.list_models(module=models))]
    near = get_close_matches(name, ours, n=3) or get_close_matches(TORCHVISION + name, ours, n=3)
    known = ", ".join(
        [*sorted(names("models")), f"{TORCHVISION}NAME", f"{TIMM}NAME", "net.onnx", "path/to/file.py:factory"]
    )
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return ModelError(f"unknown model {name!r}; {hint}known: {known}")


def _read(path: Path) -> Any:
    """What a file of weights holds, on the CPU."""
    check_is_file(path, WeightsError)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are then refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found:
            raise WeightsError(f"{path}: truncated, or not a file of weights") from None
        what = f"holds Python objects ({found[1]}), not only tensors, and was not opened"
        raise WeightsError(f"{path}: {what}; save it with torch.save(model.state_dict(), ...)") from None
    except Exception as error:  # safetensors, zipfile and torch raise whatever they like about a damaged file
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: truncated, or not a file of weights ({why})") from None


def _without_heads(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict without the auxiliary heads that a model was built without."""
    built = getattr(model, "aux_logits", None) is not False
    return {name: value for name, value in state.items() if built or not re.match(r"aux\d\.|AuxLogits\.", name)}


def _misfit(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> str:
    """How a state dict fails to fit, with up to five names for each reason; empty when it fits."""

    def few(reason: str, found: list[str]) -> list[str]:
        return [f"{len(found)} {reason} ({', '.join(found[:5])}{', ...' if len(found) > 5 else ''})"] if found else []

    counters = "num_batches_tracked"  # absent from old files, and without meaning in eval mode
    tensors = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    shapes = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(value.shape)} in the network"
        for name, value in tensors.items()
        if name in state and state[name].shape != value.shape
    ]
    missing = [name for name in tensors if name not in state and not name.endswith(counters)]
    unexpected = [name for name in state if name not in expected and not name.endswith(counters)]
    return "; ".join(few("missing", missing) + few("unexpected", unexpected) + few("of another shape", shapes))
