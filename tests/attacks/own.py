"""What a person writes: networks, data, losses and names of their own, flags, folders of images."""

# ruff: noqa: E501 (tables)

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.attacks.good import CODE, copied, put
from tests.attacks.harness import Case

STATEMENTS = (
    "raise ValueError('x')", "raise KeyError", "raise SystemExit(3)", "raise SystemExit('text')", "raise KeyboardInterrupt",
    "raise BaseException('x')", "raise GeneratorExit", "raise StopIteration", "raise MemoryError", "raise RecursionError('x')",
    "raise NotImplementedError", "import sys; sys.exit()", "import sys; sys.exit(0)", "exit()", "raise type('E', (BaseException,), {})('x')",
    "raise AssertionError", "raise UnicodeDecodeError('utf8', b'x', 0, 1, 'x')", "raise OSError(28, 'No space left')",
    "raise ExceptionGroup('g', [ValueError('x')])" if hasattr(__builtins__, "x") else "raise TypeError('a\\n\\nb' * 900)",
    "return None", "return 3", "return 'x'", "return [1, 2]", "return lambda x: x", "return int", "import nowhere_at_all",
    "def f(): f()\n    f()", "return open", "1 / 0", "raise ImportError('a')", "raise Warning('x')", "raise EOFError",
    "raise BrokenPipeError(32, 'Broken pipe')", "raise RuntimeError('\\x1b[31m\\0')", "import warnings; warnings.warn('x')",
    "import logging; logging.error('x')", "print('to stdout')", "import os; os.chdir('/')", "return object()", "return ...",
)  # fmt: skip


def code() -> Iterator[Case]:
    """Every statement in every place where a user's code runs."""
    for statement in STATEMENTS:
        net = CODE.replace("    torch.manual_seed(0)\n", f"    {statement}\n    torch.manual_seed(0)\n")
        yield Case("own code", f"factory: {statement}", partial(put, code=net))
        data = CODE.replace("def data():\n", f"def data():\n    {statement}\n")
        yield Case("own code", f"data: {statement}", partial(put, code=data))
        if not statement.startswith("return"):
            yield Case(
                "own code", f"import: {statement}", partial(put, code=f"{statement.replace('    f()', 'f()')}\n{CODE}")
            )
        for place, method in (
            ("network", "forward(self, x)"),
            ("data set", "__getitem__(self, i)"),
            ("length", "__len__(self)"),
        ):
            yield Case("own code", f"{place}: {statement}", partial(_class, place, method, statement))
        for key in ("criterion", "optimizer", "scheduler"):
            yield Case("own code", f"{key}: {statement}", partial(_training, key, statement))
    for name, text in (
        ("no such name", "x = 1"),
        ("syntax", "def net(:"),
        ("null byte", "a\0"),
        ("latin", "# \udce9"),
        ("empty", ""),
    ):
        yield Case("own code", name, partial(put, code=text))
    for model in (
        "mine.py",
        "mine.py:",
        ":net",
        "mine.py:net:net",
        "mine.py:nn",
        "mine.py:__name__",
        "nowhere.py:net",
        ".py:x",
        "/:x",
    ):
        yield Case("own code", f"--model {model}", lambda folder, model=model: [*put(folder), "--model", model])
        yield Case("own code", f"--data {model}", lambda folder, model=model: [*put(folder), "--data", model])


def _class(place: str, method: str, statement: str, folder: Path) -> list[str]:
    if place == "network":
        extra = f"class Net(nn.Module):\n    def {method}:\n        {statement}\n\n\ndef net():\n    return Net()\n"
    else:
        extra = (
            f"class Set(torch.utils.data.Dataset):\n    classes = ['a', 'b']\n    def __len__(self):\n        return 8\n"
            f"    def __getitem__(self, i):\n        return torch.zeros(1, 8, 8), 0\n    def {method}:\n        {statement}\n\n\n"
            "def data():\n    return Set(), Set()\n"
        )
    return put(
        folder,
        code=CODE + "\n\n" + extra.replace("    f()", "        f()") if "def f" in statement else CODE + "\n\n" + extra,
    )


