"""AIMET's encodings: exact round trips, AIMET's own files and readers, and errors that name file, tensor and key."""

from __future__ import annotations

import contextlib
import json
import re
from collections import OrderedDict

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pow2quant.adapters.aimet_encodings import (
    VERSIONS,
    apply,
    channel_axes,
    convert,
    dumps,
    export_0_6_1,
    export_1_0_0,
    export_2_0_0,
    load,
    loads,
)
from pow2quant.adapters.files import GRIDS
from pow2quant.adapters.onnx_qdq import from_qdq, to_qdq
from pow2quant.errors import ConfigError, EncodingError, FileFormatError, OutputError
from pow2quant.pow2_constraints import Encoding, IntGrid
from tests.strategies import encodings, grids, tables, widths


def encoding(scale, bits=8, signed=False, zero_point=0, axis=None, narrow=False):
    return Encoding(np.float32(scale), zero_point, IntGrid(bits, signed, narrow), axis)


TABLE = {
    "c1.weight": encoding([2.0**-8, 2.0**-9], 4, True, axis=0),
    "c1.bias": encoding([2.0**-14, 2.0**-15], 32, True, axis=0),
    "input": encoding(2.0**-6, zero_point=52),
    "relu": encoding(0.1, 16),
    "tanh": encoding(2.0**-7, 8, True),
}
PARAMETERS = ("c1.weight", "c1.bias")

any_table = st.booleans().flatmap(lambda p: tables(shape=(3, 1, 2), power_of_2=p) | wide_tables(p))


def wide_tables(power_of_2):
    """Any width up to 32 bits, whose zero points need not be even."""
    return tables(grid=grids(widths(2, 32)), power_of_2=power_of_2)


@pytest.mark.parametrize("version", VERSIONS)
@given(table=any_table, parameters=st.data())
def test_round_trip_is_exact(version, table, parameters):
    names = parameters.draw(st.sets(st.sampled_from(sorted(table)))) if table else ()
    assert loads(dumps(table, names, version)) == table
    assert loads(dumps(table, names, version), axes=dict.fromkeys(table, 1)) == table


@given(table=st.dictionaries(st.text(), encodings((2, 3)), max_size=3), first=st.sampled_from(VERSIONS))
def test_moving_between_versions_loses_nothing(table, first):
    for version in (first, *VERSIONS):
        table_again = loads(dumps(table, (), version))
        assert table_again == table


def test_what_is_written():
    documents = {version: json.loads(dumps(TABLE, PARAMETERS, version)) for version in VERSIONS}
    assert all(document["version"] == version and GRIDS not in document for version, document in documents.items())
    old, one, two, newest = documents.values()
    assert newest == two | {"version": "2.1.0"}
    kept = {"dtype": "int", "is_symmetric": "False", "bitwidth": 8}
    assert old["activation_encodings"]["input"] == [
        {"min": -0.8125, "max": 3.171875, "scale": 0.015625, "offset": -52, **kept}
    ]
    assert one["param_encodings"][0] == {
        "name": "c1.weight",
        "dtype": "INT",
        "bw": 4,
        "is_sym": True,
        "scale": [0.00390625, 0.001953125],
        "offset": [-8, -8],
        "enc_type": "PER_CHANNEL",
    }
    assert [entry["name"] for entry in one["activation_encodings"]] == ["input", "relu", "tanh"]
    by_name = {entry.pop("name"): entry for entry in two["encodings"]}
    assert by_name["input"] == {"output_dtype": "uint8", "y_scale": 0.015625, "y_zero_point": 52}
    assert by_name["c1.bias"] == {"output_dtype": "int32", "y_scale": [2.0**-14, 2.0**-15], "axis": 0}
    assert by_name["relu"] == {"output_dtype": "uint16", "y_scale": float(np.float32(0.1))}
    assert (old["quantizer_args"]["param_bitwidth"], old["quantizer_args"]["activation_bitwidth"]) == (4, 16)


