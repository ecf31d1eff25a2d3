"""The configuration: what is written is what is run, and what is wrong is named."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pow2quant import plugins
from pow2quant.artifact import Site
from pow2quant.config import (
    ROLES,
    WIDTHS,
    Choice,
    DataConfig,
    ModelConfig,
    PtqConfig,
    QuantizationConfig,
    QuantPlan,
    RunConfig,
    TensorSpec,
    TrainingConfig,
    dump,
    from_mapping,
    load,
    parameters,
    plan_of,
    with_values,
)
from pow2quant.errors import ConfigError
from pow2quant.pow2_constraints import CHOOSERS

DEFAULT_FILE = Path(__file__).parents[1] / "configs" / "quantization_config.yaml"


@pytest.fixture(scope="module", autouse=True)
def two_methods():
    """Rows for two methods, so that these tests do not depend on which methods there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plugins.TABLES["methods"], "adaround", "pow2quant.methods.adaround:AdaRound")
        patch.setitem(plugins.TABLES["methods"], "qdrop", "pow2quant.methods.qdrop:QDrop")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("config")


def read(text: str, folder: Path) -> RunConfig:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return load(folder / "run.yaml")


def complaint(text: str, folder: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        read(text, folder)
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix(f"{folder / 'run.yaml'}: ")


def test_the_annotated_default_is_the_default():
    assert load(DEFAULT_FILE) == RunConfig()


def test_the_annotated_default_has_every_key():
    assert yaml.safe_load(DEFAULT_FILE.read_text()).keys() == yaml.safe_load(dump(RunConfig())).keys()
    for part, keys in yaml.safe_load(dump(RunConfig())).items():
        if isinstance(keys, dict):
            assert yaml.safe_load(DEFAULT_FILE.read_text())[part].keys() == keys.keys()


def test_the_embedded_default_is_w8a8_on_digits():
    plan = plan_of(RunConfig())
    assert plan == QuantPlan.default()
    assert RunConfig().model.name == "digits-cnn"
    assert RunConfig().data.dataset == "digits"
    assert [getattr(plan, role).bits for role in ROLES] == [8, 8, 8, 32]
    assert [getattr(plan, role).symmetric for role in ROLES] == [True, False, False, True]
    assert [getattr(plan, role).per_channel for role in ROLES] == [True, False, False, False]


CONTRACT = """
model:  {name: "torchvision:mobilenet_v2", num_classes: 1000, weights: weights.pt}
data:   {dataset: imagefolder, path: data/, batch_size: 64, workers: 2, resize: 256, crop: 224,
         mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
quantization:
  weight: {bitwidth: 8,  symmetric: true,  power_of_2: true, per_channel: true}
  input:  {bitwidth: 8,  symmetric: false, power_of_2: true}
  output: {bitwidth: 8,  symmetric: false, power_of_2: true, range: minmax}
  bias:   {bitwidth: 32, symmetric: true,  power_of_2: true}
  overrides: {"classifier.*": {weight: {bitwidth: 4}}, "features.0": null}
ptq:    {calibration_batches: 50, max_eval_batches: 100, methods: [qdrop, {adaround: {iterations: 10000}}]}
training: {epochs: 20, learning_rate: 1e-4, weight_decay: 0.01, batch_size: 64, criterion: CrossEntropyLoss,
           optimizer: {type: SGD, momentum: 0.9}, scheduler: null}
"""


def test_a_whole_file(tmp_path):
    config = read(CONTRACT, tmp_path)
    assert config == RunConfig(
        model=ModelConfig("torchvision:mobilenet_v2", 1000, "weights.pt"),
        data=DataConfig("imagefolder", "data/", 64, 2, 256, 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        quantization=QuantizationConfig(
            output=TensorSpec(8, symmetric=False, range="minmax"),
            overrides={"classifier.*": {"weight": {"bitwidth": 4}}, "features.0": None},
        ),
        ptq=PtqConfig(50, 100, (Choice("qdrop"), Choice("adaround", {"iterations": 10000}))),
        training=TrainingConfig(
            criterion=Choice("CrossEntropyLoss"), optimizer=Choice("SGD", {"momentum": 0.9}), scheduler=None
        ),
    )
    assert [(name, values) for name, values in config.ptq.methods] == [
        ("qdrop", {}),
        ("adaround", {"iterations": 10000}),
    ]


def test_missing_keys_take_the_defaults_of_their_role(tmp_path):
    config = read("quantization: {weight: {bitwidth: 4}, output: {range: minmax}, bias: null}", tmp_path)
    assert config.quantization == QuantizationConfig(
        weight=TensorSpec(4, symmetric=True, per_channel=True),
        output=TensorSpec(8, symmetric=False, range="minmax"),
        bias=None,
    )
    assert read("", tmp_path) == RunConfig()


names = st.text(min_size=1, max_size=12)


counts = st.integers(1, 10**6)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


floats = st.floats(allow_nan=False, allow_infinity=False)


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


rules = st.sampled_from(sorted(CHOOSERS))


@st.composite
def specs(draw, role):
    return TensorSpec(
        bits=draw(st.sampled_from(WIDTHS[role])),
        symmetric=role in ("weight", "bias") or draw(st.booleans()),
        per_channel=role == "weight" and draw(st.booleans()),
        power_of_2=draw(st.booleans()),
        range=draw(rules),
    )


@st.composite
def partial_specs(draw, role):
    keys = {"bitwidth": st.sampled_from(WIDTHS[role]), "range": rules, "power_of_2": st.booleans()}
    return draw(st.none() | st.fixed_dictionaries({}, optional=keys))


def roles_of(make):
    return {role: make(role) for role in ROLES}


choices = st.builds(
    Choice, names, st.dictionaries(st.text(max_size=5).filter(lambda key: key != "type"), plain, max_size=2)
)


configs = st.builds(
    RunConfig,
    model=st.builds(ModelConfig, names, st.none() | counts, st.none() | names),
    data=st.builds(
        DataConfig,
        *(names, st.none() | names, counts, st.integers(0, 64), st.none() | counts, st.none() | counts),
        mean=st.none() | st.lists(floats, min_size=1, max_size=4).map(tuple),
        std=st.none() | st.lists(positive, min_size=1, max_size=4).map(tuple),
    ),
    quantization=st.builds(
        QuantizationConfig,
        **roles_of(lambda role: st.none() | specs(role)),
        overrides=st.dictionaries(
            names, st.none() | st.fixed_dictionaries({}, optional=roles_of(partial_specs)), max_size=3
        ),
    ),
    ptq=st.builds(
        PtqConfig,
        *(st.none() | counts, st.none() | counts),
        st.lists(
            st.builds(Choice, st.sampled_from(["adaround", "qdrop"]), st.dictionaries(names, plain, max_size=2)),
            max_size=3,
        ).map(tuple),
    ),
    training=st.builds(
        TrainingConfig,
        *(counts, positive, st.floats(min_value=0, allow_infinity=False), counts),
        *(choices, choices, st.none() | choices, st.booleans()),
    ),
    backend=st.just("custom"),
    seed=st.integers(0, 2**32 - 1),
    device=st.sampled_from(["cpu", "cuda", "cuda:1"]),
    encodings_version=st.sampled_from(["0.6.1", "1.0.0", "2.0.0"]),
)


@given(configs)
def test_dump_and_load_are_inverse(folder, config):
    assert read(dump(config), folder) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "quantization: {weight: {bitwidth: 33}}",
            "quantization.weight.bitwidth: 33 is not legal; legal: an integer from 2 to 16",
        ),
        ("quantization: {weight: {bitwidth: 32}}", "to keep it float, quantization.weight: null"),
        (
            "quantization: {bias: {bitwidth: 7}}",
            "quantization.bias.bitwidth: 7 is not legal; legal: an integer from 8 to 32",
        ),
        (
            'quantization: {weight: {bitwidth: "8"}}',
            'quantization.weight.bitwidth: "8" is not legal; legal: an integer',
        ),
        (
            "quantization: {weight: {bitwidth: true}}",
            "quantization.weight.bitwidth: true is not legal; legal: an integer",
        ),
        (
            "quantization: {weight: {bitwidth: 8.0}}",
            "quantization.weight.bitwidth: 8.0 is not legal; legal: an integer",
        ),
        ("quantization: {weight: {bitwidth: null}}", "quantization.weight.bitwidth: null is not legal"),
        ("quantization: {weight: {symmetric: 1}}", "quantization.weight.symmetric: 1 is not legal; legal: true"),
        (
            "quantization: {weight: {symmetric: false}}",
            "quantization.weight.symmetric: false is not legal; legal: true",
        ),
        (
            "quantization: {output: {per_channel: true}}",
            "quantization.output.per_channel: true is not legal; legal: false",
        ),
        (
            "quantization: {output: {power_of_2: 1}}",
            "quantization.output.power_of_2: 1 is not legal; legal: true or false",
        ),
        ("quantization: {output: {range: max}}", 'quantization.output.range: "max" is not legal; legal: one of min'),
        (
            "quantization: {wieght: {bitwidth: 8}}",
            "quantization.wieght: unknown key, did you mean weight?; known: weight, i",
        ),
        ("quantization: {weight: {bits: 8}}", "quantization.weight.bits: unknown key, did you mean bitwidth?"),
        ("quantization: {weight: 8}", "quantization.weight: 8 is not legal; legal: a mapping with keys of bitwidth"),
        (
            "quantization: {overrides: {fc: {weight: {bitwidth: 1}}}}",
            "quantization.overrides.fc.weight.bitwidth: 1 is not",
        ),
        (
            "quantization: {overrides: {fc: {weigth: null}}}",
            "quantization.overrides.fc.weigth: unknown key, did you mean w",
        ),
        (
            "quantization: {overrides: {fc: {weight: {bit: 1}}}}",
            "quantization.overrides.fc.weight.bit: unknown key, did",
        ),
        ("quantization: {overrides: {fc: 4}}", 'quantization.overrides: {"fc": 4} is not legal'.replace('"', "'")),
        ("quantisation: {}", "quantisation: unknown key, did you mean quantization?"),
        ("data: {batch_size: 0}", "data.batch_size: 0 is not legal; legal: an integer from 1 up"),
        (
            "data: {std: [0.2, 0]}",
            "data.std: [0.2, 0] is not legal; legal: a list of finite numbers above 0, one per channel",
        ),
        ("data: {mean: [.nan]}", "data.mean: [nan] is not legal; legal: a list of finite numbers"),
        ("data: {mean: 0.5}", "data.mean: 0.5 is not legal; legal: a list of finite numbers"),
        ("data: null", "data: null is not legal; legal: a mapping with keys of dataset, path"),
        ("model: {name: 3}", "model.name: 3 is not legal; legal: text"),
        ("model: {name: null}", "model.name: null is not legal; legal: text"),
        (
            "ptq: {methods: [adaruond]}",
            "legal: a list of NAME, NAME:parameter=value or {NAME: {parameter: value}}; ",
        ),
        ("ptq: {methods: adaround}", 'ptq.methods: "adaround" is not legal; legal: a list'),
        ("ptq: {methods: [{adaround: 3}]}", "ptq.methods: [{'adaround': 3}] is not legal"),
        ("ptq: {methods: [{adaround: {}, qdrop: {}}]}", "ptq.methods: [{'adaround': {}, 'qdrop': {}}] is not legal"),
        ("training: {learning_rate: 0}", "training.learning_rate: 0 is not legal; legal: a number above 0"),
        ("training: {learning_rate: .inf}", "training.learning_rate: Infinity is not legal"),
        (
            "training: {temperature: 1.0e+160}",
            "training.temperature: 1e+160 is not legal; legal: a number from 0.001 to 1000",
        ),
        ("training: {optimizer: {lr: 1}}", "training.optimizer: {'lr': 1} is not legal; legal: a name, or {type: NAME"),
        ("training: {optimizer: {type: 3}}", "training.optimizer: {'type': 3} is not legal; legal: a name"),
        ("training: {optimizer: null}", "training.optimizer: null is not legal"),
        ("backend: aimett", 'backend: "aimett" is not legal; legal: one of '),
        ("device: gpu", 'device: "gpu" is not legal; legal: cpu, cuda or cuda:N'),
        ("encodings_version: 1.0", "encodings_version: 1.0 is not legal; legal: one of 0.6.1, 1.0.0, 2.0.0"),
        ("seed: -1", "seed: -1 is not legal; legal: an integer from 0 to 4294967295"),
        ("[1]", "top level: [1] is not legal; legal: a mapping with keys of model, data"),
        ("seed: 1\ndata:\n  path: a\n  path: b\n", "data.path: given twice (line 4)"),
        ("data:\n  workers: 010\n", "010 is a number in another base in YAML (line 2); for a text, use quotes"),
        ("seed: 1:30", "1:30 is a number in another base in YAML (line 1); for a text, use quotes"),
        ("ptq: {methods: [{adaround: {a: 1, a: 2}}]}", "ptq.methods.adaround.a: given twice (line 1)"),
        ("a: [", "not YAML: line 1, column 5: "),
        (
            "model: !!python/object/apply:os.system [ls]",
            "not YAML: line 1, column 8: could not determine a constructor",
        ),
        ("&a [*a]", "a value contains itself (line 1)"),
        ("\0", "not YAML: "),
    ],
)
def test_what_is_wrong_is_named_in_one_line(text, expected, tmp_path):
    assert expected in complaint(text, tmp_path)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"model: {name: \xe9}")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match=path.name):
            load(path)