def _training(key: str, statement: str, folder: Path) -> list[str]:
    arguments = put(
        folder, CODE + f"\n\ndef thing(*a, **k):\n    {statement}\n", **{f"training__{key}": "mine.py:thing"}
    )
    return ["qat", *arguments[1:]]


LABELS = (
    "['a'] * 16", "[None] * 16", "[{}] * 16", "torch.arange(16).float()", "torch.arange(16) * 10**6", "torch.arange(16) * 10**15",
    "-torch.arange(16)", "torch.full((16,), 2**62)", "torch.zeros(16, 2).long()", "torch.zeros(16, 4)", "torch.zeros(15).long()",
    "torch.zeros(0).long()", "torch.zeros(16, dtype=torch.bool)", "torch.zeros(16, dtype=torch.complex64)", "torch.full((16,), float('nan'))",
    "torch.arange(16)", "list(range(16))", "torch.arange(16).numpy()", "torch.arange(16).to_sparse()", "torch.arange(16, device='meta')",
    "None", "'x'", "torch.tensor(3)", "torch.arange(16, dtype=torch.uint8)", "[[0]] * 16", "[torch.tensor(1)] * 16", "[()] * 16",
)  # fmt: skip
IMAGES = (
    "torch.rand(16, 8, 8)", "torch.rand(16, 1, 9, 9)", "torch.rand(16, 3, 8, 8)", "torch.rand(16)", "torch.rand(16, 1, 0, 8)",
    "torch.zeros(16, 1, 8, 8, dtype=torch.uint8)", "torch.zeros(16, 1, 8, 8, dtype=torch.float64)", "torch.zeros(16, 1, 8, 8).half()",
    "torch.full((16, 1, 8, 8), float('nan'))", "torch.full((16, 1, 8, 8), 1e38)", "torch.full((16, 1, 8, 8), 1e-42)", "torch.zeros(16, 1, 8, 8)",
    "torch.rand(16, 1, 8, 8).to_sparse()", "torch.rand(16, 1, 8, 8, device='meta')", "torch.rand(16, 1, 8, 8).bfloat16()", "None", "'abc'",
    "[torch.rand(1, 8, 8)] * 16", "[None] * 16", "torch.rand(0, 1, 8, 8)", "torch.rand(16, 1, 8, 8).numpy()", "torch.rand(16, 1, 8, 8) + 1j",
    "torch.rand(16, 1, 8, 8, requires_grad=True)", "torch.rand(16, 1, 1, 8, 8)", "[[0.5] * 64] * 16", "[torch.rand(1, 8 + i, 8) for i in range(16)]",
)  # fmt: skip
SETS = ("TensorDataset({x}, {y})", "list(zip({x}, {y}))", "[({x}, {y})]")


def data() -> Iterator[Case]:
    """Images and labels of every kind, in training data, in test data, in both; `ptq` and `qat`."""
    good_x, good_y = "torch.rand(16, 1, 8, 8)", "torch.arange(16) % 4"
    for which in ("both", "train", "test"):
        for kind in SETS:
            for x, y in ((i, good_y) for i in IMAGES):
                yield Case("data", f"{which} {kind} {x}", partial(_data, which, kind.format(x=x, y=y)))
            for x, y in ((good_x, label) for label in LABELS):
                yield Case("data", f"{which} {kind} {y}", partial(_data, which, kind.format(x=x, y=y)))
    for y in LABELS:
        case = partial(_data, "both", SETS[0].format(x=good_x, y=y), command="qat")
        yield Case("data", f"qat {y}", case)
    for flag in ("--max-eval-batches", "--max-calibration-batches"):
        for value in ("0", "-1", "1", "1000000", "99999999999999999999", "x"):
            yield Case("data", f"{flag} {value}", lambda folder, f=flag, v=value: [*put(folder), f, v])
    yield Case("data", "warm-up beyond training", lambda f: ["qat", *put(f, training__warmup_epochs=9)[1:]])
    yield Case("data", "gradual beyond training", lambda f: ["qat", *put(f, training__gradual_epochs=9)[1:]])
    for criterion in CRITERIA:
        yield Case("data", f"criterion {criterion}", lambda f, c=criterion: ["qat", *put(f, training__criterion=c)[1:]])
    for optimizer in OPTIMIZERS:
        yield Case("data", f"optimizer {optimizer}", lambda f, o=optimizer: ["qat", *put(f, training__optimizer=o)[1:]])
    for scheduler in SCHEDULERS:
        yield Case("data", f"scheduler {scheduler}", lambda f, s=scheduler: ["qat", *put(f, training__scheduler=s)[1:]])