def test_only_what_a_version_cannot_say_is_stated_beside_it():
    lossy = {
        "narrow": encoding(1, 8, True, narrow=True),
        "mixed": Encoding(np.float32([1, 1]), 0, IntGrid((3, 5), True), 0),
        "axis": encoding([1, 1], 8, True, axis=1),
        "asymmetric": encoding(1, 8, True, 3),
    }
    stated = {version: json.loads(dumps(TABLE | lossy, (), version))[GRIDS] for version in VERSIONS}
    assert set(stated["0.6.1"]) == set(stated["1.0.0"]) == set(lossy)
    assert set(stated["2.0.0"]) == set(stated["2.1.0"]) == {"narrow", "mixed"}
    document = json.loads(dumps(lossy, (), "1.0.0"))
    wider = {entry["name"]: (entry["bw"], entry["offset"]) for entry in document["activation_encodings"]}
    assert wider["narrow"] == (8, [-128])
    assert wider["mixed"] == (5, [-16, -16])
    assert wider["asymmetric"] == (8, [-131])


# AIMET itself

noisy = pytest.mark.filterwarnings("ignore")  # AIMET deprecates what it exports with, and torch what AIMET calls


@pytest.fixture(scope="module")
def sim():
    """A calibrated simulation and its input: weights per channel, one symmetric output, one float16 layer."""
    aimet = pytest.importorskip("aimet_torch")
    import torch
    from aimet_torch.quantization.float import FloatQuantizeDequantize

    torch.manual_seed(0)
    layers = {
        "conv": torch.nn.Conv2d(3, 4, 3),
        "relu": torch.nn.ReLU(),
        "pool": torch.nn.MaxPool2d(2),
        "up": torch.nn.ConvTranspose2d(4, 2, 1),
        "flatten": torch.nn.Flatten(),
        "f16": torch.nn.Linear(18, 6),
        "fc": torch.nn.Linear(6, 5),
    }
    x = torch.randn(8, 3, 8, 8)
    net = torch.nn.Sequential(OrderedDict(layers)).eval()
    simulation = aimet.QuantizationSimModel(net, x, default_param_bw=4, default_output_bw=16, config_file="default")
    model = simulation.model
    model.up.output_quantizers[0].symmetric = True
    model.up.output_quantizers[0].signed = True
    model.f16.param_quantizers["weight"] = FloatQuantizeDequantize(dtype=torch.float16)
    model.f16.output_quantizers[0] = FloatQuantizeDequantize(dtype=torch.float16)
    simulation.compute_encodings(lambda m: m(x))
    return simulation, x


def expected_of(quantizer, axis=None):
    """AIMET's quantizer as our encoding."""
    e = quantizer.get_encodings()
    scale, offset = (np.float32(v.detach().numpy()).ravel() for v in (e.scale, e.offset))
    channels = axis is not None
    return Encoding(
        scale if channels else scale[0],
        -np.int64(offset if channels else offset[0]),
        IntGrid(int(e.bitwidth), e.qmin < 0),
        axis,
    )


def check_aimet_table(table, model, names, channel_axis=1):
    """The integer encodings of AIMET's quantizers, under these names; nothing of the float16 layer."""
    assert table[names["x"]] == expected_of(model.conv.input_quantizers[0])
    assert table[names["relu"]] == expected_of(model.relu.output_quantizers[0])
    assert table[names["up"]] == expected_of(model.up.output_quantizers[0])
    assert table["conv.weight"] == expected_of(model.conv.param_quantizers["weight"], 0)
    assert table["up.weight"] == expected_of(model.up.param_quantizers["weight"], channel_axis)
    assert "f16.weight" not in table
    assert names["f16"] not in table


@noisy
@pytest.mark.parametrize("version", VERSIONS)
def test_aimet_files_with_onnx_names(sim, tmp_path, version):
    simulation, x = sim
    path, how = tmp_path / "m.onnx", {"input_names": ["x"], "output_names": ["y"], "force_activation_as": None}
    simulation.onnx.export(x, str(path), encoding_version=version, dynamo=False, export_int32_bias=True, **how)
    model = onnx.load(path)
    assert channel_axes(model) == {"up.weight": 1}
    table = load(tmp_path / "m.encodings", channel_axes(model))
    results = {
        name: f"/{name}/{op}_output_0" for name, op in (("relu", "Relu"), ("up", "ConvTranspose"), ("f16", "Gemm"))
    }
    check_aimet_table(table, simulation.model, {"x": "x", **results})
    assert table["conv.bias"].grid == IntGrid(32, True)
    artifact = apply(model, table)
    assert artifact.encodings == from_qdq(to_qdq(artifact)).encodings == table
    for again in VERSIONS:
        assert loads(dumps(table, PARAMETERS, again)) == table


