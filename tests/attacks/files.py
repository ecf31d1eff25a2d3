"""Files from strangers: configurations, studies, weights, ONNX, encodings, checkpoints, runs with damaged files."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.attacks.good import copied, put
from tests.attacks.harness import Case

VALUES = (
    "null",
    "true",
    "-1",
    "0",
    "9999999999999999999999",
    "1e400",
    "-.inf",
    ".nan",
    "''",
    "[]",
    "{}",
    "[[[[]]]]",
    "{a: {b: {c: 1}}}",
    "2026-11-27",
    "2026-99-99",
    "'\\0'",
    '"\\0\\ud800"',
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!python/object/apply:os.system ['touch EXECUTED']",
    "'" + "x" * 5000 + "'",
    "1" * 5000,
    "[1, a, null, 2.5, []]",
    "/dev/zero",
    "../secret",
    "0x_",
    "1:2:3:4:5:6:7:8:9",
)
SECTIONS = ("model", "data", "quantization", "ptq", "training", "search", "report")


def configurations() -> Iterator[Case]:
    """Every key of the configuration with every strange value, and bombs."""
    from pow2quant import config

    plain = yaml.safe_load(config.dump(config.RunConfig()))
    keys = [(None, key) for key in plain] + [
        (section, key) for section in SECTIONS if isinstance(plain[section], dict) for key in plain[section]
    ]
    for section, key in keys:
        for value in VALUES:
            if (section, key, value) == ("data", "workers", "9999999999999999999999"):
                continue
            text = f"{key}: {value}\n" if section is None else f"{section}: {{{key}: {value}}}\n"
            yield Case("configuration", f"{section}.{key}: {value[:40]}", partial(_configured, text))
    for name, text in bombs():
        yield Case("configuration", name, partial(_configured, text))
        yield Case("study", name, partial(_study, text))
    for role in ("weight", "bias", "'*'", "conv.1"):
        for value in VALUES:
            text = f"quantization: {{overrides: {{'*': {{{role}: {value}}}}}}}\n"
            yield Case("configuration", f"overrides.{role}: {value[:40]}", partial(_configured, text))


def bombs() -> Iterator[tuple[str, str]]:
    """(name, YAML) that is small and would become large, deep or endless."""
    for depth in (4, 9, 30):
        lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
        lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth + 1)]
        yield f"aliases {depth}", "\n".join(lines)
        lines = ["a0: &a0 {k: 1}"]
        lines += [f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}], k{i}: 1}}" for i in range(1, depth + 1)]
        yield f"merges {depth}", "\n".join(lines)
        keys = ["a0: &a0 x", *(f"a{i}: &a{i} {{? [*a{i - 1}, *a{i - 1}] : 1}}" for i in range(1, depth + 1))]
        yield f"keys {depth}", "\n".join(keys)
    yield "itself", "&a [*a]"
    yield "itself in a key", "model: &a {name: *a}"
    yield "deep lists", "[" * 20000
    yield "deep mappings", "{a: " * 5000
    yield "deep blocks", "\n".join(" " * i + "a:" for i in range(1500))
    yield "many keys", "".join(f"k{i}: 1\n" for i in range(200000))
    yield "long", "# " + "x" * (20 << 20)
    yield "question marks", "? " * 30000
    yield "tags", "!" * 50000
    yield "documents", "---\n" * 5000
    yield "null bytes", "a: \0\0\0"
    yield "control characters", "a: \x1b[31m"
    yield "directive", "%YAML 9.9\n---\na: 1"
    yield "unknown alias", "a: *b"
    yield "sequence", "- a\n- b"
    yield "scalar", "42"


def _configured(text: str, folder: Path) -> list[str]:
    put(folder)
    (folder / "bad.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    flags = ["--model", "mine.py:net", "--data", "mine.py:data", "--max-eval-batches", "1"]
    return ["ptq", "--config", "bad.yaml", *flags, "--output", "out", "--quiet"]


STUDY_KEYS = ("name", "base", "grids", "trials", "sampler", "runs")
GRID_VALUES = (
    *VALUES,
    "[2, 3",
    "[null]",
    "[[]]",
    "[{}]",
    "[2026-11-27]",
    "2..1",
    "1:2:0",
    "1:2:-1",
    "2..99999999999999",
)


def studies() -> Iterator[Case]:
    """Every key of a study's file with every strange value, grids of every kind, databases."""
    for key in STUDY_KEYS:
        for value in VALUES:
            text = f"grids: [{{seed: [1]}}]\nbase: {{seed: 1}}\n{key}: {value}\n".replace(
                "grids: [{seed: [1]}]\n", "" if key == "grids" else "grids: [{seed: [1]}]\n"
            ).replace("base: {seed: 1}\n", "" if key == "base" else "base: {seed: 1}\n")
            yield Case("study", f"{key}: {value[:40]}", partial(_study, text))
    for value in GRID_VALUES:
        yield Case(
            "study", f"grid {value[:40]}", partial(_study, f"grids: [{{quantization.weight.bitwidth: {value}}}]")
        )
        yield Case("study", f"grid of grids {value[:40]}", partial(_study, f"grids: [{value}]"))
        yield Case("study", f"labels {value[:40]}", partial(_study, f"grids: [{{what: {{one: {value}}}}}]"))
        yield Case("study", f"--grid seed={value[:40]}", partial(_flag_grid, f"seed={value}", []))
        yield Case("study", f"--grid {value[:40]}", partial(_flag_grid, value, []))
    for name, content in (("text", b"text" * 999), ("empty", b""), ("header", b"SQLite format 3\0" + b"\7" * 999)):
        yield Case("study", f"database {name}", partial(_database, content))
    for url in (
        "sqlite:////",
        "sqlite:///",
        "postgresql://",
        "postgres://\0",
        "http://x",
        "sqlite:///a?b=c",
        "x" * 5000,
    ):
        yield Case("study", f"--storage {url[:30]}", partial(_flag_grid, "seed=1,2", ["--storage", url]))


