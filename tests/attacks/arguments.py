"""Targets, methods' parameters, tables of chips, a run's documents, arrays and data sets, names behind `export`."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.attacks.files import JSON_VALUES, VALUES, Attack, _places, bombs, mutated
from tests.attacks.good import copied, put
from tests.attacks.harness import Case
from tests.attacks.own import NAMES, _modules


def arguments(good: Path) -> Iterator[Case]:
    """All of them."""
    yield from targets(good)
    yield from methods()
    yield from chips()
    yield from documents(good)
    yield from arrays()
    yield from exported()


TARGET_KEYS = (
    "summary", "base", "name", "source", "executors", "formats", "nothing", "limits", "rounding", "limits.weight_bits",
    "limits.input_bits", "limits.output_bits", "limits.bias_bits", "limits.accumulator_bits", "limits.symmetric",
    "limits.per_tensor", "limits.product_shift", "limits.sum_shift", "limits.nothing", "rounding.products",
    "rounding.sums", "rounding.averages", "rounding.multiplications", "rounding.moves", "rounding.nothing",
)  # fmt: skip


def targets(good: Path) -> Iterator[Case]:
    """A target's YAML with every strange value, bombs, and the same in an ONNX file's metadata."""
    for key in TARGET_KEYS:
        for value in VALUES:
            section, _, name = key.rpartition(".")
            text = f"{section}: {{{name}: {value}}}\n" if section else f"{name}: {value}\n"
            yield Case("target", f"{key}: {value[:40]}", partial(_target, text, ["targets", "bad.yaml"]))
            yield Case("target", f"ptq {key}: {value[:40]}", partial(_target, text, TARGETED))
    for name, text in bombs():
        yield Case("target", name, partial(_target, text, ["targets", "bad.yaml"]))
    for index, value in enumerate(JSON_VALUES):
        for key in ("", "limits", "rounding", "executors", "name"):
            yield Case("target", f"metadata {key} value {index}", partial(_noted, good, key, value))


TARGETED = ["ptq", "--config", "quick.yaml", "--target", "bad.yaml", "--output", "out", "--quiet"]


def _target(text: str, command: list[str], folder: Path) -> list[str]:
    put(folder)
    (folder / "bad.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    return command


def _noted(good: Path, key: str, value: Any, folder: Path) -> list[str]:
    import onnx

    path = copied(good, folder) / "model.onnx"
    model = onnx.load(path)
    model.metadata_props.add(key="pow2quant.target", value=json.dumps({key: value} if key else value))
    onnx.save(model, path)
    return ["validate", "run/model.onnx", "--quiet"]


PARAMETERS = (
    "", "-1", "0", "0.5", "nan", "1e999", "x", "[]", "{}", "null", "true", "9" * 30, "a=b", "[1, a]", "*a", "'", "\n",
)  # fmt: skip


def methods() -> Iterator[Case]:
    """Every parameter of every method with every strange value, and names that are none."""
    from pow2quant import config
    from pow2quant.plugins import TABLES, resolve

    for name in TABLES["methods"]:
        for key in config.defaults(resolve("methods", name)):
            for value in PARAMETERS:
                yield Case("method", f"{name}:{key}={value[:20]!r}", partial(_method, (f"{name}:{key}={value}",)))
    for text in (
        ":",
        "adaround:",
        "adaround:=",
        "adaround:=1",
        "adaround:iterations",
        "a:b:c=1",
        "none:x=1",
        "auto:x",
        "\0",
    ):
        yield Case("method", repr(text), partial(_method, (text,)))
        yield Case("method", f"twice {text!r}", partial(_method, (text, "adaround")))


def _method(names: tuple[str, ...], folder: Path) -> list[str]:
    flags = [flag for name in names for flag in ("--method", name)]
    return [*put(folder), "--max-calibration-batches", "1", "--max-eval-batches", "1", *flags]


def chips() -> Iterator[Case]:
    """A chip's table with every strange value."""
    for key in (
        "name",
        "layers",
        "macs_per_us",
        "macs_per_us.8x8",
        "macs_per_us.x",
        "layers.0",
        "layers.0.8x8",
        "nothing",
    ):
        for value in VALUES:
            text = value
            for part in reversed(key.split(".")):
                text = f"{{{part!r}: {text}}}"
            yield Case("chip", f"{key}: {value[:40]}", partial(_chip, text))
    for name, text in bombs():
        yield Case("chip", name, partial(_chip, text))