@noisy
@pytest.mark.parametrize("version", ["0.6.1", "1.0.0"])
def test_files_of_aimets_older_exporter(sim, tmp_path, monkeypatch, version):
    simulation, x = sim
    monkeypatch.setattr("aimet_torch.common.quantsim.encoding_version", version)
    simulation.export(str(tmp_path), "m", x)
    document = json.loads((tmp_path / "m.encodings").read_text())
    assert document["version"] == version
    assert "float" in json.dumps(document).lower()
    model = onnx.load(tmp_path / "m.onnx")
    table = load(tmp_path / "m.encodings", channel_axes(model))
    produced = {node.op_type: node.output[0] for node in model.graph.node}
    names = {"x": model.graph.input[0].name, "relu": produced["Relu"], "up": produced["ConvTranspose"], "f16": "none"}
    check_aimet_table(table, simulation.model, names)
    assert apply(model, table).encodings == table


@noisy
def test_aimet_files_with_torch_names(sim, tmp_path):
    simulation, x = sim
    simulation.save_encodings_to_json(str(tmp_path), "saved")
    simulation.export(str(tmp_path), "m", x)
    names = {"x": "conv.input", "relu": "relu.output", "up": "up.output", "f16": "f16.output"}
    for file in ("saved.json", "m_torch.encodings"):
        check_aimet_table(load(tmp_path / file), simulation.model, names, channel_axis=0)


@noisy
def test_aimet_reads_what_we_write(sim, tmp_path):
    import aimet_torch
    from aimet_torch.quantization.affine import AffineEncoding

    simulation, x = sim
    ours = {
        "conv.weight": encoding(2.0 ** np.arange(-9, -5), 6, True, axis=0),
        "fc.weight": encoding(2.0 ** np.arange(-9, -4), 4, True, axis=0),
        "y": encoding(2.0**-6, 8, zero_point=52),
        "s": encoding(2.0**-6, 16, True),
    }
    (tmp_path / "ours.json").write_text(dumps(ours, ("conv.weight", "fc.weight"), "0.6.1"))
    fresh = aimet_torch.QuantizationSimModel(simulation.get_original_model(simulation.model), x, config_file="default")
    fresh.load_encodings(tmp_path / "ours.json", strict=False)
    for layer in ("conv", "fc"):
        quantizer = getattr(fresh.model, layer).param_quantizers["weight"]
        assert expected_of(quantizer, 0) == ours[f"{layer}.weight"]
    for entry in json.loads(dumps(ours, (), "2.0.0"))["encodings"]:
        if "axis" not in entry:
            e = AffineEncoding._from_qnn_encoding_dict(entry, version="2.0.0")
            assert (float(e.scale), -float(e.offset)) == (ours[entry["name"]].scale, ours[entry["name"]].zero_point)
            assert (e.bitwidth, e.signed) == (ours[entry["name"]].grid.bits, ours[entry["name"]].grid.signed)


@pytest.mark.parametrize(
    ("bits", "symmetric", "offset", "expected"),
    [
        (8, "True", -128, encoding(0.5, 8, True)),
        (8, "True", -127, encoding(0.5, 8, True, narrow=True)),
        (8, "True", 0, encoding(0.5, 8)),
        (8, "True", -130, encoding(0.5, 8, True, 2)),
        (8, "False", -128, encoding(0.5, 8, zero_point=128)),
        (4, "False", -15.0, encoding(0.5, 4, zero_point=15)),
    ],
)
def test_how_offset_and_symmetry_tell_the_grid(bits, symmetric, offset, expected):
    entry = {"bitwidth": bits, "dtype": "int", "is_symmetric": symmetric, "scale": 0.5, "offset": offset}
    document = {"activation_encodings": {"x": [entry]}, "param_encodings": {}}
    assert loads(json.dumps(document)) == {"x": expected}