CRITERIA = (
    "AdaptiveLogSoftmaxWithLoss", "TripletMarginLoss", "CTCLoss", "MSELoss", "NLLLoss", "BCELoss", "KLDivLoss", "Module", "Linear", "modules",
    "PoissonNLLLoss", "GaussianNLLLoss", "MultiLabelMarginLoss", "CosineEmbeddingLoss", "HingeEmbeddingLoss", "SmoothL1Loss", "nothing", "__name__",
)  # fmt: skip
OPTIMIZERS = (
    "Optimizer",
    "LBFGS",
    "SparseAdam",
    "Rprop",
    "ASGD",
    "Adafactor",
    "Muon",
    "lr_scheduler",
    "nothing",
    "SGD",
    "RMSprop",
    "__doc__",
)
SCHEDULERS = (
    "LambdaLR", "MultiStepLR", "OneCycleLR", "CyclicLR", "ReduceLROnPlateau", "SequentialLR", "ChainedScheduler", "LRScheduler", "StepLR", "nothing",
    "ConstantLR", "PolynomialLR", "CosineAnnealingWarmRestarts", "MultiplicativeLR", "ExponentialLR", "LinearLR", "bisect",
)  # fmt: skip


def _data(which: str, made: str, folder: Path, command: str = "ptq") -> list[str]:
    good = "TensorDataset(torch.rand(16, 1, 8, 8), torch.arange(16) % 4)"
    sets = {"both": (made, made), "train": (made, good), "test": (good, made)}[which]
    return [command, *put(folder, CODE + f"\n\ndef data():\n    return {sets[0]}, {sets[1]}\n")[1:]]


NAMES = (
    "in", "class", "lambda", "None", "for", "weight", "forward", "training", "model", "self", "x", "1", "é", "名", "a b", "a-b", "a'b", 'a"b',
    "a\nb", "a\rb", "a\tb", "*/", "/*", "??/", "\\", "\\n", "<script>alert(1)</script>", "{{7*7}}", "{x}", "%s", "$(touch EXECUTED)",
    "`touch EXECUTED`", "';touch EXECUTED;'", "#include", "a" * 300, "__class__", "__init__", "_", "int", "main", "model_run", "../x", "/x",
    "a:b", "a: b", "- a", "!!python/x", "&a", "*a", "|", "# a", "@", "a=b", "\x1b[31m", "\ud800", "\0", "\u202e", "CON", "a/b", "constructor",
)  # fmt: skip


def names() -> Iterator[Case]:
    """Modules, classes, files and studies called by names from elsewhere."""
    for name in NAMES:
        yield Case("names", f"module {name!r}", partial(_modules, name))
        yield Case("names", f"class {name!r}", partial(_classes, name))
        yield Case("names", f"output {name!r}", partial(_files, name))
        yield Case("names", f"type {name!r}", partial(_type, name))
        yield Case("names", f"study {name!r}", lambda folder, name=name: _study(name, folder))