@given(st.sampled_from(ROLES), st.integers())
def test_exactly_the_legal_widths_are_accepted(role, bits):
    mapping = {"quantization": {role: {"bitwidth": bits}}}
    if bits in WIDTHS[role]:
        assert getattr(from_mapping(mapping).quantization, role).bits == bits
    else:
        with pytest.raises(ConfigError, match=rf"quantization\.{role}\.bitwidth: {bits} "):
            from_mapping(mapping)


known = st.sampled_from(
    ["quantization", "weight", "overrides", "data", "mean", "ptq", "methods", "training", "optimizer"]
)


@given(st.recursive(plain, lambda inner: st.dictionaries(known | names, inner, max_size=4), max_leaves=12))
def test_whatever_a_file_holds_is_a_configuration_or_one_line(mapping):
    try:
        config = from_mapping(mapping)
    except ConfigError as error:
        (line,) = str(error).splitlines()
        assert line.startswith("configuration: ")
    else:
        assert from_mapping(yaml.safe_load(dump(config))) == config


def test_values_from_the_command_line_lie_over_a_file(tmp_path):
    config = read(
        "quantization: {weight: {range: minmax}, overrides: {fc: {weight: {range: mse}}}, bias: null}", tmp_path
    )
    merged = with_values(
        config,
        {"quantization.weight.bitwidth": 4, "model.weights": tmp_path / "w.pt", "quantization.bias.bitwidth": 24},
    )
    assert merged.quantization.weight == TensorSpec(4, symmetric=True, per_channel=True, range="minmax")
    assert merged.quantization.bias == TensorSpec(24, symmetric=True)
    assert merged.model.weights == str(tmp_path / "w.pt")
    assert plan_of(merged).overrides[0][1]["weight"].bits == 4  # an override inherits what was laid over its role
    assert with_values(merged, {"quantization.weight": None}).quantization.weight is None
    assert with_values(config, {}) == config


