"""What a run is: plain frozen dataclasses, and strict reading from YAML.

A field's annotation says what its values may be: the type, checked by pydantic, and a `Legal`. Below it, no module
knows pydantic or YAML.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, InitVar, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar, get_args, get_type_hints

import yaml

from pow2quant import foreign, yaml_text
from pow2quant.errors import ConfigError, Pow2QuantError
from pow2quant.plugins import names
from pow2quant.pow2_constraints import CHOOSERS
from pow2quant.targets import DEFAULT, Target, presets
from pow2quant.targets import load as load_target
from pow2quant.yaml_text import one_line

T = TypeVar("T")

ROLES = ("weight", "input", "output", "bias")
WIDTHS = {"weight": range(2, 17), "input": range(2, 17), "output": range(2, 17), "bias": range(8, 33)}
ENCODINGS_VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
MODES = ("weights", "full")
EXPONENTS = ("tqt", "lsq", "fixed")
BATCH_NORMS = ("live", "folded")
TERNARY = ("twn", "ttq", "learned")
KEEPS = ("last", "best")
INPUTS = ("float", "pixels")
PRECISIONS = ("float32", "bfloat16", "float16")
OBJECTIVES = ("size", "bops", "latency", "accuracy")
FUNCTIONS = ("exact", "plain")
SENSITIVITIES = ("kl", "loss", "sqnr", "hessian")


class Choice(NamedTuple):
    """Something chosen by name, and its parameters."""

    name: str
    parameters: Mapping[str, Any] = {}


NONE = Choice("none")
"""In front of methods: they stand alone, without the default ones that some of them build on."""

EXPONENT_METHODS = (Choice("align", {"rounds": 1}), Choice("output_mse"))
"""What chooses exponents for weights of one scale per tensor, and in front of methods that round weights themselves."""

NARROW_METHODS = (Choice("align", {"rounds": 1}), Choice("gptq"), Choice("bias_correction"))
"""What `ptq` does for weights below 8 bits with one scale per channel, unless it is told otherwise."""

EIGHT_BIT_METHODS = (Choice("bias_correction"),)
"""What `ptq` does for weights of 8 bits with one scale per channel, unless it is told otherwise."""


@dataclass(frozen=True)
class Legal:
    """In a field's annotation: what its values may be.

    words: for the user. accepts: whether a value of the right type is legal. read, write: for values that are written
    differently in YAML; `read` raises TypeError, ValueError, KeyError or AttributeError for what it cannot read.
    """

    words: Callable[[], str]
    accepts: Callable[[Any], bool] = lambda value: True
    read: Callable[[Any], Any] | None = None
    write: Callable[[Any], Any] = lambda value: _plain(value)


def integer(low: int, high: float = math.inf) -> Legal:
    """Integers from `low` to `high`, both included."""
    words = f"an integer from {low} {'up, below 2^31' if high == math.inf else f'to {high}'}"
    most = 2**31 - 1 if high == math.inf else high
    return Legal(lambda: words, lambda v: low <= v <= most)


def finite(words: str, accepts: Callable[[float], bool] = lambda v: True) -> Legal:
    """Finite numbers that `accepts` takes; `words` say so."""
    return Legal(lambda: words, lambda v: math.isfinite(v) and accepts(v))


def one_of(options: Callable[[], Any]) -> Legal:
    """What `options()` holds."""
    return Legal(lambda: f"one of {', '.join(sorted(options()))}", lambda v: v in options())


def _read_choice(value: Any) -> Choice:
    """`AdamW`, or `{type: AdamW, betas: [0.9, 0.99]}`."""
    kind, parameters = (value, {}) if isinstance(value, str) else (value["type"], {**value})
    if not isinstance(kind, str):
        raise TypeError
    parameters.pop("type", None)
    return Choice(kind, parameters)


def _write_choice(choice: Choice) -> Any:
    return {"type": choice.name, **_plain(choice.parameters)} if choice.parameters else choice.name


def _read_methods(value: Any) -> tuple[Choice, ...]:
    """A list of `adaround`, `adaround:iterations=100` and `{adaround: {iterations: 100}}`; `[none]` is an empty one."""
    if not isinstance(value, list):
        raise TypeError
    methods = []
    for item in value:
        if isinstance(item, str):
            methods.append(method_named(item))
            continue
        ((name, values),) = item.items()
        methods.append(Choice(name, dict(values or {})))
    return () if methods == [NONE] else tuple(methods)


def without_none(methods: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """The methods that are applied."""
    return methods[1:] if methods[:1] == (NONE,) else methods


def method_named(text: str) -> Choice:
    """`gpfq`, or `gpfq:conv_scalar=1.16,narrow=true`. Raises ValueError for what is written otherwise."""
    name, colon, written = text.partition(":")
    written = re.sub(r"(\w)=", r"\1: ", written)
    try:
        values = yaml_text.parse(f"{{{written}}}", text) if colon else {}
    except ConfigError as error:
        raise ValueError(text) from error
    if not name or (colon and (not values or any(value is None for value in values.values()))):
        raise ValueError(text)
    return Choice(name, values)


def _write_methods(methods: tuple[Choice, ...]) -> Any:
    return [{name: _plain(parameters)} if parameters else name for name, parameters in methods]


def _read_names(value: Any) -> tuple[str, ...]:
    """A list of `4` and `float16`."""
    if not isinstance(value, list) or not all(isinstance(v, int | str) and not isinstance(v, bool) for v in value):
        raise TypeError
    return tuple(str(v) for v in value)


def _write_names(value: tuple[str, ...]) -> Any:
    return [int(name) if name.isdigit() else name for name in value]


_COUNT = integer(1)
_TEXT = Legal(lambda: "text", lambda v: bool(v))
_CHOICE = Legal(
    lambda: "a name, or {type: NAME, parameter: value, ...}", lambda v: bool(v.name), _read_choice, _write_choice
)
_METHODS = Legal(
    lambda: (
        "a list of NAME, NAME:parameter=value or {NAME: {parameter: value}}; "
        f"names: none, {', '.join(sorted(names('methods')))}"
    ),
    lambda v: all(name in names("methods") for name, _ in without_none(v)),
    _read_methods,
    _write_methods,
)
_RATE = finite("a number above 0", lambda v: v > 0)
_DECAY = finite("a number from 0 up", lambda v: v >= 0)
_SHARE = finite("a number from 0 to 1", lambda v: 0 <= v <= 1)
_OBJECTIVE = one_of(lambda: OBJECTIVES)
_SENSITIVITY = one_of(lambda: SENSITIVITIES)
_CONSTRAINTS = Legal(
    lambda: "a list of accuracy=0.88, accuracy_drop=0.5%, size=0.5MB, average_bits=5.2, bops=1.2G, latency=1.5ms",
    read=_read_names,
)
_CANDIDATES = Legal(
    lambda: "a list of at least one of 2 to 16, float16, float32", lambda v: bool(v), _read_names, _write_names
)
_ACTIVATION_CANDIDATES = Legal(lambda: "a list of widths from 2 to 16", read=_read_names, write=_write_names)
_MODE = one_of(lambda: MODES)
_EXPONENTS = one_of(lambda: EXPONENTS)
_PRECISION = one_of(lambda: PRECISIONS)
_TERNARY = one_of(lambda: TERNARY)
_BATCH_NORM = one_of(lambda: BATCH_NORMS)
_KEEP = one_of(lambda: KEEPS)
_MEAN = Legal(lambda: "a list of finite numbers, one per channel", lambda v: len(v) > 0 and all(map(math.isfinite, v)))
_STD = Legal(
    lambda: "a list of finite numbers above 0, one per channel",
    lambda v: len(v) > 0 and all(math.isfinite(s) and s > 0 for s in v),
)
_INPUT = one_of(lambda: INPUTS)
_RANGE = one_of(lambda: CHOOSERS)
_TASK = one_of(lambda: names("tasks"))
_FUNCTIONS = one_of(lambda: FUNCTIONS)
_TARGET = Legal(lambda: f"one of {', '.join(presets())}, or a YAML file", lambda v: bool(v))
_BACKEND = one_of(lambda: names("backends"))
_VERSION = one_of(lambda: ENCODINGS_VERSIONS)
_DEVICE = Legal(lambda: "cpu, cuda or cuda:N", lambda v: re.fullmatch(r"cpu|cuda(:\d+)?", v) is not None)
_SEED = integer(0, 2**32 - 1)
_WORKERS = integer(0, 1024)
_EPOCHS = integer(0)
_OVERRIDES = Legal(lambda: "{PATTERN: {ROLE: {key: value}}}, with null for a role or a pattern that stays float")
_BITWIDTH = Legal(lambda: "an integer from 2 to 16 (bias: 8 to 32); null in place of the role's mapping keeps it float")
_SYMMETRIC = Legal(lambda: "true or false for input and output; true for weight and bias")
_PER_CHANNEL = Legal(lambda: "true or false for weight; false for the other roles")


@dataclass(frozen=True)
class TensorSpec:
    """How the tensors of one role are quantized.

    A bias's scale is always s_in * s_w, whatever is said here.
    bits: width of the integers; `bitwidth` in YAML. symmetric: a signed grid with zero point 0; otherwise unsigned with
    an even zero point. per_channel: one scale per output channel (weights). power_of_2: scales are 2^k; otherwise free.
    range: how the scale is chosen from the calibration data, a key of `pow2_constraints.CHOOSERS`.
    """

    bits: Annotated[int, _BITWIDTH]
    symmetric: Annotated[bool, _SYMMETRIC]
    per_channel: Annotated[bool, _PER_CHANNEL] = False
    power_of_2: bool = True
    range: Annotated[str, _RANGE] = "mse"


WEIGHT = TensorSpec(8, symmetric=True, per_channel=True)
INPUT = OUTPUT = TensorSpec(8, symmetric=False)
BIAS = TensorSpec(32, symmetric=True)
"""How tensors of each role are quantized where nothing else is said."""


class _Site(Protocol):
    """An `artifact.Site`, as far as a plan looks at it."""

    @property
    def module(self) -> str: ...

    @property
    def role(self) -> str: ...


@dataclass(frozen=True)
class QuantPlan:
    """What is quantized and how; None keeps a role float.

    overrides: (pattern, {role: spec}) or (pattern, None); patterns are shell wildcards for module names, None keeps
    everything of these modules float. functions: `exact` computes Softmax and the norms as stated integers, `plain`
    leaves them to the standard's nodes, which executors compute in their own ways. target: whose arithmetic is meant.
    weight_bits, activation_bits, per_tensor: in short, for the roles that are not given: symmetric weights, asymmetric
    activations, 32-bit biases; the input keeps 8 bits, as an image has. Raises ConfigError for an illegal width.
    """

    weight: TensorSpec | None = WEIGHT
    input: TensorSpec | None = INPUT
    output: TensorSpec | None = OUTPUT
    bias: TensorSpec | None = BIAS
    overrides: tuple[tuple[str, Mapping[str, TensorSpec | None] | None], ...] = ()
    functions: str = "exact"
    target: Target = DEFAULT
    weight_bits: InitVar[int] = 8
    activation_bits: InitVar[int] = 8
    per_tensor: InitVar[bool] = False

    def __post_init__(self, weight_bits: int, activation_bits: int, per_tensor: bool) -> None:
        short = {
            "weight": replace(WEIGHT, bits=weight_bits, per_channel=not per_tensor),
            "input": replace(INPUT, bits=max(INPUT.bits, activation_bits)),
            "output": replace(OUTPUT, bits=activation_bits),
        }
        for role, standard in (("weight", WEIGHT), ("input", INPUT), ("output", OUTPUT)):
            if getattr(self, role) == standard:
                object.__setattr__(self, role, short[role])
        for role in ROLES:
            _check_role(role, getattr(self, role), f"plan.{role}")
        for pattern, changes in self.overrides:
            for role, spec in (changes or {}).items():
                _check_role(role, spec, f"plan.overrides.{pattern}.{role}")

    @classmethod
    def default(cls, weight_bits: int = 8, activation_bits: int = 8, per_tensor: bool = False) -> QuantPlan:
        """The plan with these widths; see the class."""
        return cls(weight_bits=weight_bits, activation_bits=activation_bits, per_tensor=per_tensor)

    def spec(self, site: _Site) -> TensorSpec | None:
        """How a site is quantized: as the last override says that matches its module and speaks of its role."""
        for pattern, changes in reversed(self.overrides):
            if fnmatchcase(site.module, pattern) and (changes is None or site.role in changes):
                return None if changes is None else changes[site.role]
        roles = {"weight": self.weight, "input": self.input, "output": self.output, "bias": self.bias}
        return roles[site.role]


@dataclass(frozen=True)
class ModelConfig:
    """Which network.

    name: `digits-cnn`, `torchvision:resnet18`, `timm:NAME`, `net.onnx` or `file.py:factory`. num_classes: of the
    network, where the factory takes them; null: its own default. weights: a state dict's file.
    """

    name: Annotated[str, _TEXT] = "digits-cnn"
    num_classes: Annotated[int | None, _COUNT] = None
    weights: Annotated[str | None, _TEXT] = None


@dataclass(frozen=True)
class DataConfig:
    """Which data. A key that is null takes the data set's own default.

    dataset: a known name or `file.py:function`. path: the folder of a known data set. batch_size: images per batch, in
    calibration and evaluation. workers: processes that read image files. resize: length of the shorter side in pixels.
    crop: side of the central square. mean, std: per channel, of values in [0, 1]. input: what the quantized network
    takes: `float`, the normalized image; `pixels`, bytes (the normalization goes into its first layer).
    """

    dataset: Annotated[str, _TEXT] = "digits"
    path: Annotated[str | None, _TEXT] = None
    batch_size: Annotated[int, _COUNT] = 64
    workers: Annotated[int, _WORKERS] = 0
    resize: Annotated[int | None, _COUNT] = None
    crop: Annotated[int | None, _COUNT] = None
    mean: Annotated[tuple[float, ...] | None, _MEAN] = None
    std: Annotated[tuple[float, ...] | None, _STD] = None
    input: Annotated[str, _INPUT] = "float"


@dataclass(frozen=True)
class QuantizationConfig:
    """What is quantized and how, as written; `plan_of` resolves it.

    overrides: by module pattern, then role, then key: only what differs from the role's own specification.
    functions: `exact`, Softmax and the norms as stated integers, or `plain`, for toolchains that match their nodes.
    """

    weight: TensorSpec | None = WEIGHT
    input: TensorSpec | None = INPUT
    output: TensorSpec | None = OUTPUT
    bias: TensorSpec | None = BIAS
    overrides: Annotated[Mapping[str, Mapping[str, Mapping[str, Any] | None] | None], _OVERRIDES] = field(
        default_factory=dict
    )
    functions: Annotated[str, _FUNCTIONS] = "exact"


@dataclass(frozen=True)
class PtqConfig:
    """Post-training quantization.

    calibration_batches: at most so many batches calibrate; null: all. max_eval_batches: at most so many batches of test
    data are evaluated, evenly spaced; null: all. methods: in order, rewrites of the float network first. Null:
    `default_methods`; an empty list: none. Methods that build on exponents which other methods chose stand behind the
    default ones, unless `none` is the first of the list.
    """

    calibration_batches: Annotated[int | None, _COUNT] = 50
    max_eval_batches: Annotated[int | None, _COUNT] = None
    methods: Annotated[tuple[Choice, ...] | None, _METHODS] = None

    @property
    def applied(self) -> tuple[Choice, ...]:
        """The methods that are named, without `none`."""
        return without_none(self.methods or ())


@dataclass(frozen=True)
class TrainingConfig:
    """Quantization-aware training. Criterion, optimizer and scheduler are names that torch knows, or `file.py:thing`.

    epochs: passes over the training data. learning_rate: of the optimizer, at the start. weight_decay: of the
    optimizer. batch_size: of all processes together. criterion: the loss; null: that of the task, such as
    CrossEntropyLoss for classification. optimizer: what steps the weights. scheduler: what changes the learning rate;
    null: it is constant. final_ptq: activations are calibrated again at the end. mode: `weights` leaves activations
    float until the final PTQ, `full` trains with everything quantized. exponents: how they are learned, `tqt` or `lsq`,
    or `fixed` at those of calibration. exponent_learning_rate: of Adam, for the exponents. freeze_exponents: the share
    of all steps after which exponents no longer move. ternary: how weights of 2 bits become -2^a, 0 and 2^b: `twn`,
    beyond 0.7 E|w|; `ttq`, with an a and a b that are learned; `learned`, beyond a threshold that is; null: not, they
    have the four levels of 2 bits. batch_norm: `live` normalizes with the statistics of each batch, up to the share
    `freeze_batch_norm` of all steps, and then with the running ones; `folded` trains the weights into which it was
    folded. freeze_batch_norm: the share of all steps after which batch norm uses its running statistics. warmup_epochs:
    epochs without quantization. gradual_epochs: epochs after the warm-up, over which the share of quantized tensors
    grows. gradient_clip: the largest norm of the gradient. distillation: share of the loss that compares with the float
    network's logits. temperature: of distillation. precision: `bfloat16` and `float16` are mixed, for devices that are
    faster so. keep: the `last` epoch, or the one that was `best` on the test data (which makes its accuracy there a
    little too good). patience: epochs without a better accuracy until training stops. checkpoint_minutes: between
    checkpoints, beside that of every epoch. tensorboard: curves are written for TensorBoard too.
    """

    epochs: Annotated[int, _COUNT] = 20
    learning_rate: Annotated[float, _RATE] = 1e-4
    weight_decay: Annotated[float, _DECAY] = 0.01
    batch_size: Annotated[int, _COUNT] = 64
    criterion: Annotated[Choice | None, _CHOICE] = None
    optimizer: Annotated[Choice, _CHOICE] = field(default=Choice("AdamW"))
    scheduler: Annotated[Choice | None, _CHOICE] = field(default=Choice("CosineAnnealingLR"))
    final_ptq: bool = True
    mode: Annotated[str, _MODE] = "weights"
    exponents: Annotated[str, _EXPONENTS] = "tqt"
    exponent_learning_rate: Annotated[float, _RATE] = 0.01
    freeze_exponents: Annotated[float, _SHARE] = 0.5
    ternary: Annotated[str | None, _TERNARY] = None
    batch_norm: Annotated[str, _BATCH_NORM] = "live"
    freeze_batch_norm: Annotated[float, _SHARE] = 0.5
    warmup_epochs: Annotated[int, _EPOCHS] = 0
    gradual_epochs: Annotated[int, _EPOCHS] = 0
    gradient_clip: Annotated[float | None, _RATE] = None
    distillation: Annotated[float, _SHARE] = 0.0
    temperature: Annotated[float, _RATE] = 1.0
    precision: Annotated[str, _PRECISION] = "float32"
    keep: Annotated[str, _KEEP] = "last"
    patience: Annotated[int | None, _COUNT] = None
    checkpoint_minutes: Annotated[float, _RATE] = 15.0
    tensorboard: bool = False


@dataclass(frozen=True)
class SearchConfig:
    """A search for mixed precision.

    objective: what becomes small, or `accuracy`, which becomes large. constraints: bounds, from below on accuracy, from
    above on all else. candidates: widths of weights. activation_candidates: widths of activations, which keep their own
    where there are none. sensitivity: how a single tensor's loss is measured. sensitivity_batches: calibration batches
    on which it is measured. points: plans along the front that are quantized and evaluated. latency_table: YAML of a
    chip; null: measured in onnxruntime where a latency is asked for.
    """

    objective: Annotated[str, _OBJECTIVE] = "size"
    constraints: Annotated[tuple[str, ...], _CONSTRAINTS] = ()
    candidates: Annotated[tuple[str, ...], _CANDIDATES] = ("2", "3", "4", "5", "6", "8")
    activation_candidates: Annotated[tuple[str, ...], _ACTIVATION_CANDIDATES] = ()
    sensitivity: Annotated[str, _SENSITIVITY] = "kl"
    sensitivity_batches: Annotated[int, _COUNT] = 4
    points: Annotated[int, _COUNT] = 6
    latency_table: Annotated[str | None, _TEXT] = None


@dataclass(frozen=True)
class ReportConfig:
    """What is measured for the report alone.

    statistics: noise and histogram of every tensor. latency: the time of one sample in onnxruntime, within seconds.
    """

    statistics: bool = True
    latency: bool = True


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `RunConfig()` is the embedded default: digits, 8-bit weights and activations, 32-bit biases.

    task: what the network is for; null: what its data look like. metric: by which it is judged first: one of the task's
    own, `torchmetrics:NAME`, or `file.py:function`. target: whose arithmetic is meant, by name or a YAML file.
    backend: which simulation computes. seed: of every random number. device: where PyTorch computes.
    encodings_version: the AIMET version of `model.encodings`.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    ptq: PtqConfig = PtqConfig()
    training: TrainingConfig = TrainingConfig()
    search: SearchConfig = SearchConfig()
    report: ReportConfig = ReportConfig()
    task: Annotated[str | None, _TASK] = None
    metric: Annotated[str | None, _TEXT] = None
    target: Annotated[str, _TARGET] = "onnxruntime"
    backend: Annotated[str, _BACKEND] = "custom"
    seed: Annotated[int, _SEED] = 0
    device: Annotated[str, _DEVICE] = "cpu"
    encodings_version: Annotated[str, _VERSION] = "1.0.0"


def load(path: str | os.PathLike[str]) -> RunConfig:
    """Reads a YAML file; missing keys take their defaults.

    Raises ConfigError: one line with the file, the key's path and what is legal there.
    """
    return from_mapping(read(path), source=str(path))


def read(path: str | os.PathLike[str]) -> Any:
    """The plain values of a YAML file; those of an empty one are an empty mapping.

    Raises ConfigError: one line with the file and what is wrong in it.
    """
    return yaml_text.parse(foreign.text(path, foreign.MOST_TEXT, ConfigError), str(path))


def from_mapping(mapping: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Checks what was read from `source`; missing keys take their defaults. Raises ConfigError as `load` does."""
    try:
        return _laid_over(_for_target(RunConfig(), mapping), mapping)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Lays values over a configuration, in order: `with_values(config, {"quantization.weight.bitwidth": 4})`.

    A `target` goes first: what it needs of a plan is then where the configuration has the default.
    Raises ConfigError, naming the key, where a file with these values would.
    """
    config = _for_target(config, values)
    for path, value in values.items():
        for key in reversed(path.split(".")):
            value = {key: value}
        config = _laid_over(config, value)
    return config


def dump(config: RunConfig) -> str:
    """The YAML from which `load` makes an equal configuration, with every key."""
    return str(yaml.dump(_plain(config), Dumper=yaml_text.Dumper, sort_keys=False, width=120))


def plan_of(config: RunConfig) -> QuantPlan:
    """The plan that a configuration asks for. Raises ConfigError for a specification that its role cannot have."""
    roles: dict[str, TensorSpec | None] = {role: getattr(config.quantization, role) for role in ROLES}
    for role, spec in roles.items():
        _check_role(role, spec, f"quantization.{role}")
    overrides = tuple(
        (pattern, None if changes is None else _override(roles, changes, f"quantization.overrides.{pattern}"))
        for pattern, changes in config.quantization.overrides.items()
    )
    functions, target = config.quantization.functions, load_target(config.target)
    weight, input, output, bias = (roles[role] for role in ROLES)
    return QuantPlan(weight, input, output, bias, overrides, functions, target)


def _for_target(config: RunConfig, values: Any) -> RunConfig:
    """The configuration with the target that `values` name, and what that needs where there is the default.

    What is not the default was chosen by the user, and is refused later where the target does not take it.
    """
    name = values.get("target") if isinstance(values, Mapping) else None
    if not isinstance(name, str) or name == config.target:
        return config
    limits, plain = load_target(name).limits, QuantizationConfig()
    changes: dict[str, Any] = {}
    for role in ("weight", "input", "output"):
        spec, default = getattr(config.quantization, role), getattr(plain, role)
        if spec == default:
            symmetric = default.symmetric or limits.symmetric
            per_channel = default.per_channel and not limits.per_tensor
            changes[role] = replace(default, symmetric=symmetric, per_channel=per_channel)
    if limits.bias_bits is not None and config.quantization.bias == plain.bias:
        changes["bias"] = TensorSpec(limits.bias_bits, symmetric=True)
    return replace(config, target=name, quantization=replace(config.quantization, **changes))


def default_methods(config: RunConfig) -> tuple[Choice, ...]:
    """The methods of a run that names none: cheap ones that win much at its weights' width. None above 8 bits."""
    weight = config.quantization.weight
    if weight is None or weight.bits > 8:
        return ()
    if not weight.per_channel:
        return EXPONENT_METHODS
    return EIGHT_BIT_METHODS if weight.bits == 8 else NARROW_METHODS


