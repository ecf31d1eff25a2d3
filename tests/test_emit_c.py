"""The generated C against the engine: every operation, every width, random networks; and what the files promise."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models import SwinTransformer

from pow2quant import QuantPlan, compiled, prepare, runs, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.errors import ConfigError, DataError, MissingExtraError, OutputError, UnsupportedModelError
from pow2quant.integer import emit_c
from pow2quant.integer import run as engine
from pow2quant.integer.emit_c import Source, code, export_c, files
from pow2quant.integer.layout import channels_last
from pow2quant.integer.lower import lower
from pow2quant.integer.pack import sample_codes
from pow2quant.plugins import resolve
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN, ROUNDINGS, requantize, shift_round
from pow2quant.validation import c99, ort
from tests.quantized_graphs import Graph, encoding, networks, residual_network, ternary_network
from tests.test_engine import OPERATIONS, integers

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="needs a C compiler")

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
QUICK = (*STRICT, "-O0")
SANITIZED = "-g -fsanitize=address,undefined -fno-sanitize-recover=all"


def differing(artifact, samples=8, flags=QUICK):
    """The tensors in which the C and the engine differ, each with the number of codes; everything is traced."""
    program = lower(artifact)
    codes = sample_codes(program, samples)
    expected, got = engine.trace(program, codes), c99.Library(program, flags).trace(codes)
    constants = {t.name for t in program.tensors.values() if t.constant is not None}
    assert got.keys() == expected.keys() - constants
    return {name: count for name, x in got.items() if (count := int((x != expected[name]).sum()))}


@pytest.mark.parametrize("rows", [2, 8, 16])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_a_sum_of_short_rows_survives_the_optimizations_that_executors_are_compiled_with(rows, width):
    g = Graph()
    long = g.input("long", (rows, 1, width), encoding(-1, 8, 4))
    short = g.input("short", (1, 1, width), encoding(-6, 12, 4))
    artifact = g.artifact(g.node("Add", "sum", [short, long], encoding(-1, 8, 4)))
    assert differing(artifact, flags=c99.FLAGS) == {}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    assert differing(OPERATIONS[name]()) == {}


def layers(bits, signed, seed=0):
    """Every kind of arithmetic on tensors of one width, weights of 8 bits with scales per channel."""
    rng = np.random.default_rng(seed)
    k = 8 - bits

    def grid(exponent):
        return encoding(exponent + k, 0 if signed else max(0, 2 ** (bits - 1) - 3), bits, signed)

    g = Graph()
    x = g.input("x", (4, 9, 70), grid(-4))
    a = g.layer("Conv", "c", x, rng.integers(-128, 128, (6, 4, 3, 3)), rng.integers(-999, 999, 6), grid(2),
                k=[-3, -2, -4, -3, -9, 9], pads=[1] * 4)  # fmt: skip
    b = g.layer("Conv", "d", a, rng.integers(-128, 128, (6, 1, 3, 2)), None, grid(2), k=[-6] * 6, group=6,
                pads=[1, 0, 1, 1])  # fmt: skip
    c = g.node("Add", "add", [a, b], grid(1))
    d = g.node("Mul", "mul", [c, a], grid(5))
    e = g.node("Sub", "sub", [d, b], grid(4))
    f = g.node("AveragePool", "average", [e], grid(3), kernel_shape=[3, 4], strides=[2, 3])
    h = g.node("MaxPool", "maximum", [f], grid(3), kernel_shape=[2, 2])
    t = g.node("Tanh", "tanh", [h], encoding(-7, 0, 8, True))
    j = g.node("Concat", "join", [h, t], grid(1), axis=1)
    m = g.node("GlobalAveragePool", "mean", [j], grid(0))
    n = g.node("Flatten", "flat", [m], grid(0))
    y = g.layer("Gemm", "fc", n, rng.integers(-128, 128, (5, 12)), rng.integers(-999, 999, 5), grid(2),
                k=[-3, -2, -9, 8, -4], transB=1)  # fmt: skip
    return g.artifact(y)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [2, 4, 7, 8, 12, 16])
def test_width(bits, signed):
    assert differing(layers(bits, signed)) == {}


def convolutions(signed=True):
    """Convolutions of 8 bits with few and many channels, products and places."""
    rng = np.random.default_rng(0)
    g = Graph()
    y = g.input("x", (3, 12, 15), encoding(-4, 0 if signed else 7, 8, signed))
    for name, channels, outputs, kernel, attributes in [
        ("stem", 3, 9, 3, {"pads": [1, 1, 1, 1]}),
        ("short", 9, 7, 1, {}),
        ("long", 7, 41, 3, {"pads": [1, 0, 1, 2], "strides": [1, 2]}),
        ("matrix", 41, 18, 1, {}),
        ("grouped", 9, 14, 3, {"pads": [2, 2, 2, 2], "dilations": [2, 2], "group": 2}),
        ("depthwise", 1, 14, 5, {"pads": [2, 2, 2, 2], "group": 14}),
        ("jumping", 14, 33, 1, {"strides": [2, 2]}),
        ("few", 33, 10, 3, {"strides": [2, 2]}),
    ]:
        weight = rng.integers(-128, 128, (outputs, channels, kernel, kernel))
        bias = rng.integers(-9999, 9999, outputs)
        grid, k = encoding(-2, 0 if signed else 3, 8, signed), rng.integers(-9, -4, outputs).tolist()
        y = g.layer("Conv", name, y, weight, bias, grid, k=k, **attributes)
    return g.artifact(y)


@pytest.mark.parametrize("shifted", [False, True], ids=["codes", "shifted"])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_ternary_weights(bits, signed, shifted):
    artifact = ternary_network(bits, signed, shifted)
    for level in ("-O0 -DTILE=1", "-O1 -DTILE=32"):
        assert differing(artifact, flags=(*STRICT, *level.split())) == {}


def test_ternary_weights_take_two_bits_and_are_never_multiplied():
    program = lower(ternary_network(shifted=False))
    texts = code(program)
    words = {
        name: int(count) for name, count in re.findall(r"uint8_t (layer\d+_\w+_weight)\[(\d+)\]", texts["weights.h"])
    }
    weights = [step.weight for step in program.steps if hasattr(step, "weight")]
    assert sorted(words.values()) == sorted(len(w) * -(-w[0].size // 4) for w in weights)
    assert not re.search(r"\bint8_t \w+_weight\[", texts["weights.h"])
    kernels = re.sub(r"/\*.*?\*/", "", texts["kernels.h"], flags=re.DOTALL)
    assert not re.search(r"\* *\(?weight|weight\[[^]]*\] *\*|\bcode \*|\* code", kernels)
    assert "up - " in kernels


def test_sums_of_64_bits():
    g = Graph()
    x = g.input("x", (300, 2, 2), encoding(-8, 3, 16))
    weight = integers(3, 300, 1, 1, bits=16)
    y = g.layer("Conv", "c", x, weight, integers(3, bits=31), encoding(4, 100, 16), k=[-9] * 3, bits=16)
    z = g.node("Flatten", "f", [y], encoding(4, 100, 16))
    g.layer("Gemm", "fc", z, integers(4, 12, bits=16), None, encoding(9, 0, 16, True), k=[-6] * 4, bits=16, transB=1)
    artifact = g.artifact("fc.output")
    assert differing(artifact) == {}
    assert re.findall(r"(convolution|dense)\w+_s64_", code(lower(artifact))["model.c"]) == ["convolution", "dense"]


def test_maps_of_two_types_are_copied():
    g = Graph()
    x = g.input("x", (3, 5, 6), encoding(-4, 7))
    signed = g.node("Tanh", "t", [x], encoding(-7, 0, 8, True))
    parts = [
        g.layer(
            "Conv", name, source, integers(3, 1, 3, 2), integers(3), encoding(1, 9), k=[-3] * 3, group=3, strides=[2, 1]
        )
        for name, source in (("c", x), ("d", signed))
    ]
    assert differing(g.artifact(*parts)) == {}


def test_codes_of_32_bits():
    g = Graph()
    a = g.node("Flatten", "a", [g.input("x", (4, 5), encoding(-8, 3, 16))], encoding(-20, 7, 32))
    b = g.node("Reshape", "b", [a, g.constant("shape", np.array([-1, 5, 4]))], encoding(-20, 0, 24, True))
    assert differing(g.artifact(g.node("Flatten", "c", [b], encoding(-6, 9)))) == {}


def test_grids_that_hold_another_one():
    """The same scale and zero point on a wider grid: no code changes, but its type does."""
    g = Graph()
    x, wide = g.input("x", (2, 4, 4), encoding(-3, 5)), encoding(-3, 5, 16)
    names = [
        g.node("Flatten", "view", [x], wide),
        g.node("MaxPool", "maximum", [x], wide, kernel_shape=[2, 2]),
        g.node("Transpose", "moved", [x], wide, perm=[0, 2, 1, 3]),
        g.node("Concat", "join", [x, x], wide, axis=1),
    ]
    assert differing(g.artifact(*names)) == {}


def test_every_code_of_16_bits_by_every_shift():
    g = Graph()
    x = g.input("x", (65536,), encoding(0, 0, 16, True))
    names = [g.node("Flatten", f"n{k}", [x], encoding(k, 0, 16, True)) for k in [*range(1, 20), 40, 90]]
    program = lower(g.artifact(*names))
    codes = np.arange(-32768, 32768).astype(np.int16)[None]
    for k, got in zip([*range(1, 20), 40, 90], c99.Library(program, QUICK).run([codes]), strict=True):
        assert np.array_equal(got, shift_round(codes, k)), k


def test_images_with_channels_last_give_the_same_codes():
    program = lower(residual_network())
    other = channels_last(program)
    codes = sample_codes(program, 8)
    turned = [np.moveaxis(x, 1, -1) for x in codes]
    assert [other.tensors[name].shape for name in other.inputs] == [x.shape[1:] for x in turned]
    expected = engine.run(program, codes)
    for got in (engine.run(other, turned), c99.Library(other, QUICK).run(turned)):
        assert [int((a != b).sum()) for a, b in zip(got, expected, strict=True)] == [0] * len(expected)
    g = Graph()
    flat = g.artifact(g.node("Flatten", "f", [g.input("x", (8,), encoding(0, 0, 8))], encoding(1, 0, 8)))
    with pytest.raises(UnsupportedModelError, match="no input is an image"):
        channels_last(lower(flat))


def test_only_c_takes_a_layout(tmp_path):
    (folder,) = runs.export(residual_network(), "c", tmp_path / "c", layout="nhwc")
    assert "channels_first" in (folder / "model.c").read_text()
    with pytest.raises(ConfigError, match="layout: 'chw' is not legal; legal: nchw, nhwc"):
        runs.export(residual_network(), "c", tmp_path / "other", layout="chw")
    with pytest.raises(ConfigError, match="layout: the format qdq has no such option"):
        runs.export(residual_network(), "qdq", tmp_path / "qdq", layout="nhwc")


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_code_is_cpp_too(name, tmp_path):
    compiles_as(OPERATIONS[name](), tmp_path, "-x", "c++", "-std=c++20", "-Wall", "-Wextra", "-pedantic")


@pytest.mark.parametrize("artifact", [residual_network, ternary_network])
def test_no_operating_system_is_needed(artifact, tmp_path):
    compiles_as(artifact(), tmp_path, *STRICT, "-ffreestanding")
    compiles_as(artifact(), tmp_path, "-x", "c++", "-std=c++20", "-ffreestanding")


def compiles_as(artifact, folder, *flags):
    for name, text in code(lower(artifact)).items():
        (folder / name).write_text(text)
    line = [compiled.compiler(), *flags, "-Werror", "-fsyntax-only", "model.c"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("bits", "most"), [(32, 30), (64, 62)])
def test_requantize_is_that_of_the_arithmetic(bits, most, rounding, tmp_path):
    source = Source(lower(residual_network()), "model")
    kind = f"int{bits}_t"
    named = {} if rounding == HALF_EVEN else {"rounding": rounding}
    name = source.kernel("requantize", a=kind, y="int32_t", **named)
    needed = [text for key, text in source.kernels.items() if key.startswith("shift_round") or key == name]
    text = "#include <stdint.h>\n" + "\n".join(needed)
    text += f"\nvoid run(int32_t *y, {kind} *x, int32_t n, int32_t s) {{ {name}(y, x, n, s, 3, -100000, 90000); }}\n"
    (tmp_path / "k.c").write_text(text)
    compiled.build(tmp_path / "k.c", tmp_path / "k.so", ("-std=c99", "-O3", "-shared", "-fPIC"))
    run = ctypes.CDLL(str(tmp_path / "k.so")).run
    rng = np.random.default_rng(0)
    for shift in range(-10, most + 1):
        limit = 2 ** (bits - 1) - 2 - 2 ** max(0, shift - 1) if shift > 0 else 2 ** (bits - 12)
        near = np.arange(-300, 300)
        ties = rng.integers(-(limit >> max(1, shift)), (limit >> max(1, shift)) + 1, 300) << max(0, shift)
        halves = ties + (1 << max(0, shift - 1)) + rng.integers(-1, 2, 300)
        x = np.concatenate([near, [limit, -limit], halves, rng.integers(-limit, limit, 999)])
        x = np.clip(x, -limit, limit).astype(f"int{bits}")
        y = np.empty(len(x), np.int32)
        run(y.ctypes.data_as(ctypes.c_void_p), x.ctypes.data_as(ctypes.c_void_p), len(x), shift)
        assert np.array_equal(y, requantize(x, shift, 3, -100000, 90000, rounding)), shift


@settings(max_examples=6, deadline=None)
@given(networks(), st.sampled_from(["-O0 -DLANES=1 -DSPAN=1", "-O1 -DLANES=64 -DSPAN=64", "-O3 -march=native"]))
def test_random_networks(artifact, level):
    assert differing(artifact, flags=(*STRICT, *level.split())) == {}


# The files


def make(folder, target="test", **variables):
    """Runs make in a written folder."""
    line = ["make", "-s", target, *(f"{key}={value}" for key, value in variables.items())]
    return subprocess.run(line, cwd=folder, capture_output=True, encoding="utf-8", check=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return resolve("exporters", "c")(residual_network(), tmp_path_factory.mktemp("c") / "network")


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_folder_stands_alone(written, tmp_path, compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    folder = shutil.copytree(written, tmp_path / "elsewhere")
    done = make(folder, CC=compiler)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "0 of 160 output codes differ in 16 test vectors\n"


@needs_make
def test_an_input_that_nothing_reads(tmp_path):
    class First(torch.nn.Module):
        def forward(self, x, y):
            return x + 1

    x = torch.randn(32, 4)
    sim = simulate(prepare(First(), (x, x)), (x, x), QuantPlan.default())
    sim.calibrate([(x, x)])
    done = make(export_c(sim.export((x, x)), tmp_path / "c"))
    assert (done.returncode, done.stderr) == (0, "")


@needs_make
@pytest.mark.parametrize("kernels", ["-DPLAIN", "-march=native"])
@pytest.mark.parametrize("build", ["4 bits", "16 bits", "ternary", "unsigned", "signed", "transposed, grouped"])
def test_sanitizers_find_nothing(build, kernels, tmp_path):
    made = {"ternary": ternary_network, "signed": convolutions, **OPERATIONS}
    made["unsigned"] = partial(convolutions, signed=False)
    artifact = layers(int(build[:2]), True) if build.endswith("bits") else made[build]()
    folder = export_c(artifact, tmp_path / "c")
    flags = f"{' '.join(STRICT)} -O1 {kernels} {SANITIZED}"
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    if subprocess.run(["cc", *SANITIZED.split(), "-o", tmp_path / "probe", probe], check=False).returncode:
        pytest.skip("the compiler has no sanitizers")
    done = make(folder, CFLAGS=flags)
    assert (done.returncode, done.stderr) == (0, "")


@needs_make
def test_layers_that_have_the_same_code_are_compiled_each_for_itself(tmp_path):
    """Windows of attention have. gcc 12 merges them at -O2, and then takes some codes for what they are in others."""
    torch.manual_seed(0)
    x = torch.randn(32, 3, 16, 16)
    network = prepare(SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=10).eval(), x[:2])
    sim = simulate(network, x[:2], QuantPlan.default())
    sim.calibrate([x])
    done = make(export_c(sim.export(x[:2]), tmp_path / "c"), CFLAGS="-std=c99 -O2 -DPLAIN")
    assert done.stdout == "0 of 160 output codes differ in 16 test vectors\n"


@needs_make
def test_the_check_finds_a_changed_weight(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "changed")
    text = (folder / "weights.h").read_text()
    found = re.search(r"_weight\[\d+\] = \{\s*(-?\d+),", text)
    changed = text[: found.start(1)] + str(-int(found[1]) - 1) + text[found.end(1) :]
    (folder / "weights.h").write_text(changed)
    done = make(folder)
    assert done.returncode != 0
    assert re.match(r"[1-9]\d* of 160 output codes differ", done.stdout)


@pytest.mark.parametrize("name", [*OPERATIONS, "widths"])
def test_integers_only(name):
    artifact = layers(16, False) if name == "widths" else OPERATIONS[name]()
    texts = files(lower(artifact))
    source = "".join(texts[f] for f in emit_c.CODE if f != "vectors.h")
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    assert set(re.findall(r"#include (<.*>)", source)) <= {"<stddef.h>", "<stdint.h>", "<string.h>"}
    assert not re.search(r"\b(float|double|union|malloc|calloc|alloca|free|short|long)\b", source)
    assert not re.search(r"\d\.\d", source)
    divisions = re.findall(r".*[/%].*", source)
    assert not divisions or re.search(r"average", name + texts["model.c"]), divisions
    assert len(divisions) <= 2
    casts = set(re.findall(r"\((\w+) \*\)", source))
    assert casts <= {"int8_t", "uint8_t", "int16_t", "uint16_t"}, "8 bits may be read from any array, 16 from 16"
    assert not re.search(r"[^\x00-\x7f]", "".join(texts[f] for f in texts if f.endswith((".c", ".h"))))


def test_sizes_are_those_of_the_compiled_objects(written):
    plan = json.loads((written / "plan.json").read_text())
    text = (written / "model.c").read_text() + (written / "weights.h").read_text()
    text = re.sub(r"#ifdef VECTORS\n.*?#endif", "", text, flags=re.DOTALL)
    width = {"int8_t": 1, "uint8_t": 1, "int16_t": 2, "uint16_t": 2, "int32_t": 4, "uint32_t": 4, "int64_t": 8}
    arrays = re.findall(r"^static (const )?(\w+) \w+\[(\d+)\]", text, flags=re.MULTILINE)
    sizes = {True: 0, False: 0}
    for const, kind, count in arrays:
        sizes[bool(const)] += width[kind] * int(count)
    assert sizes == {True: plan["flash"], False: plan["ram"]}
    assert f"MODEL_RAM {plan['ram']} " in (written / "model.h").read_text()
    assert plan["lower_bound"] <= plan["ram"] == max(b["offset"] + b["bytes"] for b in plan["arena"])
    readme = (written / "README.md").read_text()
    assert f"| {plan['ram']:,} |" in readme
    assert f"| {plan['flash']:,} |" in readme
    assert "| 0 | `stem` (Convolution) | (8, 12, 12) `uint8_t` | `int32_t` |" in readme
    assert "2^-6 * (q - 128)" in readme


def test_a_layer_can_be_found(written):
    text = (written / "model.c").read_text()
    assert re.search(
        r"/\* 2: Convolution depthwise, \(8, 6, 6\) to \(8, 6, 6\) \*/\nLAYER void layer\d+_depthwise\(", text
    )
    assert text.count("MODEL_TRACE(") == len(lower(residual_network()).steps) + 1


def test_elementwise_steps_need_no_memory_of_their_own():
    g = Graph()
    x = g.layer("Conv", "c", g.input("x", (4, 8, 8), encoding(-4)), integers(16, 4, 1, 1), None, encoding(2, 3), k=-3)
    for i, op in enumerate(["Tanh", "Relu", "Sigmoid", "Tanh"]):
        x = g.node(op, f"n{i}", [x], encoding(-4 - i))
    y = g.node("MaxPool", "p", [g.node("Add", "a", [x, x], encoding(-6, 1))], encoding(-6, 1), kernel_shape=[2, 2])
    artifact = g.artifact(y)
    assert differing(artifact) == {}
    buffers = json.loads(files(lower(artifact))["plan.json"])["arena"]
    assert [b["bytes"] for b in buffers if " " not in b["name"]] == [1024]


def test_names_of_every_kind():
    g = Graph()
    x = g.input("int", (3, 4, 4), encoding(-4))
    y = g.input("*/ int x; /*", (3, 4, 4), encoding(-4))
    a = g.node("Add", "größe */ |", [x, y], encoding(-3))
    b = g.node("Add", "main", [a, y], encoding(-3))
    assert differing(g.artifact(a, b, g.node("Flatten", "9", [x], encoding(-4)))) == {}


def test_an_older_export_is_replaced_and_nothing_else(tmp_path):
    folder = export_c(OPERATIONS["gemm"](), tmp_path / "c")
    (folder / "left.o").write_text("")
    assert export_c(OPERATIONS["conv"](), folder, prefix="net") == folder
    names = {path.name for path in folder.iterdir()}
    assert names == {"net.c", "net.h", "kernels.h", "vectors.h", "weights.h", "test_vectors.h", "main.c"} | {
        "Makefile",
        "README.md",
        "plan.json",
    }
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("")
    with pytest.raises(OutputError, match=r"thesis: holds no plan\.json"):
        export_c(OPERATIONS["gemm"](), foreign)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    g = Graph()
    y = g.node("Flatten", "n", [g.input("x", (3,), encoding(30))], encoding(-60))
    with pytest.raises(UnsupportedModelError, match=r"^n: its sums may reach \d+"):
        export_c(g.artifact(y), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_test_vectors_are_fewer_where_they_are_large(monkeypatch):
    monkeypatch.setattr(emit_c, "LARGEST_VECTORS", 3 * 196 + 5)
    assert "#define VECTORS 3\n" in files(lower(OPERATIONS["conv"]()))["test_vectors.h"]


# The executor


def test_the_executor_agrees_with_onnxruntime(tmp_path):
    artifact = residual_network()
    onnx_qdq.save(onnx_qdq.to_qdq(artifact), tmp_path / "model.onnx")
    (mine,) = resolve("validators", "c")(tmp_path / "model.onnx", None)
    theirs = ort.plain(tmp_path / "model.onnx")
    for batch in ort.random_batches(onnx_qdq.to_qdq(artifact), 64):
        assert np.array_equal(mine.run(batch)[0], theirs.run(batch)[0])
    tensors = mine.tensors(batch)
    for name, values in theirs.tensors(batch).items():
        assert np.array_equal(tensors[name], values), name


def test_no_compiler_is_an_error_that_says_so(tmp_path, monkeypatch):
    onnx_qdq.save(onnx_qdq.to_qdq(OPERATIONS["gemm"]()), tmp_path / "model.onnx")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in compiled.unavailable()
    with pytest.raises(MissingExtraError, match="no C compiler"):
        c99.executors(tmp_path / "model.onnx")


def test_a_compiler_for_another_machine_is_named(monkeypatch):
    monkeypatch.setenv("CC", "true")
    with pytest.raises(UnsupportedModelError, match="true makes no library that this machine can load"):
        c99.Library(lower(OPERATIONS["gemm"]()), QUICK).run([np.zeros((2, 12), np.uint8)])


def test_codes_of_another_shape_are_refused():
    library = c99.Library(lower(OPERATIONS["gemm"]()), QUICK)
    with pytest.raises(DataError, match=r"x: codes of shape \(11,\) per sample, not \(12,\)"):
        library.run([np.zeros((2, 11), np.uint8)])