# Pairing with a model


def gemm(w=TABLE["c1.weight"]):
    rng = np.random.default_rng(0)
    values = {"c1.weight": w.dequantize(rng.integers(-8, 8, (2, 3))), "c1.bias": np.float32([0.25, -0.5])}
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["input", *values], ["relu"], "c1", transB=1)],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("relu", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(v, n) for n, v in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


FITTING = {name: TABLE[name] for name in ("c1.weight", "c1.bias", "input", "relu")}


def test_apply_and_export(tmp_path):
    artifact = apply(gemm(), FITTING)
    assert artifact.encodings == FITTING
    assert artifact.model.opset_import[0].version == 21
    for version, export in zip(VERSIONS, (export_0_6_1, export_1_0_0, export_2_0_0), strict=False):
        path = export(artifact, tmp_path / "run")
        assert [file.name for file in path.parent.iterdir()] == ["model.encodings"]
        assert json.loads(path.read_text())["version"] == version
        assert load(path) == FITTING
    assert set(json.loads(export_0_6_1(artifact, tmp_path).read_text())["param_encodings"]) == set(PARAMETERS)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/model.encodings: cannot be written"):
        export_1_0_0(artifact, tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fc.weight": TABLE["tanh"]}, r"no tensor fc.weight, which"),
        ({f"t{i}": TABLE["tanh"] for i in range(9)}, r"no tensor t0, t1, t2, t3, t4 and 4 more, which"),
        ({"c1.weight": encoding([1, 1, 1], 4, True, axis=0)}, r"c1.weight: 3 scales on axis 0 .* \(2, 3\)"),
        ({"relu": encoding([1, 1, 1], axis=1)}, r"relu: 3 scales on axis 1 do not fit the shape \(0, 2\)"),
        ({"input": encoding([1, 1, 1], axis=3)}, r"input: 3 scales on axis 3 do not fit"),
        ({"c1.weight": encoding(2.0**-6, 4, True)}, r"c1.weight: \d of 6 values are not on the grid"),
        ({"c1.weight": encoding(2.0**-9, 3, True)}, r"c1.weight: \d of 6 values are not on the grid"),
    ],
)
def test_a_table_of_another_model(change, text):
    with pytest.raises(EncodingError, match=text):
        apply(gemm(), FITTING | change)


def test_channel_axes():
    values = {"a": np.ones((2, 3), np.float32), "b": np.ones((3, 4), np.float32), "c": np.ones((1, 4, 5), np.float32)}
    nodes = [
        helper.make_node("Gemm", ["x", "a"], ["y"], transB=0),
        helper.make_node("Gemm", ["x", "b"], ["z"], transB=1),
        helper.make_node("MatMul", ["z", "c"], ["u"]),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [numpy_helper.from_array(v, n) for n, v in values.items()])
    assert channel_axes(helper.make_model(graph)) == {"a": 1, "c": 2}


# Corrupt files

OLD, ONE, TWO = (json.loads(dumps(TABLE, PARAMETERS, version)) for version in VERSIONS[:3])
TWO["encodings"].sort(key=lambda entry: entry["name"] != "input")
ONE["activation_encodings"].sort(key=lambda entry: entry["name"] != "input")


def changed(document, path, value):
    """A copy with `value` at the path of keys; None removes the key."""
    document = json.loads(json.dumps(document))
    *parents, last = path
    inner = document
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return document