@pytest.mark.parametrize("key", ["quantization.weight.bitwidth", "quantization.weight.bits", "nonsense.key"])
def test_a_wrong_value_from_the_command_line_names_its_key(key):
    with pytest.raises(ConfigError, match=rf"^{key.split('.')[0]}[\w.]*: ") as raised:
        with_values(RunConfig(), {key: 99})
    assert str(raised.value).split(": ")[0] in key


def site(name: str, role: str = "weight") -> Site:
    return Site(name, role)


def test_the_last_override_that_speaks_of_a_role_wins():
    overrides = {
        "*": {"weight": {"bitwidth": 6}},
        "features.*": {"weight": {"bitwidth": 4}, "output": None},
        "features.0": {"weight": {"bitwidth": 8, "per_channel": False}},
        "fc": None,
        "x": {"input": {"bitwidth": 16}},
    }
    plan = plan_of(RunConfig(quantization=QuantizationConfig(overrides=overrides)))
    assert plan.spec(site("stem.weight")).bits == 6
    assert plan.spec(site("features.1.conv.weight")) == TensorSpec(4, symmetric=True, per_channel=True)
    assert plan.spec(site("features.0.weight")) == TensorSpec(8, symmetric=True, per_channel=False)
    assert plan.spec(site("features.0.output", "output")) is None
    assert plan.spec(site("features.0.bias", "bias")) == plan.bias
    assert [plan.spec(site(f"fc.{role}", role)) for role in ("weight", "bias", "output")] == [None] * 3
    assert plan.spec(site("x", "input")).bits == 16
    assert plan.spec(site("y", "input")) == plan.input