def _modules(name: str, folder: Path) -> list[str]:
    text = (
        "\n\nclass M(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.b = nn.ModuleDict({{{name!r}: nn.Conv2d(1, 4, 3), 'z': nn.ReLU()}})\n        self.f = nn.Linear(144, 4)\n\n"
        f"    def forward(self, x):\n        return self.f(self.b['z'](self.b[{name!r}](x)).flatten(1))\n\n\nnet = M\n"
    )
    return put(folder, CODE + text)


def _classes(name: str, folder: Path) -> list[str]:
    """Classes of a data set, which go into the report."""
    text = f"\n\nclass T(TensorDataset):\n    classes = [{name!r}, 'b', 'c', 'd']\n\n\n_data = data\n\n\n"
    return put(folder, CODE + text + "def data():\n    return tuple(T(*s.tensors) for s in _data())\n")


def _type(name: str, folder: Path) -> list[str]:
    """A class of modules."""
    return put(folder, CODE + f"\n\nR = type({name.replace(chr(0), '').encode('ascii', 'replace').decode()!r}, (nn.ReLU,), {{}})\n"
               "\n\ndef net():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), R(), nn.Flatten(), nn.Linear(144, 4))\n")  # fmt: skip


def _files(name: str, folder: Path) -> list[str]:
    arguments = put(folder)
    return [a if a != "out" else f"./{name}" for a in arguments]


def _study(name: str, folder: Path) -> list[str]:
    put(folder)
    grid = ["--grid", "seed=1", "--study", name]
    return ["sweep", *grid, "--config", "quick.yaml", "--max-eval-batches", "1", "--output", "out", "--quiet"]


FLAGS = (
    "",
    "-1",
    "0",
    "nan",
    "1e999",
    "x" * 3000,
    "None",
    "\ud800",
    "a\nb",
    "--",
    "/dev/null",
    "/proc/self/mem",
    ".",
    "..",
    "/",
    "é",
    "1,2",
    "2..",
    "=",
)
COMMANDS = (
    "ptq", "qat", "validate", "export", "report", "list", "search", "sweep", "compare", "correct", "logits", "explain",
    "targets",
)  # fmt: skip


def flags(good: Path) -> Iterator[Case]:
    """Every flag of every command with every strange value."""
    import typer.main

    from pow2quant.cli import application

    group = typer.main.get_command(application())
    for command in COMMANDS:
        parameters = group.commands[command].params  # type: ignore[attr-defined]
        for parameter in parameters:
            if parameter.param_type_name != "option" or parameter.is_flag:
                values: tuple[str, ...] = FLAGS if parameter.param_type_name == "argument" else ()
            else:
                values = FLAGS
            for value in values:
                case = partial(
                    _flag, good, command, parameter.opts[0] if parameter.param_type_name == "option" else "", value
                )
                yield Case("flags", f"{command} {parameter.opts[0]} {value[:20]!r}", case)


BASES = {
    "ptq": ["--config", "quick.yaml", "--output", "out"],
    "qat": ["--config", "quick.yaml", "--output", "out"],
    "validate": ["run/model.onnx"],
    "export": ["run", "--to", "c"],
    "report": ["run"],
    "list": [],
    "explain": ["run", "0"],
    "targets": ["litert"],
    "search": ["--config", "quick.yaml", "--output", "out"],
    "sweep": ["--config", "quick.yaml", "--grid", "seed=1", "--output", "out"],
    "compare": ["--config", "quick.yaml", "--method", "none", "--widths", "8:8", "--seeds", "0", "--output", "out"],
    "correct": ["run", "--num-clusters", "1", "--pca-dim", "1", "--alpha", "1", "--output", "out"],
    "logits": ["run", "--num-clusters", "1", "--pca-dim", "1", "--alpha", "1", "--output", "out"],
}