A, P = "activation_encodings", "param_encodings"
CORRUPT = [
    ([], "expected an object at the top, got list"),
    ({"version": "1.0.0"}, "no key 'activation_encodings'"),
    (changed(OLD, ["version"], "3.0.0"), r"version: '3.0.0' is not one of 0.6.1, 1.0.0, 2.0.0, 2.1.0"),
    (changed(OLD, [P], None), "no key 'param_encodings'"),
    (changed(OLD, [A], 7), "activation_encodings: expected a list or an object, got int"),
    (changed(TWO, ["encodings"], {}), "encodings: expected a list or an object, got dict"),
    (changed(OLD, [A, "input"], []), "input: list of encodings is empty"),
    (changed(OLD, [A, "input"], 3), "input: expected an object, got int"),
    (changed(OLD, [A, "input"], {"inward": {}}), "input: inward: expected input or output"),
    (changed(OLD, [A, "input", 0, "scale"], None), "input: scale is missing"),
    (changed(OLD, [A, "input", 0, "scale"], 0), "input: scale must be positive"),
    (changed(OLD, [A, "input", 0, "scale"], 1e-60), "input: scale must be positive"),
    (changed(OLD, [A, "input", 0, "scale"], 10**400), "input: scale must be finite numbers"),
    (changed(OLD, [A, "input", 0, "scale"], "1"), "input: scale must be finite numbers, got '1'"),
    (changed(OLD, [A, "input", 0, "offset"], -256), r"input: zero point 256 is not .* \[0, 255\]"),
    (changed(OLD, [A, "input", 0, "offset"], 11), "input: zero point -11 is not"),
    (changed(OLD, [A, "input", 0, "offset"], -1.5), "input: offset must be whole numbers"),
    (changed(OLD, [A, "input", 0, "bitwidth"], 1), "input: bits: 1 is not a width"),
    (changed(OLD, [A, "input", 0, "bitwidth"], True), "input: bitwidth must be finite numbers, got True"),
    (changed(OLD, [A, "input", 0, "dtype"], "bool"), "input: dtype must be int or float, got 'bool'"),
    (changed(OLD, [A, "input", 0, "is_symmetric"], "yes"), "input: is_symmetric must be True or False, got 'yes'"),
    (changed(OLD, [A, "input", 0, "zero_point_shift"], 0.5), "input: zero_point_shift is not supported"),
    (
        changed(OLD, [A, "input", 0], {"dtype": "float", "bitwidth": 8}),
        "input: bitwidth must be 16 or 32 for dtype float",
    ),
    (changed(OLD, ["pow2quant.grids"], {"input": {}}), "pow2quant.grids: input: expected the keys bits"),
    (changed(ONE, [A, 0, "name"], None), r"activation_encodings\[0\]: name is missing"),
    (changed(ONE, [A, 0, "name"], "relu"), "relu: name occurs twice"),
    (changed(ONE, [A, 0, "name"], 7), r"activation_encodings\[0\]: name must be of type str, got 7"),
    (changed(ONE, [A, 0], "input"), r"activation_encodings\[0\]: expected an object, got str"),
    (
        changed(ONE, [A, 0, "enc_type"], "PER_BLOCK"),
        "input: block_size needs the shape of 1 scales under 'pow2quant.block_scales'; version 2.0.0 states it",
    ),
    (changed(ONE, [A, 0, "enc_type"], "LPBQ"), "input: enc_type must be PER_TENSOR"),
    (changed(ONE, [A, 0, "block_size"], 16), "input: block_size is not supported: only per-tensor and per-channel"),
    (changed(ONE, [A, 0, "scale"], []), "input: scale is empty"),
    (changed(ONE, [A, 0, "scale"], [1, 2]), "input: scale has 2 values for 1 offsets and enc_type PER_TENSOR"),
    (changed(ONE, [P, 0, "offset"], [-8]), "c1.weight: scale has 2 values for 1 offsets and enc_type PER_CHANNEL"),
    (changed(ONE, [A, 0, "bw"], 40), "input: bits: 40 is not a width"),
    (changed(TWO, ["encodings", 0, "y_scale"], None), "input: y_scale is missing"),
    (changed(TWO, ["encodings", 0, "y_scale"], [[1]]), r"input: y_scale must be finite numbers, got \[1\]"),
    (changed(TWO, ["encodings", 0, "y_scale"], {"x": 1}), "input: y_scale must be finite numbers, got"),
    (changed(TWO, ["encodings", 0, "y_scale"], [1, 2]), r"input: scale has shape \(2,\)"),
    (changed(TWO, ["encodings", 0, "axis"], 0), r"input: scale has shape \(\)"),
    (changed(TWO, ["encodings", 1, "axis"], -1), "c1.weight: axis must not be negative, got -1"),
    (changed(TWO, ["encodings", 1, "y_zero_point"], [1, 2, 3]), "c1.weight: y_zero_point has 3 values for 2 scales"),
    (changed(TWO, ["encodings", 0, "y_zero_point"], 300), "input: zero point 300 is not"),
    (changed(TWO, ["encodings", 0, "output_dtype"], "float8e4m3fn"), "input: output_dtype must be an integer type"),
    (changed(TWO, ["encodings", 0, "output_dtype"], "uint"), "input: output_dtype must be an integer type"),
    (changed(TWO, ["encodings", 0, "per_block_int_scale"], [1]), "input: per_block_int_scale is not supported"),
]