def _study(text: str, folder: Path) -> list[str]:
    put(folder)
    (folder / "study.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    return ["sweep", "study.yaml", "--config", "quick.yaml", "--max-eval-batches", "1", "--output", "out", "--quiet"]


def _flag_grid(grid: str, more: list[str], folder: Path) -> list[str]:
    put(folder)
    return ["sweep", "--grid", grid, *more, "--config", "quick.yaml", "--max-eval-batches", "1", "--output", "out"]


def _database(content: bytes, folder: Path) -> list[str]:
    put(folder)
    (folder / "out").mkdir()
    (folder / "out" / "study.db").write_bytes(content)
    return ["sweep", "--grid", "seed=1,2", "--config", "quick.yaml", "--output", "out", "--quiet"]


def mutated(content: bytes, how: int) -> bytes:
    """Bits flipped, cut, doubled, or a part swapped, as a number says."""
    random_ = random.Random(how)
    data = bytearray(content)
    kind = how % 6
    if kind == 0:
        for _ in range(random_.choice((1, 3, 30))):
            data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
    elif kind == 1:
        del data[random_.randrange(len(data)) :]
    elif kind == 2:
        at = random_.randrange(len(data))
        data[at:at] = random_.randbytes(random_.choice((1, 8, 200)))
    elif kind == 3:
        at, size = random_.randrange(len(data)), random_.choice((1, 8, 200))
        del data[at : at + size]
    elif kind == 4:
        at = random_.randrange(len(data))
        data[at : at + 8] = random_.choice((b"\xff" * 8, b"\0" * 8, struct.pack("<q", 1 << 60), b'"\\"}]{'))
    else:
        half = len(data) // 2
        data = data[half:] + data[:half]
    return bytes(data)


RUN_COMMANDS = (
    ["validate", "run", "--max-eval-batches", "1"],
    ["report", "run"],
    ["export", "run", "--to", "c"],
    ["export", "run", "--to", "integers"],
    ["export", "run", "--to", "aimet-2.0.0"],
    ["correct", "run", "--overwrite", "--num-clusters", "1", "--pca-dim", "1"],
    ["logits", "run", "--overwrite"],
    ["report", "run", "run", "--output", "page"],
    ["explain", "run", "0"],
)


def damaged_runs(good: Path, count: int) -> Iterator[Case]:
    """A finished run with one file mutated, missing, empty, a folder, or another file of the run."""
    files = sorted(path.name for path in (good / "run").iterdir() if path.is_file())
    for number in range(count):
        name, command = files[number % len(files)], RUN_COMMANDS[(number // len(files)) % len(RUN_COMMANDS)]
        case = partial(_damaged, good, name, number, command)
        yield Case("damaged run", f"{name} {number} {' '.join(command[:4])}", case)
    for name in files:
        for how in ("missing", "empty", "folder", *files):
            for command in RUN_COMMANDS[:: 1 if how in ("missing", "empty") else 3]:
                yield Case("damaged run", f"{name} {how} {command[0]}", partial(_replaced, good, name, how, command))


def _damaged(good: Path, name: str, how: int, command: list[str], folder: Path) -> list[str]:
    path = copied(good, folder) / name
    path.write_bytes(mutated(path.read_bytes(), how))
    return [*command, "--quiet"]


def _replaced(good: Path, name: str, how: str, command: list[str], folder: Path) -> list[str]:
    path = copied(good, folder) / name
    content = (path.parent / how).read_bytes() if (path.parent / how).is_file() else b""
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(content)
    return [*command, "--quiet"]


def mutated_files(good: Path, count: int) -> Iterator[Case]:
    """ONNX, encodings, weights and checkpoints, mutated, each read by itself."""
    sources: tuple[tuple[str, str, Callable[[str], list[str]]], ...] = (
        ("onnx", "model.onnx", lambda f: ["validate", f]),
        ("onnx", "model_float.onnx", lambda f: ["validate", f, "--encodings", "run/model.encodings"]),
        ("encodings", "model.encodings", lambda f: ["validate", "run/model_float.onnx", "--encodings", f]),
        ("encodings", "model.encodings", lambda f: ["export", f, "--to", "aimet-2.0.0"]),
    )
    for number in range(count):
        category, name, command = sources[number % len(sources)]
        yield Case(category, f"{name} mutated {number}", partial(_mutated, good, name, number, command))


def _mutated(good: Path, name: str, how: int, command: Callable[[str], list[str]], folder: Path) -> list[str]:
    run = copied(good, folder)
    bad = folder / f"bad{Path(name).suffix}"
    bad.write_bytes(mutated((run / name).read_bytes(), how // 4))
    return [*command(bad.name), "--quiet"]


JSON_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "x" * 2000, [], {}, [[]], [None], {"a": None},
    "\0", [1] * 1000, "../secret", -0.0, [[1.0]], [float("nan")], ["a"], 2**63, 1e-320,
)  # fmt: skip


def encodings(good: Path) -> Iterator[Case]:
    """Every value in an encodings file of every version, replaced by every strange value; and deep JSON."""
    for version in ("0.6.1", "1.0.0", "2.0.0"):
        for place in range(14):
            for index, value in enumerate(JSON_VALUES):
                case = partial(_encodings, good, version, place, value)
                yield Case("encodings", f"{version} place {place} value {index}", case)
    for name, text in (
        ("deep", "[" * 100000),
        ("deep objects", '{"a":' * 50000),
        ("digits", "1" * 10000),
        ("bom", "\ufeff{}"),
    ):
        for command in (
            ["validate", "run/model_float.onnx", "--encodings", "bad"],
            ["export", "bad", "--to", "aimet-2.0.0"],
        ):
            yield Case("encodings", f"{name} {command[0]}", partial(_texted, good, text, command))


def _texted(good: Path, text: str, command: list[str], folder: Path) -> list[str]:
    copied(good, folder)
    (folder / "bad").write_text(text)
    return [*command, "--quiet"]


def _encodings(good: Path, version: str, place: int, value: Any, folder: Path) -> list[str]:
    from pow2quant import runs

    copied(good, folder)
    (path,) = runs.export(folder / "run", f"aimet-{version}", folder / "e")
    document = json.loads(path.read_text())
    places = list(_places(document))
    parent, key = places[place * 7 % len(places)]
    parent[key] = value
    path.write_text(json.dumps(document))
    return ["validate", "run/model_float.onnx", "--encodings", "e/model.encodings", "--quiet"]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def states(good: Path) -> Iterator[Case]:
    """Weights and checkpoints of every strange kind."""
    for name, made in sorted(_STATES.items()):
        yield Case("weights", name, partial(_weights, made, "weights.pt"))
    for number in range(120):
        yield Case("weights", f"mutated {number}", partial(_weights, partial(_mutated_state, number), "weights.pt"))
        made = partial(_mutated_tensors, good, number)
        yield Case("weights", f"safetensors mutated {number}", partial(_weights, made, "weights.safetensors"))
    for number in range(60):
        yield Case("checkpoint", f"mutated {number}", partial(_checkpoint, number))


def _weights(make: Callable[[Path], None], name: str, folder: Path) -> list[str]:
    arguments = put(folder)
    make(folder / name)
    return [*arguments, "--weights", name]


def _saved(make: Callable[[dict[Any, Any]], Any], path: Path) -> None:
    import torch
    from torch import nn

    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    torch.save(make(dict(network.state_dict())), path)


def _circular(state: dict[Any, Any]) -> Any:
    state["state_dict"] = state
    return state


def _nested(state: dict[Any, Any], depth: int = 300) -> Any:
    for _ in range(depth):
        state = {"model": state}
    return state


def _with(change: Callable[[Any], Any], state: dict[Any, Any]) -> Any:
    return state | {"0.weight": change(state["0.weight"])}


class Attack:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch EXECUTED",)


def _tensors() -> dict[str, Callable[[Any], Any]]:
    import torch

    return {
        "sparse": lambda w: w.to_sparse(),
        "meta": lambda w: w.to("meta"),
        "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
        "complex": lambda w: w.to(torch.complex64),
        "integer": lambda w: w.to(torch.int64),
        "bool": lambda w: w.bool(),
        "half": lambda w: w.half(),
        "float8": lambda w: w.to(torch.float8_e4m3fn),
        "nan": lambda w: w * float("nan"),
        "huge": lambda w: w * 1e38,
        "denormal": lambda w: w * 1e-42,
        "expanded": lambda w: w[:1, :1, :1, :1].expand(4, 1, 3, 3),
        "empty": lambda w: w[:0],
        "nested": lambda w: torch.nested.nested_tensor([w[0], w[1]]),
        "parameter": lambda w: torch.nn.Parameter(w),
        "list": lambda w: w.tolist(),
        "none": lambda w: None,
        "expanded to terabytes": lambda w: torch.zeros(1).expand(1 << 40),
    }


_STATES: dict[str, Callable[[Path], None]] = {
    "circular": partial(_saved, _circular),
    "nested": partial(_saved, _nested),
    "deeply nested": partial(_saved, partial(_nested, depth=400)),
    "integer keys": partial(_saved, lambda state: dict(enumerate(state.values()))),
    "tuple keys": partial(_saved, lambda state: {(key, 1): value for key, value in state.items()}),
    "none keys": partial(_saved, lambda state: state | {None: 1}),
    "mixed keys": partial(_saved, lambda state: state | {1: state["0.weight"], ("a",): state["0.bias"]}),
    "bytes keys": partial(_saved, lambda state: {key.encode(): value for key, value in state.items()}),
    "a list": partial(_saved, lambda state: list(state.values())),
    "a tensor": partial(_saved, lambda state: state["0.weight"]),
    "none": partial(_saved, lambda state: None),
    "a number": partial(_saved, lambda state: 3),
    "code": partial(_saved, lambda state: state | {"x": Attack()}),
    "code alone": partial(_saved, lambda state: Attack()),
    "module": partial(_saved, lambda state: __import__("torch").nn.Linear(2, 2)),
    "surrogates": partial(_saved, lambda state: state | {"\ud800": state["0.weight"]}),
    "newlines": partial(_saved, lambda state: state | {"a\nb\0c": state["0.weight"]}),
    "empty": partial(_saved, lambda state: {}),
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: __import__("os").mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
    "an empty file": lambda path: path.touch(),
    "text": lambda path: path.write_text("hello") and None,
    "unreadable": lambda path: path.touch(mode=0),
    **{name: partial(_saved, partial(_with, change)) for name, change in _tensors().items()},
}


def _mutated_state(how: int, path: Path) -> None:
    _saved(lambda state: state, path)
    path.write_bytes(mutated(path.read_bytes(), how))


def _mutated_tensors(good: Path, how: int, path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(good / "run" / "model.safetensors")
    save_file({k.removeprefix("parameter:"): v for k, v in state.items() if k.startswith("parameter:")}, path)
    content = path.read_bytes()
    if how % 3 == 0:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        parent, key = random.Random(how).choice(list(_places(header)))
        parent[key] = random.Random(how).choice(JSON_VALUES)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :])
    else:
        path.write_bytes(mutated(content, how))


def _checkpoint(how: int, folder: Path) -> list[str]:
    """A foreign checkpoint where `--resume` looks for its own."""
    put(folder)
    place = folder / "out.training"
    place.mkdir()
    contents = (b"", b"{}", b"\x80\x04" * 9, b'{"a": 1}' * 99, (8).to_bytes(8, "little") + b"{}      ")
    header = json.dumps({"__metadata__": {"pow2quant.structure": _STRUCTURES[how % len(_STRUCTURES)]}}).encode()
    forged = len(header).to_bytes(8, "little") + header
    (place / "checkpoint.safetensors").write_bytes(forged if how % 2 else contents[how // 2 % len(contents)])
    return ["qat", "--config", "quick.yaml", "--output", "out", "--resume", "--quiet"]


_STRUCTURES = (
    "null", "[]", "{}", '{"dict": []}', '{"tensor": 0}', '{"tensor": -1}', '{"list": 3}', '{"dict": [[[], 1]]}', "1",
    '{"dict": {"a": 1}}', "[" * 5000, '{"list":[' * 900 + "]}" * 900, '{"tuple": [{"dict": [["a", null]]}]}', '"x"',
    '{"dict": [["identity", "x"], ["epoch", null], ["step", "a"]]}', '{"tensor": "a"}', '{"a": 1, "b": 2}',
)  # fmt: skip


def onnx_files(good: Path) -> Iterator[Case]:
    """ONNX that is well-formed and impossible."""
    from tests.attacks import onnx_models

    for name, make in onnx_models.every():
        yield Case("onnx", name, partial(_onnx, make))
        yield Case("onnx", f"{name}, with encodings", partial(_onnx_with_encodings, good, make))
        yield Case("onnx", f"{name}, as a network", partial(_onnx_as_network, make))


def _onnx(make: Callable[[Path], None], folder: Path) -> list[str]:
    make(folder / "bad.onnx")
    return ["validate", "bad.onnx", "--quiet"]


def _onnx_as_network(make: Callable[[Path], None], folder: Path) -> list[str]:
    arguments = put(folder)
    make(folder / "bad.onnx")
    return [*arguments, "--model", "bad.onnx"]


def _onnx_with_encodings(good: Path, make: Callable[[Path], None], folder: Path) -> list[str]:
    make(folder / "bad.onnx")
    shutil.copy(good / "run" / "model.encodings", folder / "e.encodings")
    return ["validate", "bad.onnx", "--encodings", "e.encodings", "--quiet"]