patterns = st.sampled_from(["*", "a*", "*.b", "a.b", "b", "a.?", "[ab].b"])


@given(
    st.lists(st.tuples(patterns, st.none() | st.fixed_dictionaries({}, optional=roles_of(partial_specs))), max_size=5)
)
def test_overrides_against_plain_search(pairs):
    overrides = dict(pairs)
    plan = plan_of(RunConfig(quantization=QuantizationConfig(overrides=overrides)))
    for module in ("a.b", "b", "a", "b.b"):
        for role in ("weight", "output", "bias"):
            expected = getattr(plan, role)
            for pattern, changes in overrides.items():
                if fnmatchcase(module, pattern) and (changes is None or role in changes):
                    change = changes and changes[role]
                    renamed = {"bits" if key == "bitwidth" else key: value for key, value in (change or {}).items()}
                    expected = None if change is None else replace(getattr(plan, role), **renamed)
            assert plan.spec(site(f"{module}.{role}", role)) == expected


def test_a_float_role_can_be_quantized_in_one_module():
    config = with_values(RunConfig(), {"quantization.output": None})
    config = with_values(config, {"quantization.overrides": {"fc": {"output": {"bitwidth": 16}}}})
    assert plan_of(config).spec(site("conv.output", "output")) is None
    assert plan_of(config).spec(site("fc.output", "output")) == TensorSpec(16, symmetric=False)