@pytest.mark.parametrize(("document", "text"), CORRUPT, ids=[text[:50] for _, text in CORRUPT])
def test_corrupt_entries_are_named(document, text):
    with pytest.raises(FileFormatError, match=f"^m.encodings: .*{text}|^m.encodings: {text}") as caught:
        loads(json.dumps(document), source="m.encodings")
    assert "\n" not in str(caught.value)


def test_corrupt_text_is_named(tmp_path):
    good = dumps(TABLE, PARAMETERS, "1.0.0")
    path = tmp_path / "model.encodings"
    texts = ["", "nonsense", good[:-3], good[: len(good) // 2], "[" * 100_000, re.sub(r"0.015625", "NaN", good)]
    for content in (*(text.encode() for text in texts), b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=rf"^{path}: ") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileFormatError, match="absent: cannot be read"):
        load(tmp_path / "absent")
    with pytest.raises(FileFormatError, match="cannot be read"):
        load(tmp_path)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3), st.data()
)
def test_no_change_of_a_value_escapes_as_another_error(value, data):
    document = json.loads(json.dumps(data.draw(st.sampled_from([OLD, ONE, TWO]))))
    document, key = {"": document}, ""
    inner = document
    while isinstance(inner[key], dict | list) and inner[key] and data.draw(st.booleans()):
        inner = inner[key]
        key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
    inner[key] = value
    with contextlib.suppress(FileFormatError):
        assert isinstance(loads(json.dumps(document[""])), dict)


def test_unknown_versions_are_not_written():
    with pytest.raises(ConfigError, match=r"'1.1.0' is not one of 0.6.1, 1.0.0, 2.0.0"):
        dumps(TABLE, (), "1.1.0")


@noisy
def test_the_axis_of_transposed_convolutions_is_saved_and_converted(tmp_path):
    import aimet_torch
    import torch

    import pow2quant

    torch.manual_seed(0)
    x, network = torch.randn(8, 3, 2, 2), torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 3, 2, 2)).eval()
    with torch.no_grad():
        network[0].weight.mul_(torch.tensor([1.0, 0.1, 0.01]).reshape(1, 3, 1, 1))
    one, other = (pow2quant.QuantizationSimModel(network, x, default_param_bw=4) for _ in range(2))
    one.compute_encodings(lambda model, *_: model(x))
    one.save_encodings_to_json(tmp_path, "saved")
    other.load_encodings(tmp_path / "saved.json")
    assert torch.equal(one.model(x), other.model(x))
    sim = aimet_torch.QuantizationSimModel(network, x, default_param_bw=4)
    sim.compute_encodings(lambda model, *_: model(x))
    sim.export(str(tmp_path), "m", x)
    made = json.loads(convert(tmp_path / "m.encodings", "2.0.0", tmp_path / "two.encodings").read_text())
    assert {e["name"]: e.get("axis") for e in made["encodings"]}["0.weight"] == 1
    (tmp_path / "m.onnx").rename(tmp_path / "elsewhere.onnx")
    with pytest.raises(FileFormatError, match=r"0\.weight has scales per channel.*beside it, as m\.onnx"):
        convert(tmp_path / "m.encodings", "2.0.0", tmp_path / "three.encodings")
    assert not (tmp_path / "three.encodings").exists()