def parameters(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Makes a dataclass, such as a method, from its YAML.

    `parameters(AdaRound, {"iterations": 100}, "ptq.methods.adaround")`. Raises ConfigError that names the key.
    """
    made: T = _build(cls, values, where)
    return made


def defaults(cls: type) -> dict[str, Any]:
    """A dataclass's YAML keys and what they are when they are not given; None for those that must be."""
    found = {key: _default(cls, name) for key, (name, _) in _keys(cls).items()}
    return {key: None if value is MISSING else _plain(value) for key, value in found.items()}


def is_in_file(name: str) -> bool:
    """Whether a name is written as `path/to/file.py:thing`."""
    return name.endswith(".py") or ".py:" in name


def from_file(name: str, error: type[Pow2QuantError] = ConfigError) -> Any:
    """The object that `path/to/file.py:thing` stands for. The file may import its neighbours.

    Raises `error`, naming the file, when it is not there or fails, or has no such thing (then with what it has).
    """
    file, _, thing = name.rpartition(":")
    path = Path(file).resolve()
    if not file.endswith(".py") or not thing:
        raise error(f"{name}: expected path/to/file.py:NAME")
    if not path.is_file():
        raise error(f"{file}: no such file")
    module = _module(path, error)
    if not hasattr(module, thing):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise error(f"{file}: has no {thing!r}; it has {', '.join(key for key in own if key[0] != '_') or 'nothing'}")
    return getattr(module, thing)


@contextmanager
def users_code(name: str, error: type[Pow2QuantError]) -> Iterator[None]:
    """Around calls into `file.py:thing`: neighbours of the file can be imported, and what it raises becomes `error`."""
    path = Path(name.partition(".py:")[0] + ".py" if ".py:" in name else name).resolve()
    before = list(sys.path)
    sys.path.insert(0, str(path.parent))
    try:
        yield
    except Pow2QuantError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as raised:
        frames = [f.lineno for f in traceback.extract_tb(raised.__traceback__) if f.filename == str(path)]
        line = raised.lineno if isinstance(raised, SyntaxError) else frames[-1] if frames else None
        place = f"{path}, line {line}" if line else str(path)
        raise error(f"{place}: {type(raised).__name__}: {one_line(str(raised))}") from raised
    finally:
        sys.path[:] = before


def _module(path: Path, error: type[Pow2QuantError]) -> ModuleType:
    """The module in a file, executed once for each version of the file."""
    version = f"{path}:{path.stat().st_mtime_ns}"
    name = f"pow2quant_file_{sha256(version.encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)
        module.__file__ = str(path)
        try:
            with users_code(str(path), error):
                exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _laid_over(config: RunConfig, mapping: Mapping[str, Any]) -> RunConfig:
    result: RunConfig = _build(config, mapping, "")
    plan_of(result)
    return result


def _override(
    roles: Mapping[str, TensorSpec | None], changes: Mapping[str, Mapping[str, Any] | None], path: str
) -> dict[str, TensorSpec | None]:
    specs: dict[str, TensorSpec | None] = {}
    for role, keys in changes.items():
        where = f"{path}.{role}"
        if role not in ROLES:
            raise _unknown(where, role, ROLES)
        base = roles[role] or _default(QuantizationConfig, role)
        specs[role] = None if keys is None else _build(base, keys, where)
        _check_role(role, specs[role], where)
    return specs


def _check_role(role: str, spec: TensorSpec | None, path: str) -> None:
    if spec is None:
        return
    widths = WIDTHS[role]
    if spec.bits not in widths:
        words = f"an integer from {widths.start} to {widths.stop - 1}; to keep it float, {path}: null"
        raise _illegal(f"{path}.bitwidth", spec.bits, words)
    if not spec.symmetric and role in ("weight", "bias"):
        raise _illegal(f"{path}.symmetric", spec.symmetric, f"true ({role}: signed with zero point 0)")
    if spec.per_channel and role != "weight":
        raise _illegal(f"{path}.per_channel", spec.per_channel, "false (only weights have a scale per channel)")


def _build(default: Any, mapping: Any, path: str) -> Any:
    """Lays a mapping over a dataclass's instance, or makes one of a class; everything is checked on the way."""
    cls = default if isinstance(default, type) else type(default)
    known = _keys(cls)
    if not isinstance(mapping, Mapping):
        raise _illegal(path or "top level", mapping, f"a mapping with keys of {', '.join(known)}")
    values = {}
    for key, value in mapping.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise _unknown(where, str(key), known)
        name, hint = known[key]
        current = _default(cls, name) if default is cls or getattr(default, name) is None else getattr(default, name)
        values[name] = _value(hint, current, value, where)
    if default is not cls:
        return replace(default, **values)
    for key, (name, _) in known.items():
        if name not in values and _default(cls, name) is MISSING:
            raise ConfigError(f"{path}.{key}: missing")
    return cls(**values)


def _value(hint: Any, current: Any, value: Any, path: str) -> Any:
    """One value of a mapping. Parts are laid over their `current` value."""
    legal, nullable = _legal(hint)
    if value is None and nullable:
        return None
    if is_dataclass(current):
        return _build(current, value, path)
    try:
        plain = json.dumps(value, default=os.fspath)
        result = legal.read(json.loads(plain)) if legal.read else _adapter(hint).validate_json(plain, strict=True)
    except (TypeError, ValueError, KeyError, AttributeError):  # pydantic's ValidationError is a ValueError
        result = None
    if result is None or not legal.accepts(result):
        raise _illegal(path, value, legal.words() + (", or null" if nullable else ""))
    return result


@cache
def _keys(cls: type) -> dict[str, tuple[str, Any]]:
    """YAML key -> (field, annotation)."""
    hints = get_type_hints(cls, include_extras=True)
    return {"bitwidth" if f.name == "bits" else f.name: (f.name, hints[f.name]) for f in fields(cls) if f.init}


def _default(cls: Any, name: str) -> Any:
    """A field's default, or MISSING."""
    (found,) = (f for f in fields(cls) if f.name == name)
    return found.default if found.default_factory is MISSING else found.default_factory()


def _legal(hint: Any) -> tuple[Legal, bool]:
    """What an annotation allows, and whether it allows null."""
    inner, *metadata = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    plain = Legal(lambda: words.get(inner, str(inner)))
    return next((m for m in metadata if isinstance(m, Legal)), plain), type(None) in get_args(inner)


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings -> what YAML writes."""
    if is_dataclass(value):
        keys = _keys(type(value)).items()  # type: ignore[arg-type]
        return {key: _written(hint, getattr(value, name)) for key, (name, hint) in keys}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _written(hint: Any, value: Any) -> Any:
    return None if value is None else _legal(hint)[0].write(value)


def _illegal(path: str, value: Any, words: str) -> ConfigError:
    try:
        text = json.dumps(value) if isinstance(value, bool | int | float | str | None) else one_line(repr(value))
    except ValueError:
        text = "an integer of thousands of digits"
    return ConfigError(
        f"{one_line(path)}: {text if len(text) <= 60 else text[:57] + '...'} is not legal; legal: {words}"
    )


def _unknown(path: str, key: str, known: Iterable[str]) -> ConfigError:
    nearest = [f", did you mean {match}?" for match in get_close_matches(key, known, n=1, cutoff=0.5)]
    return ConfigError(f"{one_line(path)}: unknown key{''.join(nearest)}; known: {', '.join(known)}")