def _chip(text: str, folder: Path) -> list[str]:
    put(folder)
    (folder / "chip.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    bounds = ["--constraint", "accuracy_drop=90%", "--constraint", "latency=1s", "--latency-table", "chip.yaml"]
    return ["search", "--config", "quick.yaml", *bounds, "--candidates", "4,8", "--output", "out", "--quiet"]


DOCUMENTS = ("report.json", "certificate.json", "model.encodings")
READERS = (
    ["report", "run"],
    ["explain", "run", "0"],
    ["explain", "run", "3.weight"],
    ["report", "run", "run", "--output", "p"],
)


def documents(good: Path) -> Iterator[Case]:
    """A run's documents, each value replaced by every strange one, read by what reads them."""
    for name in DOCUMENTS:
        for place in range(40):
            for index, value in enumerate(JSON_VALUES):
                command = READERS[(place + index) % len(READERS)]
                case = partial(_document, good, name, place, value, command)
                yield Case("document", f"{name} place {place} value {index} {command[0]}", case)
    for name in NAMES:
        yield Case("document", f"explain run {name!r}", partial(_explained, good, name))
        yield Case("document", f"layer called {name!r}", partial(_renamed, good, name))


def _document(good: Path, name: str, place: int, value: Any, command: list[str], folder: Path) -> list[str]:
    path = copied(good, folder) / name
    document = json.loads(path.read_text())
    places = list(_places(document))
    parent, key = places[place * 13 % len(places)]
    parent[key] = value
    path.write_text(json.dumps(document))
    return [*command, "--quiet"]


def _explained(good: Path, name: str, folder: Path) -> list[str]:
    copied(good, folder)
    return ["explain", "run", "--quiet", "--", name]


def _renamed(good: Path, name: str, folder: Path) -> list[str]:
    """A tensor of the report is called by a name from elsewhere."""
    path = copied(good, folder) / "report.json"
    path.write_text(path.read_text().replace('"0.weight"', json.dumps(name)).replace('"mine.py:net"', json.dumps(name)))
    return ["report", "run", "--quiet"]


def arrays() -> Iterator[Case]:
    """`.npy`, `.npz`, MNIST's and CIFAR-10's files: damaged, of other shapes, with code, larger than they are."""
    for number in range(60):
        for name, make in (("npy", _npy), ("npz", _npz), ("mnist", _mnist), ("cifar10", _cifar)):
            yield Case("arrays", f"{name} mutated {number}", partial(_mutated_arrays, name, make, number))
    for name, make in _ARRAYS.items():
        for data in ("x.npz", "x.npy"):
            yield Case("arrays", f"{data} {name}", partial(_given_arrays, make, data))


def _npy(folder: Path) -> Path:
    import numpy as np

    np.save(folder / "x.npy", np.random.default_rng(0).random((16, 1, 8, 8), np.float32))
    return folder / "x.npy"


def _npz(folder: Path) -> Path:
    import numpy as np

    x, y = np.random.default_rng(0).random((16, 1, 8, 8), np.float32), np.arange(16) % 4
    np.savez(folder / "x.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    return folder / "x.npz"


def _mnist(folder: Path) -> Path:
    root = folder / "mnist" / "MNIST" / "raw"
    root.mkdir(parents=True)
    for part, count in (("train", 16), ("t10k", 16)):
        (root / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + bytes(784 * count))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(8)) * 2)
    return root / "t10k-images-idx3-ubyte"


def _cifar(folder: Path) -> Path:
    import numpy as np

    root = folder / "cifar10" / "cifar-10-batches-py"
    root.mkdir(parents=True)
    batch = pickle.dumps({"data": np.zeros((8, 3072), np.uint8), "labels": list(range(8))})
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (root / name).write_bytes(batch)
    return root / "test_batch"


def _mutated_arrays(name: str, make: Callable[[Path], Path], how: int, folder: Path) -> list[str]:
    path = make(folder)
    path.write_bytes(mutated(path.read_bytes(), how))
    return [*put(folder), *(("--data", name, "--data-path", name) if path.parent != folder else ("--data", path.name))]


def _header(shape: str, kind: str = "<f4") -> bytes:
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


_ARRAYS: dict[str, bytes | Callable[[], bytes]] = {
    "pickle": lambda: pickle.dumps(Attack()),
    "pickled objects": lambda: _header("(1,)", "|O") + pickle.dumps([Attack()]),
    "a terabyte": _header("(1 << 40,)"),
    "an exabyte": _header("(1152921504606846976,)"),
    "negative": _header("(-1, 1, 8, 8)"),
    "negative product": _header("(-4, -4, 8)"),
    "no shape": _header("None"),
    "a call": _header("(__import__('os').system('touch EXECUTED'),)"),
    "deep": _header("(" * 3000),
    "void": _header("(1,)", "|V10") + bytes(10),
    "text": _header("(1,)", "<U9") + bytes(36),
    "dates": _header("(4, 1, 8, 8)", "<M8[s]") + bytes(8 * 256),
    "complex": _header("(4, 1, 8, 8)", "<c8") + bytes(8 * 256),
    "no images": _header("(0, 1, 8, 8)"),
    "one number": _header("()") + bytes(4),
    "no bytes": b"",
    "a zip of nothing": b"PK\x05\x06" + bytes(18),
}


def _given_arrays(make: bytes | Callable[[], bytes], name: str, folder: Path) -> list[str]:
    (folder / name).write_bytes(make if isinstance(make, bytes) else make())
    return [*put(folder), "--data", name]


def exported() -> Iterator[Case]:
    """Modules and folders called by names from elsewhere, in C, Makefiles and documents of integers."""
    for name in NAMES:
        for form in ("c", "integers"):
            yield Case("names", f"export --to {form} of module {name!r}", partial(_exported, name, form))


def _exported(name: str, form: str, folder: Path) -> list[str]:
    from pow2quant.cli import main

    if main([*_modules(name, folder)]) != 0:
        return ["list", "--quiet"]  # `names` judges what became of the network itself
    output = f"./{name[:60]}".replace("\0", "")
    place = "e" if output in ("./", "./../x", ".//x") else output
    return ["export", "out", "--to", form, "--output", place, "--quiet"]