def test_a_plan_made_by_hand_is_checked_too():
    with pytest.raises(ConfigError, match=r"plan\.weight\.bitwidth: 1 "):
        QuantPlan.default(weight_bits=1)
    with pytest.raises(ConfigError, match=r"plan\.input\.bitwidth: 32 "):
        QuantPlan.default(activation_bits=32)
    with pytest.raises(ConfigError, match=r"quantization\.bias\.symmetric: false "):
        plan_of(RunConfig(quantization=QuantizationConfig(bias=TensorSpec(32, symmetric=False))))
    assert QuantPlan.default(4, 6, per_tensor=True).weight == TensorSpec(4, symmetric=True)
    assert QuantPlan.default(4, 6).output == TensorSpec(6, symmetric=False)
    assert QuantPlan.default(4, 6).input == TensorSpec(8, symmetric=False)


@dataclass(frozen=True)
class Toy:
    iterations: int
    rate: float = 0.5
    warm: bool = True


def test_a_methods_parameters_are_its_fields():
    assert parameters(Toy, {"iterations": 3, "rate": 1}, "ptq.methods.toy") == Toy(3, 1.0)
    for values, expected in [
        ({"iterations": 3, "rat": 1}, r"^ptq.methods.toy.rat: unknown key, did you mean rate\?"),
        ({"iterations": 2.5}, "^ptq.methods.toy.iterations: 2.5 is not legal; legal: an integer$"),
        ({"iterations": 3, "warm": "yes"}, '^ptq.methods.toy.warm: "yes" is not legal; legal: true or false$'),
        ({}, "^ptq.methods.toy.iterations: missing$"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            parameters(Toy, values, "ptq.methods.toy")


def test_neither_torch_nor_pydantic_is_imported_along():
    code = "import sys, pow2quant.config; print({'torch', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
