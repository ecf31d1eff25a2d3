"""The sections of a configuration file: frozen dataclasses whose fields are its keys.

A field's annotation says what its values may be: the type and a `Legal`, both checked by pydantic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pow2quant.config.choices import (
    ACTIVATION_CANDIDATES,
    CANDIDATES,
    CHOICE,
    CONSTRAINTS,
    METHODS,
    Choice,
    without_none,
)
from pow2quant.config.plan import BIAS, INPUT, OUTPUT, WEIGHT, TensorSpec
from pow2quant.mappings.legal import ABOVE_ZERO, FROM_ZERO, SHARE, Legal, finite, integer, one_of
from pow2quant.plugins import names
from pow2quant.targets import presets

ENCODINGS_VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
MODES = ("weights", "full")
EXPONENTS = ("tqt", "lsq", "fixed")
BATCH_NORMS = ("live", "folded")
MIXINGS = ("cutmix", "mixup")
TERNARY = ("twn", "ttq", "learned")
KEEPS = ("last", "best")
INPUTS = ("float", "pixels")
PRECISIONS = ("float32", "bfloat16", "float16")
OBJECTIVES = ("size", "bops", "latency", "accuracy")
FUNCTIONS = ("exact", "plain")
SENSITIVITIES = ("kl", "loss", "sqnr", "hessian")


_COUNT = integer(1)
_TEXT = Legal(lambda: "text", lambda v: bool(v))
_TEMPERATURE = finite("a number from 0.001 to 1000", lambda v: 0.001 <= v <= 1000)
_BELOW_ONE = finite("a number from 0 up to but not 1", lambda v: 0 <= v < 1)
_OBJECTIVE = one_of(lambda: OBJECTIVES)
_SENSITIVITY = one_of(lambda: SENSITIVITIES)
_MODE = one_of(lambda: MODES)
_EXPONENTS = one_of(lambda: EXPONENTS)
_PRECISION = one_of(lambda: PRECISIONS)
_TERNARY = one_of(lambda: TERNARY)
_BATCH_NORM = one_of(lambda: BATCH_NORMS)
_KEEP = one_of(lambda: KEEPS)
_MIXING = one_of(lambda: MIXINGS)
_MEAN = Legal(lambda: "a list of finite numbers, one per channel", lambda v: len(v) > 0 and all(map(math.isfinite, v)))
_STD = Legal(
    lambda: "a list of finite numbers above 0, one per channel",
    lambda v: len(v) > 0 and all(math.isfinite(s) and s > 0 for s in v),
)
_INPUT = one_of(lambda: INPUTS)
_TASK = one_of(lambda: names("tasks"))
_FUNCTIONS = one_of(lambda: FUNCTIONS)
_STORAGE = one_of(lambda: ("int4", "int8"))
_TARGET = Legal(lambda: f"one of {', '.join(presets())}, or a YAML file", lambda v: bool(v))
_BACKEND = one_of(lambda: names("backends"))
_VERSION = one_of(lambda: ENCODINGS_VERSIONS)
_DEVICE = Legal(lambda: "cpu, cuda or cuda:N", lambda v: re.fullmatch(r"cpu|cuda(:\d+)?", v) is not None)
_SEED = integer(0, 2**32 - 1)
_WORKERS = integer(0, 1024)
_EPOCHS = integer(0)
_SUMS = integer(2, 16)
_OVERRIDES = Legal(lambda: "{PATTERN: {ROLE: {key: value}}}, with null for a role or a pattern that stays float")


@dataclass(frozen=True)
class TeacherConfig:
    """Which network teaches. The keys are those of `model`, but it has no default."""

    name: Annotated[str, _TEXT]
    num_classes: Annotated[int | None, _COUNT] = None
    weights: Annotated[str | None, _TEXT] = None


@dataclass(frozen=True)
class ModelConfig(TeacherConfig):
    """Which network.

    name: `digits-cnn`, `torchvision:resnet18`, `timm:NAME`, `net.onnx` or `file.py:factory`. num_classes: of the
    network, where the factory takes them; null: its own default. weights: a state dict's file.
    """

    name: Annotated[str, _TEXT] = "digits-cnn"


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
    sums: the least bits of what is added and of its sum; layers read a sum with a ReLU through a second ReLU, in the
    bits of outputs; null: sums have those, too. storage: the type of weights of up to 4 bits in ONNX files; of `int8`,
    twice as large, onnxruntime runs integer kernels, and any opset from 13 has it.
    """

    weight: TensorSpec | None = WEIGHT
    input: TensorSpec | None = INPUT
    output: TensorSpec | None = OUTPUT
    bias: TensorSpec | None = BIAS
    overrides: Annotated[Mapping[str, Mapping[str, Mapping[str, Any] | None] | None], _OVERRIDES] = field(
        default_factory=dict
    )
    functions: Annotated[str, _FUNCTIONS] = "exact"
    sums: Annotated[int | None, _SUMS] = None
    storage: Annotated[str, _STORAGE] = "int4"


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
    methods: Annotated[tuple[Choice, ...] | None, METHODS] = None

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
    network's logits. temperature: of distillation. teacher: a network whose logits are compared with in place of those
    of the float network, such as a larger one, with the keys of `model`. feature_distillation: weight of the mean
    squared error behind every block, by the energy of what the float network computes there; it is added to the loss.
    mixing: what makes one image of two: `cutmix` puts a rectangle of another image into each, `mixup` adds two in
    random shares; null: nothing does. It needs `distillation: 1`, as labels are not mixed. mixed_steps: the share of
    steps with such images. average: decay of the moving average of the weights, which is measured and kept in their
    place; 0: none. relative_steps: steps of the optimizer are in proportion to each channel's weights. precision:
    `bfloat16` and `float16` are mixed, for devices that are faster so. keep: the `last` epoch, or the one that was
    `best` on the test data (which makes its accuracy there a little too good). patience: epochs without a better
    accuracy until training stops. checkpoint_minutes: between checkpoints, beside that of every epoch. tensorboard:
    curves are written for TensorBoard too.
    """

    epochs: Annotated[int, _COUNT] = 20
    learning_rate: Annotated[float, ABOVE_ZERO] = 1e-4
    weight_decay: Annotated[float, FROM_ZERO] = 0.01
    batch_size: Annotated[int, _COUNT] = 64
    criterion: Annotated[Choice | None, CHOICE] = None
    optimizer: Annotated[Choice, CHOICE] = field(default=Choice("AdamW"))
    scheduler: Annotated[Choice | None, CHOICE] = field(default=Choice("CosineAnnealingLR"))
    final_ptq: bool = True
    mode: Annotated[str, _MODE] = "weights"
    exponents: Annotated[str, _EXPONENTS] = "tqt"
    exponent_learning_rate: Annotated[float, ABOVE_ZERO] = 0.01
    freeze_exponents: Annotated[float, SHARE] = 0.5
    ternary: Annotated[str | None, _TERNARY] = None
    batch_norm: Annotated[str, _BATCH_NORM] = "live"
    freeze_batch_norm: Annotated[float, SHARE] = 0.5
    warmup_epochs: Annotated[int, _EPOCHS] = 0
    gradual_epochs: Annotated[int, _EPOCHS] = 0
    gradient_clip: Annotated[float | None, ABOVE_ZERO] = None
    distillation: Annotated[float, SHARE] = 0.0
    temperature: Annotated[float, _TEMPERATURE] = 1.0
    teacher: TeacherConfig | None = None
    feature_distillation: Annotated[float, FROM_ZERO] = 0.0
    mixing: Annotated[str | None, _MIXING] = None
    mixed_steps: Annotated[float, SHARE] = 0.5
    average: Annotated[float, _BELOW_ONE] = 0.0
    relative_steps: bool = False
    precision: Annotated[str, _PRECISION] = "float32"
    keep: Annotated[str, _KEEP] = "last"
    patience: Annotated[int | None, _COUNT] = None
    checkpoint_minutes: Annotated[float, ABOVE_ZERO] = 15.0
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
    constraints: Annotated[tuple[str, ...], CONSTRAINTS] = ()
    candidates: Annotated[tuple[str, ...], CANDIDATES] = ("2", "3", "4", "5", "6", "8")
    activation_candidates: Annotated[tuple[str, ...], ACTIVATION_CANDIDATES] = ()
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