def _flag(good: Path, command: str, flag: str, value: str, folder: Path) -> list[str]:
    copied(good, folder)
    base = list(BASES[command])
    if not flag:
        return [command, value, *base[1:]]
    if flag in base:
        at = base.index(flag)
        del base[at : at + 2]
    if flag == "--output" and value in ("/", "..", "/dev/null", "/proc/self/mem"):
        value = f"./{value}x" if value == ".." else value
    return [command, *base, flag, value]


def folders() -> Iterator[Case]:
    """Image folders with pipes, devices, loops, damaged and enormous images."""
    for name, make in sorted(_FOLDERS.items()):
        for place in ("train/a", "test/b", "a", "train/a/deep"):
            yield Case("image folder", f"{name} in {place}", partial(_images, make, place))


def _images(make: Callable[[Path], None], place: str, folder: Path) -> list[str]:
    from PIL import Image

    root = folder / "images"
    for part in ("train", "test") if place.startswith("t") else ("",):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            for number in range(5):
                Image.new("RGB", (9, 9), (number, 99, 9)).save(root / part / label / f"{number}.png")
    (root / place).mkdir(parents=True, exist_ok=True)
    make(root / place / "0.png" if "deep" not in place else root / place / "9.png")
    flags = ["--config", "quick.yaml", "--model", "big.py:net", "--data", "imagefolder", "--data-path", "images"]
    put(folder)
    text = "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.LazyLinear(2))\n"
    (folder / "big.py").write_text(text.replace("nn.LazyLinear(2)", "nn.Linear(72, 2)"))
    (folder / "quick.yaml").write_text("data: {resize: 8, crop: 8}\nreport: {statistics: false, latency: false}\n")
    return ["ptq", *flags, "--output", "out", "--quiet"]


def _placed(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def place(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return place


def _png(width: int, height: int) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 10000)) + chunk(b"IEND", b"")


_FOLDERS = {
    "pipe": _placed(lambda p: os.mkfifo(p)),
    "link to a pipe": _placed(lambda p: (os.mkfifo(p.with_name("fifo")), p.symlink_to("fifo"))),
    "device": _placed(lambda p: p.symlink_to("/dev/zero")),
    "random device": _placed(lambda p: p.symlink_to("/dev/urandom")),
    "process": _placed(lambda p: p.symlink_to("/proc/self/mem")),
    "kernel messages": _placed(lambda p: p.symlink_to("/proc/kmsg")),
    "secret": _placed(lambda p: p.symlink_to(p.parents[len(p.parts) - 2] / "secret")),
    "link to itself": _placed(lambda p: p.symlink_to(p.name)),
    "loop of folders": lambda p: p.with_name("loop").symlink_to("."),
    "loop of the parent": lambda p: p.with_name("loop").symlink_to("../.."),
    "link to the root": lambda p: p.with_name("root").symlink_to("/"),
    "link to /proc": lambda p: p.with_name("proc").symlink_to("/proc"),
    "broken link": _placed(lambda p: p.symlink_to("nowhere")),
    "empty": _placed(lambda p: p.touch()),
    "text": _placed(lambda p: p.write_text("hello")),
    "unreadable": _placed(lambda p: p.touch(mode=0)),
    "folder called so": _placed(lambda p: p.mkdir()),
    "truncated": lambda p: p.exists() and p.write_bytes(p.read_bytes()[:40]) and None,
    "a billion pixels": _placed(lambda p: p.write_bytes(_png(50000, 50000))),
    "a line": _placed(lambda p: p.write_bytes(_png(1 << 28, 1))),
    "no pixels": _placed(lambda p: p.write_bytes(_png(0, 0))),
    "socket": _placed(lambda p: __import__("socket").socket(__import__("socket").AF_UNIX).bind(str(p)[-100:])),
    "name": lambda p: p.with_name("a\nb <script>.png").write_bytes(p.read_bytes()) if p.exists() else None,
    "bytes": lambda p: open(os.fsencode(p.with_name("x")) + b"\xff.png", "wb").close(),
}  # fmt: skip
