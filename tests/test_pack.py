"""The integer pack: a small interpreter of its files alone gives the golden tensors and onnxruntime's bits."""

import json
import pkgutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import nn

from pow2quant import simulate
from pow2quant.adapters.onnx_qdq import to_qdq
from pow2quant.config import RunConfig, plan_of, with_values
from pow2quant.errors import OutputError, UnsupportedModelError
from pow2quant.integer import ops
from pow2quant.integer.certificate import certify
from pow2quant.integer.lower import lower
from pow2quant.integer.pack import Word, _stream, export_integers
from pow2quant.integer.pack_readme import KINDS
from pow2quant.plugins import resolve
from pow2quant.validation.ort import optimized, plain
from tests.quantized_graphs import Graph, encoding, residual_network, ternary_network

# A reader of the pack. It knows what README.md says and nothing of pow2quant.


class Reader:
    def __init__(self, folder):
        self.folder = Path(folder)
        self.program = json.loads((self.folder / "program.json").read_text())
        self.tensors = self.program["tensors"]

    def array(self, entry):
        codes = np.load(self.folder / entry["npy"]).astype(object)  # Python's integers
        for channel, (a, b) in enumerate(entry.get("shifts", ())):  # a ternary weight
            codes[channel] = np.where(codes[channel] > 0, 1 << b, codes[channel] << a)
        return codes

    def run(self, inputs):
        """Codes of one sample by input name -> codes of every tensor."""
        values = {name: np.asarray(x).astype(object) for name, x in inputs.items()}
        values |= {name: self.array(t["constant"]) for name, t in self.tensors.items() if "constant" in t}
        for step in self.program["steps"]:
            real = [values[name] - self.tensors[name]["zero_point"] for name in step["inputs"]]
            codes = [values[name] for name in step["inputs"]]
            result = getattr(self, step["kind"])(step, real, codes)
            values[step["output"]] = np.asarray(result, object).reshape(self.tensors[step["output"]]["shape"])
        return values

    def convolution(self, step, real, codes):
        weight, bias, groups = self.array(step["weight"]), self.array(step["bias"]), step["groups"]
        out, per_group = len(weight), len(weight) // groups
        taps = self.taps(step["window"], real[0], 0)
        sums = [
            (taps[c // per_group * weight.shape[1] :][: weight.shape[1]] * weight[c][:, None, None]).sum((0, 3, 4))
            + bias[c]
            for c in range(out)
        ]
        return [self.requantize(step["requantization"], s, c) for c, s in enumerate(sums)]

    def dense(self, step, real, codes):
        sums = self.array(step["weight"]).dot(real[0].ravel()) + self.array(step["bias"])
        return [self.requantize(step["requantization"], s, c) for c, s in enumerate(sums)]

    def maximum(self, step, real, codes):
        return self.taps(step["window"], codes[0], -(2**40)).max((3, 4))

    def average(self, step, real, codes):
        rule, shift = step["requantization"], step["requantization"]["shift"]
        counts = self.array(step["counts"])
        sums = self.taps(step["window"], real[0], 0).sum((3, 4)) * 2 ** max(0, -shift)
        quotients = np.vectorize(divide, otypes=[object])(sums, counts * 2 ** max(0, shift))
        return np.clip(quotients + rule["zero"], rule["low"], rule["high"])

    def sum(self, step, real, codes):
        a, b = (x * 2**shift for x, shift in zip(real, step["shifts"], strict=True))
        return self.requantize(step["requantization"], a - b if step["subtracts"] else a + b)

    def choice(self, step, real, codes):
        condition, a, b = (x * 2**shift for x, shift in zip(real, step["shifts"], strict=True))
        chosen = np.where((condition > step["limit"]).astype(bool), a, b)
        return self.requantize(step["requantization"], chosen.astype(object))

    def argmax(self, step, real, codes):
        return np.argmax(codes[0].astype(int), step["axis"])

    def copy(self, step, real, codes):
        result = np.full(np.prod(self.tensors[step["output"]]["shape"]), step["fill"] or 0, object)
        for part in step["parts"]:
            counts = [count for count, _, _ in part["loops"]]
            rule = part["requantization"]
            moved = (codes if rule is None else real)[part["input"]].ravel()
            for i in np.ndindex(*counts):
                at = part["read_start"] + sum(k * loop[1] for k, loop in zip(i, part["loops"], strict=True))
                to = part["write_start"] + sum(k * loop[2] for k, loop in zip(i, part["loops"], strict=True))
                result[to] = moved[at] if rule is None else self.requantize(rule, moved[at])
        return result

    def table(self, step, real, codes):
        return self.array(step["table"])[(codes[0] - self.tensors[step["inputs"][0]]["low"]).astype(int)]

    def product(self, step, real, codes):
        return self.requantize(step["requantization"], real[0] * real[1])

    def matmul(self, step, real, codes):
        return self.requantize(step["requantization"], np.matmul(*real))

    def quotient(self, step, real, codes):
        a, b = np.broadcast_arrays(*(x * 2**shift for x, shift in zip(real, step["shifts"], strict=True)))
        by_zero = np.sign(a.astype(int)).astype(object) * 2**18
        whole = np.vectorize(divide, otypes=[object])(np.where(b < 0, -a, a), np.where(b == 0, 1, abs(b)))
        return self.requantize(step["requantization"], np.where(b == 0, by_zero, whole))

    def softmaxstep(self, step, real, codes):
        defined, table = step["definition"], self.array(step["table"])
        apart = (codes[0].max(defined["axis"], keepdims=True) - codes[0]).astype(int)
        e = table[np.minimum(apart, len(table) - 1)]
        reciprocal = 2 ** defined["reciprocal_bits"] // e.sum(defined["axis"], keepdims=True)
        return self.requantize(step["requantization"], e * reciprocal >> (defined["reciprocal_bits"] - 24))

    def logsoftmaxstep(self, step, real, codes):
        table, bounds = self.array(step["exponentials"]), self.array(step["bounds"])
        apart = (codes[0].max(step["axis"], keepdims=True) - codes[0]).astype(int)
        total = table[np.minimum(apart, len(table) - 1)].sum(step["axis"], keepdims=True)
        reached = (bounds <= total[..., None]).sum(-1)
        return self.requantize(step["requantization"], -(apart.astype(object) * 2 ** step["shift"] + reached))

    def view(self, step, real, codes):
        return codes[0]

    def taps(self, window, maps, outside):
        """(C, *size) -> (C, result height, result width, kernel height, kernel width)."""
        (h, w), (kh, kw) = window["size"], window["kernel"]
        maps = maps.reshape(-1, h, w)
        found = np.full((len(maps), *window["result"], kh, kw), outside, object)
        for y, x, i, j in np.ndindex(*found.shape[1:]):
            row = y * window["strides"][0] - window["before"][0] + i * window["dilations"][0]
            column = x * window["strides"][1] - window["before"][1] + j * window["dilations"][1]
            if 0 <= row < h and 0 <= column < w:
                found[:, y, x, i, j] = maps[:, row, column]
        return found

    def requantize(self, rule, accumulator, channel=0):
        shift = rule["shift"][channel] if isinstance(rule["shift"], list) else rule["shift"]
        rounded = np.vectorize(lambda a: divide(a, 2**shift) if shift > 0 else a * 2**-shift, otypes=[object])
        return np.clip(rounded(accumulator) + rule["zero"], rule["low"], rule["high"])


def divide(a, n):
    """a / n, rounded half to even."""
    floor, rest = divmod(a, n)
    return floor + (2 * rest > n or (2 * rest == n and floor % 2))


def read_mem(path, entry):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("//")
    assert {len(line) for line in lines[1:]} == {-(-entry["bits"] // 4)}
    words = np.array([int(line, 16) for line in lines[1:]], object)
    assert (words < 2 ** entry["bits"]).all()
    signed = words - 2 ** entry["bits"] * (words >> (entry["bits"] - 1)) if entry["signed"] else words
    return signed.reshape(entry["shape"])


def read_bin(path, entry):
    bits = np.unpackbits(np.fromfile(path, np.uint8), bitorder="little")[
        : np.prod(entry["shape"], dtype=int) * entry["bits"]
    ]
    words = bits.reshape(-1, entry["bits"]).astype(object) @ np.array([2**i for i in range(entry["bits"])], object)
    signed = words - 2 ** entry["bits"] * (words >> (entry["bits"] - 1)) if entry["signed"] else words
    return signed.reshape(entry["shape"])


def arrays(value):
    """Every description of a file in program.json."""
    if isinstance(value, dict):
        if "npy" in value:
            yield value
        for item in value.values():
            yield from arrays(item)
    elif isinstance(value, list):
        for item in value:
            yield from arrays(item)


@pytest.fixture(scope="module")
def network():
    return residual_network()


@pytest.fixture(scope="module")
def pack(network, tmp_path_factory):
    return Reader(export_integers(network, tmp_path_factory.mktemp("pack") / "integers"))


def test_the_files_alone_compute_the_golden_tensors_and_onnxruntimes_bits(network, pack):
    golden = {name: pack.array(t["golden"]) for name, t in pack.tensors.items()}
    assert len(golden) == 1 + len(pack.program["steps"])
    for n in range(pack.program["samples"]):
        values = pack.run({name: golden[name][n] for name in pack.program["inputs"]})
        for name in golden:
            np.testing.assert_array_equal(values[name], golden[name][n], err_msg=name)
    x, y = (pack.program[key][0] for key in ("inputs", "outputs"))
    real = {name: network.encodings[name].dequantize(golden[name].astype(np.int64)) for name in (x, y)}
    for executor in (plain(to_qdq(network)), optimized(to_qdq(network))):
        np.testing.assert_array_equal(executor.run([real[x]])[0], real[y])
    assert len(np.unique(real[y])) > 20


def test_a_function_a_concatenation_and_constants_are_in_the_pack_too(tmp_path):
    g = Graph()
    x = g.input("x", (2, 3, 4), encoding(-4, 100))
    a = g.node("HardSwish", "swish", [x], encoding(-4, 10))
    b = g.node("Add", "add", [a, x], encoding(-3, 50))
    offset = g.constant("offset", np.arange(12).reshape(1, 1, 3, 4) - 8, encoding(-2, 0, 4, True))
    c = g.node("Concat", "concat", [a, offset, b], encoding(-4, 60), axis=1)
    y = g.node("Pad", "pad", [g.node("Transpose", "t", [c], perm=[0, 2, 3, 1]), g.constant("pads", [0, 1, 0, 0] * 2)])
    g.encodings["pad.output"] = encoding(-4, 60)
    artifact = g.artifact(y)
    pack = Reader(export_integers(artifact, tmp_path / "p", samples=2))
    assert {step["kind"] for step in pack.program["steps"]} == {"table", "sum", "copy"}
    golden = pack.array(pack.tensors["x"]["golden"])
    values = pack.run({"x": golden[1]})
    (expected,) = plain(to_qdq(artifact)).run([artifact.encodings["x"].dequantize(golden[1:].astype(np.int64))])
    np.testing.assert_array_equal(artifact.encodings[y].dequantize(values[y].astype(np.int64)), expected[0])


class Rows(nn.Module):
    """What looks at a whole row, and a quotient."""

    def __init__(self, divides: bool) -> None:
        super().__init__()
        self.one, self.other, self.divides = nn.Linear(6, 5), nn.Linear(6, 5), divides

    def forward(self, x):
        a, b = self.one(x), self.other(x)
        shares = torch.softmax(a * 4, 1)
        return (
            shares,
            torch.log_softmax(a * 4 + b, 1),
            a / b if self.divides else a * b,
            (shares * b).unsqueeze(1) @ b.unsqueeze(2),
        )


@pytest.mark.parametrize("bits", [8, 12])
def test_the_files_alone_compute_what_looks_at_whole_rows_and_quotients(bits, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    config = with_values(RunConfig(), {"quantization.output.bitwidth": bits})
    sim = simulate(Rows(divides=bits == 8).eval(), x[:1], plan_of(config))
    sim.calibrate([x])
    artifact = sim.export(x[:1])
    pack = Reader(export_integers(artifact, tmp_path / "p", samples=8))
    kinds = {step["kind"] for step in pack.program["steps"]}
    assert {"softmaxstep", "logsoftmaxstep", "product", "matmul", *(["quotient"] if bits == 8 else [])} <= kinds
    (name,) = pack.program["inputs"]
    golden = pack.array(pack.tensors[name]["golden"])
    found = [pack.run({name: codes}) for codes in golden]
    real = artifact.encodings[name].dequantize(golden.astype(np.int64))
    for result, expected in zip(pack.program["outputs"], plain(to_qdq(artifact)).run([real]), strict=True):
        codes = np.stack([values[result] for values in found]).astype(np.int64)
        np.testing.assert_array_equal(artifact.encodings[result].dequantize(codes).reshape(expected.shape), expected)


def test_the_files_alone_choose_between_tensors_numbers_and_by_a_mask_and_find_the_largest(tmp_path):
    g = Graph()
    x = g.input("x", (3, 4), encoding(-4, 100))
    doubled = g.node("Add", "sum", [x, x], encoding(-2, 30))
    truth = g.node("Greater", "truth", [x, g.constant("bound", np.float32(0.3))])
    a = g.node("Where", "either", [truth, doubled, x], encoding(-3, 60))
    mask = g.constant("mask", np.array([[True], [False], [True]]))
    y = g.node("Where", "masked", [mask, g.constant("number", np.float32(-1.7)), a], encoding(-2, 40))
    best = g.node("ArgMax", "best", [y], axis=2, keepdims=0)
    artifact = g.artifact(y, g.node("Cast", "real", [best], encoding(0), to=TensorProto.FLOAT))
    pack = Reader(export_integers(artifact, tmp_path / "p", samples=3))
    assert [step["kind"] for step in pack.program["steps"]] == ["sum", "choice", "choice", "argmax", "table"]
    golden = pack.array(pack.tensors["x"]["golden"])
    found = [pack.run({"x": codes}) for codes in golden]
    expected, places = plain(to_qdq(artifact)).run([artifact.encodings["x"].dequantize(golden.astype(np.int64))])
    codes = np.array([values[y] for values in found], np.int64)
    np.testing.assert_array_equal(artifact.encodings[y].dequantize(codes), expected)
    np.testing.assert_array_equal([values["best.output"] for values in found], places)
    assert len(np.unique(places)) > 1


@pytest.mark.parametrize("shifted", [False, True])
def test_ternary_weights_take_two_bits_and_the_files_still_compute_the_network(shifted, tmp_path):
    artifact = ternary_network(shifted=shifted)
    pack = Reader(export_integers(artifact, tmp_path / "p", samples=1))
    weights = [step["weight"] for step in pack.program["steps"] if "weight" in step]
    assert [entry["bits"] for entry in weights] == [2] * 6
    assert all(("shifts" in entry) == shifted for entry in weights)
    for entry in weights:
        assert (pack.folder / entry["bin"]).stat().st_size == -(-np.prod(entry["shape"]) // 4)
        np.testing.assert_array_equal(np.unique(np.load(pack.folder / entry["npy"])), [-1, 0, 1])
        if shifted:
            np.testing.assert_array_equal(pack.array(entry["shifts_file"]), entry["shifts"])
    golden = {name: pack.array(t["golden"]) for name, t in pack.tensors.items()}
    values = pack.run({"x": golden["x"][0]})
    for name in golden:
        np.testing.assert_array_equal(values[name], golden[name][0], err_msg=name)
    (expected,) = plain(to_qdq(artifact)).run([artifact.encodings["x"].dequantize(golden["x"].astype(np.int64))])
    y = pack.program["outputs"][0]
    np.testing.assert_array_equal(artifact.encodings[y].dequantize(golden[y].astype(np.int64)), expected)


def test_words_without_gaps_begin_with_the_lowest_bit():
    assert _stream(np.array([1, 0, -1, 1]), Word(2, True)) == b"\x71"
    assert _stream(np.array([1, 5, 7]), Word(3, False)) == bytes([0b11101001, 0b1])


def test_all_three_files_hold_the_same_words(pack):
    found = list(arrays(pack.program))
    assert len(found) > 20
    for entry in found:
        np.testing.assert_array_equal(read_mem(pack.folder / entry["mem"], entry), pack.array(entry))
        np.testing.assert_array_equal(read_bin(pack.folder / entry["bin"], entry), pack.array(entry))
    assert len({entry["npy"].lower() for entry in found}) == len(found)
    files = {str(p.relative_to(pack.folder)) for p in pack.folder.rglob("*") if p.is_file()}
    named = {entry[key] for entry in found for key in ("npy", "mem", "bin")}
    assert files == named | {"program.json", "certificate.json", "README.md"}


def test_weights_have_their_true_width(network, pack):
    steps = {step["node"]: step for step in pack.program["steps"]}
    assert [steps[name]["weight"]["bits"] for name in ("stem", "project", "fc")] == [8, 4, 8]
    assert steps["stem"]["bias"]["bits"] == 32
    lines = (pack.folder / steps["project"]["weight"]["mem"]).read_text().splitlines()
    assert lines[0] == "// project: 8 x 8 x 1 x 1 words of 4 bits, two's complement, the last index runs fastest"
    assert {len(line) for line in lines[1:]} == {1}
    assert np.load(pack.folder / steps["stem"]["weight"]["npy"]).dtype == np.int8
    np.testing.assert_array_equal(
        pack.array(steps["stem"]["requantization"]["shift_file"]), steps["stem"]["requantization"]["shift"]
    )


@pytest.mark.parametrize(
    ("values", "bits", "signed", "word"),
    [
        ([0, 255], 1, False, Word(8, False)),
        ([-1, 0], 1, False, Word(1, True)),
        ([-8, 7], 1, True, Word(4, True)),
        ([-9, 7], 4, True, Word(5, True)),
        ([0, 8], 4, True, Word(5, True)),
        ([0], 8, True, Word(8, True)),
        ([-(2**31), 2**31 - 1], 32, True, Word(32, True)),
    ],
)
def test_a_word_is_as_wide_as_asked_for_or_needed(values, bits, signed, word):
    assert Word.of(np.array(values), bits, signed) == word


def test_names_become_unique_files(tmp_path):
    g = Graph()
    x = g.input("x", (4,), encoding(-4))
    for name in ("a/b:c", "a_b_c", "A_B_C"):
        x = g.layer("Gemm", name, x, np.eye(4, dtype=int) * 3, np.arange(4), encoding(-4), k=-1, transB=1)
    pack = Reader(export_integers(g.artifact(x), tmp_path / "p"))
    files = [step["weight"]["npy"] for step in pack.program["steps"]]
    assert files == [f"parameters/{n}.npy" for n in ("a_b_c.weight", "a_b_c.weight-2", "A_B_C.weight-3")]


def test_the_readme_explains_every_kind_that_exists(pack):
    modules = [import_module(f"{ops.__name__}.{module.name}") for module in pkgutil.iter_modules(ops.__path__)]
    steps = {name.lower() for m in modules for name, value in vars(m).items() if hasattr(value, "bound")}
    assert steps - {"step"} == KINDS.keys()
    text = (pack.folder / "README.md").read_text()
    for kind in {step["kind"] for step in pack.program["steps"]}:
        assert f"**{kind}**" in text


def test_the_folder_is_written_whole_or_not_at_all(network, tmp_path):
    target = tmp_path / "p"
    assert resolve("exporters", "integers")(network, target) == target
    first = (target / "program.json").read_bytes()
    export_integers(network, target)  # an older pack gives way
    assert (target / "program.json").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(OutputError, match=r"mine: holds no program\.json"):
        export_integers(network, mine)
    assert (mine / "thesis.txt").read_text() == "irreplaceable"
    with pytest.raises(OutputError, match=r"thesis\.txt/x: cannot be written"):
        export_integers(network, mine / "thesis.txt" / "x")


def test_a_tensor_that_stays_float_is_named(network, tmp_path):
    artifact = residual_network()
    del artifact.encodings["residual.output"]
    with pytest.raises(UnsupportedModelError, match=r"residual\.output"):
        export_integers(artifact, tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_certificate_engine_and_readme_name_one_accumulator(network, pack):
    certificate = certify(network)
    steps = {step["node"]: step["accumulator"] for step in pack.program["steps"] if step["kind"] != "average"}
    bounds = {layer.node: layer for layer in certificate.layers if layer.node in steps}
    assert {layer.op for layer in bounds.values()} >= {"Conv", "Gemm", "Add"}
    for node, layer in bounds.items():
        assert steps[node] == {"bound": layer.accumulator_max, "bits": layer.bits}, node
    assert certificate.sentence[1:] in (pack.folder / "README.md").read_text(encoding="utf-8")


def test_the_certificate_bounds_sums_of_raw_codes(network, pack):
    """Both bounds are reached: by the worst inputs, summed in the worst order."""
    document = json.loads((pack.folder / "certificate.json").read_text())
    assert document == json.loads(json.dumps(certify(network).to_json(per_channel=True)))
    layers = {layer["node"]: layer["channels"] for layer in document["layers"]}
    assert layers["residual"]["raw_accumulator_max"] is None
    for step in pack.program["steps"]:
        if step["kind"] not in ("convolution", "dense"):
            continue
        x, channels = pack.tensors[step["inputs"][0]], layers[step["node"]]
        weight, bias, z = pack.array(step["weight"]), pack.array(step["bias"]), x["zero_point"]
        for c, (row, b) in enumerate(zip(weight.reshape(len(weight), -1), bias, strict=True)):
            up, down = row[row > 0].sum(), row[row < 0].sum()

            def largest(low, high, offset, up=up, down=down):
                sums = (up * high + down * low, up * low + down * high)
                return max(abs(s + extra) for s in sums for extra in (0, offset))

            assert channels["accumulator_max"][c] == largest(x["low"] - z, x["high"] - z, b)
            assert channels["raw_accumulator_max"][c] == largest(x["low"], x["high"], b - z * row.sum())
            assert channels["raw_bits"][c] == channels["raw_accumulator_max"][c].bit_length() + 1
    shifts = {step.node: step.requantization.shift for step in lower(network).steps if hasattr(step, "weight")}
    assert {name: layers[name]["shift"] for name in shifts} == {
        name: np.broadcast_to(s, len(layers[name]["shift"])).tolist() for name, s in shifts.items()
    }
