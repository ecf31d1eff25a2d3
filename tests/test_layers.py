"""The package's layers: who may import whom, what the entry points may load, where the plug-in rows lead.

CONTRIBUTING.md draws the layers and the two halves. Imports are read with `ast`, so nothing below has to be importable.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

import pytest

from pow2quant import plugins

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "pow2quant"

LAYERS = {
    "pow2quant": 6,
    "pow2quant.__main__": 6,
    "pow2quant.cli": 6,
    "pow2quant.quantsim": 6,
    "pow2quant.three_steps": 5,
    "pow2quant.runs": 5,
    "pow2quant.study": 5,
    "pow2quant.logits": 4,
    "pow2quant.training": 4,
    "pow2quant.methods": 4,
    "pow2quant.validation": 4,
    "pow2quant.report": 4,
    "pow2quant.tasks": 4,
    "pow2quant.backends": 3,
    "pow2quant.frontends": 3,
    "pow2quant.integer": 3,
    "pow2quant.adapters": 3,
    "pow2quant.models": 3,
    "pow2quant.checkpoints": 3,
    "pow2quant.run_folder": 3,
    "pow2quant.datasets": 3,
    "pow2quant.config": 2,
    "pow2quant.artifact": 2,
    "pow2quant.operators": 2,
    "pow2quant.functions": 2,
    "pow2quant.graphs": 2,
    "pow2quant.bounds": 2,
    "pow2quant.rewrites": 2,
    "pow2quant.targets": 2,
    "pow2quant.reading": 2,
    "pow2quant.pow2_constraints": 1,
    "pow2quant.saving": 1,
    "pow2quant.compiled": 1,
    "pow2quant.signals": 1,
    "pow2quant.foreign": 1,
    "pow2quant.mappings": 1,
    "pow2quant.errors": 1,
    "pow2quant.progress": 1,
    "pow2quant.plugins": 1,
    "pow2quant.yaml_text": 1,
}
ALLOWED = {  # the only imports between two modules of one layer
    ("pow2quant.functions", "pow2quant.graphs"),
    ("pow2quant.rewrites", "pow2quant.graphs"),
    ("pow2quant.rewrites", "pow2quant.operators"),
    ("pow2quant.config", "pow2quant.targets"),
    ("pow2quant.targets", "pow2quant.operators"),
    ("pow2quant", "pow2quant.quantsim"),
    ("pow2quant.__main__", "pow2quant.cli"),
    ("pow2quant.plugins", "pow2quant.errors"),
    ("pow2quant.saving", "pow2quant.errors"),
    ("pow2quant.compiled", "pow2quant.errors"),
    ("pow2quant.compiled", "pow2quant.saving"),
    ("pow2quant.foreign", "pow2quant.errors"),
    ("pow2quant.mappings", "pow2quant.errors"),
    ("pow2quant.mappings", "pow2quant.yaml_text"),
    ("pow2quant.yaml_text", "pow2quant.errors"),
    ("pow2quant.three_steps", "pow2quant.runs"),
    ("pow2quant.training", "pow2quant.methods"),
    ("pow2quant.training", "pow2quant.tasks"),
    ("pow2quant.backends", "pow2quant.frontends"),
    ("pow2quant.models", "pow2quant.frontends"),
    ("pow2quant.models", "pow2quant.checkpoints"),
    ("pow2quant.study", "pow2quant.runs"),
    ("pow2quant.study", "pow2quant.three_steps"),
    ("pow2quant.pow2_constraints", "pow2quant.errors"),
}
LEFT = {"pow2quant.frontends", "pow2quant.backends", "pow2quant.methods", "pow2quant.training"}
RIGHT = {"pow2quant.integer", "pow2quant.adapters", "pow2quant.validation"}
TORCH_MODULES = LEFT | {
    "pow2quant.study",
    "pow2quant.three_steps",
    "pow2quant.runs",
    "pow2quant.models",
    "pow2quant.checkpoints",
    "pow2quant.datasets",
    "pow2quant.reading",
    "pow2quant.tasks",
    "pow2quant.quantsim",
}
TORCH = {"torch", "torchvision", "safetensors.torch"}
AIMET = {"aimet_torch", "aimet_common"}
AIMET_MODULE = "pow2quant.backends.aimet"
CONCRETE_BACKENDS = {place.partition(":")[0] for place in plugins.TABLES["backends"].values()}
ENTRY_POINTS = {"pow2quant", "pow2quant.__main__", "pow2quant.cli"}
LINKS = ("adapters", "backends", "pow2_constraints")

Moment = Literal["import", "call", "typing"]


@dataclass(frozen=True)
class Import:
    """`source` imports `target` when it is itself imported, when a function is called, or for type checkers only."""

    source: str
    line: int
    target: str
    moment: Moment

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def top_level(module: str) -> str:
    """The file or package directly inside pow2quant: `pow2quant.backends` for `pow2quant.backends.base`."""
    return ".".join(module.split(".")[:2])


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def side(module: str) -> str:
    return "left" if within(module, LEFT) else "right" if within(module, RIGHT) else "neither"


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package below `root`, by its dotted name."""
    names = {path: path.relative_to(root).with_suffix("").parts for path in sorted((root / PACKAGE).rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def targets(node: ast.AST) -> list[str]:
    """The dotted names that one statement or call imports; `from a import b` may mean the module a.b or a name in a."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names):
            return [f"{'.' * node.level}{module or ''}.{alias.name}" for alias in names]
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


def is_for_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def statements(node: ast.AST, moment: Moment = "import") -> Iterator[tuple[ast.AST, Moment]]:
    """Every node with the moment at which it runs."""
    yield node, moment
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        moment = "call"
    orelse = node.orelse if is_for_typing(node) else []
    for child in ast.iter_child_nodes(node):
        yield from statements(child, "typing" if is_for_typing(node) and child not in orelse else moment)


def imports(root: Path) -> Iterator[Import]:
    known = modules(root)
    for source, path in known.items():
        for node, moment in statements(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            for target in targets(node):
                while target not in known and within(target, {PACKAGE}) and target != f"{PACKAGE}.__version__":
                    target = target.rpartition(".")[0]
                yield Import(source, getattr(node, "lineno", 0), target, moment)


def no_relative_imports(step: Import) -> str | None:
    return "relative imports hide the package" if step.target.startswith(".") else None


def arrows_point_down(step: Import) -> str | None:
    source, target = top_level(step.source), top_level(step.target)
    if source == target or (source, target) in ALLOWED or not {source, target} <= LAYERS.keys():
        return None
    if LAYERS[target] < LAYERS[source]:
        return None
    return f"an arrow only points down, not from layer {LAYERS[source]} to layer {LAYERS[target]}"


def halves_meet_in_the_artifact(step: Import) -> str | None:
    crosses = {side(step.source), side(step.target)} == {"left", "right"}
    return "the left and the right half do not import each other" if crosses else None


def torch_stays_left(step: Import) -> str | None:
    if within(step.target, TORCH) and step.moment != "typing" and top_level(step.source) not in TORCH_MODULES:
        return "torch stays in the left half, in runs, the models and the datasets"
    return None


def aimet_has_one_module(step: Import) -> str | None:
    if within(step.target, AIMET) and not within(step.source, {AIMET_MODULE}):
        return f"only {AIMET_MODULE} knows AIMET"
    return None


def aimet_is_lazy(step: Import) -> str | None:
    return "AIMET is imported inside functions" if within(step.target, AIMET) and step.moment == "import" else None


def methods_know_no_backend(step: Import) -> str | None:
    if top_level(step.source) == "pow2quant.methods" and step.target in CONCRETE_BACKENDS | {"pow2quant.backends"}:
        return "a method knows pow2quant.backends.base, no concrete backend"
    return None


def entry_points_are_light(step: Import) -> str | None:
    if (
        top_level(step.source) in ENTRY_POINTS
        and step.moment == "import"
        and within(step.target, TORCH | TORCH_MODULES)
    ):
        return "the entry points load no torch: import it inside a function"
    return None


def links_are_no_packages(step: Import) -> str | None:
    return "everything imports as pow2quant.…" if within(step.target, set(LINKS)) else None


RULES: tuple[Callable[[Import], str | None], ...] = (
    no_relative_imports,
    arrows_point_down,
    halves_meet_in_the_artifact,
    torch_stays_left,
    aimet_has_one_module,
    aimet_is_lazy,
    methods_know_no_backend,
    entry_points_are_light,
    links_are_no_packages,
)


def breaches(root: Path) -> list[str]:
    """What the package below `root` does against the rules, a line each."""
    unknown = [f"{module} is in no layer" for module in modules(root) if top_level(module) not in LAYERS]
    return unknown + [f"{step}: {why}" for step in imports(root) for rule in RULES if (why := rule(step))]


LINK_IMPORT = re.compile(
    rf"""
    (?: ^ | [`"';] | >>> ) [ \t]*                       # where code begins, in a file or quoted in a document
    (?: import | from (?= [ \t]+ [\w.]+ [ \t]+ import\b) ) [ \t]+
    ( {"|".join(LINKS)} ) \b
    """,
    re.MULTILINE | re.VERBOSE,
)
TEXTS = {".cfg", ".ipynb", ".md", ".py", ".rst", ".sh", ".toml", ".txt", ".yaml", ".yml"}
GENERATED = {"build", "dist", "runs"}


def link_imports(root: Path) -> list[str]:
    """The code and documents below `root` that import one of the root's links as if it were a package."""
    found = []
    for folder, folders, files in os.walk(root):
        generated = GENERATED if Path(folder) == root else set()
        folders[:] = [name for name in folders if name not in generated and (not name.startswith(".") or name == ".ci")]
        for path in (Path(folder, name) for name in sorted(files)):
            if path.suffix in TEXTS or path.name == "Makefile":
                text = path.read_text(encoding="utf-8", errors="replace")
                lines = (text.count("\n", 0, match.start(1)) + 1 for match in LINK_IMPORT.finditer(text))
                found += [f"{path.relative_to(root)}:{line}" for line in lines]
    return found


def test_the_package_keeps_its_rules():
    assert "pow2quant.artifact" in modules(ROOT)
    assert breaches(ROOT) == []


def circle(root: Path) -> list[str]:
    """The modules of an import circle, those for type checkers and inside functions included; none: an empty list."""
    known = modules(root)
    graph: dict[str, set[str]] = {name: set() for name in known}
    for step in imports(root):
        if step.target in known and step.target != step.source:
            graph[step.source].add(step.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_there_is_no_import_circle():
    assert circle(ROOT) == []


def test_a_circle_is_reported(tmp_path):
    (tmp_path / PACKAGE).mkdir()
    for name, other in (("a", "b"), ("b", "a")):
        text = f"def f():\n    from {PACKAGE} import {other}\n"
        (tmp_path / PACKAGE / f"{name}.py").write_text(text, encoding="utf-8")
    assert set(circle(tmp_path)) == {f"{PACKAGE}.a", f"{PACKAGE}.b"}


def test_no_code_imports_a_link():
    assert link_imports(ROOT) == []


@pytest.mark.parametrize("name", LINKS)
def test_the_links_point_inward(name):
    link = ROOT / name
    target = os.readlink(link) if link.is_symlink() else link.read_text(encoding="utf-8")  # some checkouts write text
    assert target == f"{PACKAGE}/{name}"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in plugins.TABLES.items() for name in table])
def test_every_plugin_row_resolves(kind, name):
    assert plugins.resolve(kind, name) is not None


@pytest.mark.parametrize("arguments", [["-c", "import pow2quant"], ["-m", "pow2quant", "--help"]], ids=" ".join)
def test_the_entry_points_load_neither_torch_nor_aimet(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pow2quant" in loaded
    assert [name for name in sorted(loaded) if within(name, TORCH | AIMET)] == []


@pytest.fixture
def tree(tmp_path):
    """A fake tree in which every module of the plan exists and is empty; call it with {path: text} to fill some."""

    def fill(files):
        empty = {name.replace(".", "/") + "/__init__.py": "" for name in LAYERS}
        empty |= {f"pow2quant/backends/{name}.py": "" for name in ("base", "prepare", "custom", "aimet")}
        for name, text in (empty | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return fill


def test_a_tree_in_order_has_no_breach(tree):
    lazily = "def __getattr__(name):\n    "
    files = {
        "__init__.py": lazily + "from pow2quant.quantsim import QuantizationSimModel",
        "__main__/__init__.py": "from pow2quant.cli import main",
        "cli/__init__.py": "from pow2quant import __version__, config\nlambda: __import__('pow2quant.runs')",
        "quantsim/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        "runs/__init__.py": "import torch\nfrom pow2quant import backends, integer, methods, validation",
        "methods/adaround.py": "import torch.nn.functional as F\nfrom pow2quant.backends import base, prepare",
        "validation/__init__.py": "import numpy\nfrom pow2quant import __version__, adapters, integer",
        "backends/aimet.py": "from pow2quant.backends import custom\n" + lazily + "import aimet_torch.nn",
        "artifact/__init__.py": "from pow2quant.pow2_constraints import Encoding",
        "plugins/__init__.py": "from pow2quant.errors import ConfigError",
    }
    root = tree({f"pow2quant/{path}": text for path, text in files.items()})
    assert breaches(root) == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("config", "import pow2quant.runs", "layer 2 to layer 5"),
        ("config", "from pow2quant import runs", "layer 2 to layer 5"),
        ("config", "from pow2quant import something", "layer 2 to layer 6"),
        ("config", "def f():\n    from pow2quant.runs import run", "layer 2 to layer 5"),
        ("config", "import importlib\nimportlib.import_module('pow2quant.runs')", "layer 2 to layer 5"),
        ("config", "if TYPE_CHECKING:\n    from pow2quant.runs import run", "layer 2 to layer 5"),
        ("config", "from pow2quant import artifact", "layer 2 to layer 2"),
        ("errors", "import pow2quant.plugins", "layer 1 to layer 1"),
        ("report", "from pow2quant.validation import ort", "layer 4 to layer 4"),
        ("adapters", "from pow2quant.integer import program", "layer 3 to layer 3"),
        ("backends/base", "from pow2quant import adapters", "left and the right half"),
        ("methods/adaround", "from pow2quant.integer import run", "left and the right half"),
        ("training", "from pow2quant import validation", "left and the right half"),
        ("validation", "from pow2quant.backends import base", "left and the right half"),
        ("integer", "import torch.nn.functional", "torch stays in the left half"),
        ("adapters", "def f():\n    from torchvision import models", "torch stays in the left half"),
        ("report", "from safetensors import torch", "torch stays in the left half"),
        ("cli", "def f():\n    import torch", "torch stays in the left half"),
        ("backends/custom", "def f():\n    import aimet_torch", "only pow2quant.backends.aimet knows"),
        ("backends/aimet", "from aimet_torch.quantsim import QuantizationSimModel", "inside functions"),
        ("backends/aimet", "if TYPE_CHECKING:\n    pass\nelse:\n    import aimet_torch", "inside functions"),
        ("backends/aimet", "class Lazy:\n    import aimet_torch", "inside functions"),
        ("methods/adaround", "from pow2quant.backends import custom", "no concrete backend"),
        ("methods/adaround", "def f():\n    import pow2quant.backends.custom", "no concrete backend"),
        ("methods/adaround", "from pow2quant.backends import CustomSimulation", "no concrete backend"),
        ("cli", "from pow2quant.runs import run", "load no torch"),
        ("cli/ptq", "from pow2quant import models", "load no torch"),
        ("", "import torch", "load no torch"),
        ("backends/custom", "from .base import Simulation", "relative imports"),
        ("backends/custom", "from . import base", "relative imports"),
        ("runs", f"from {LINKS[1]}.base import Simulation", "imports as pow2quant"),
        ("utils", "", "pow2quant.utils is in no layer"),
    ],
)
def test_a_breach_is_reported(tree, path, text, expected):
    folder = Path(PACKAGE, path)
    is_package = folder.as_posix().replace("/", ".") in LAYERS
    root = tree({str(folder / "__init__.py" if is_package else folder.with_suffix(".py")): text})
    assert expected in "\n".join(breaches(root))
    assert f"pow2quant.{path}".rstrip(".").replace("/", ".") in breaches(root)[0]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(
    "line",
    ["import {}", "    from {}.base import x", ">>> import {}", "Say `from {} import y`.", "python -c 'import {}.z'"],
)
def test_the_import_of_a_link_is_reported(tmp_path, link, line):
    (tmp_path / "guide.md").write_text("A guide.\n" + line.format(link) + "\n", encoding="utf-8")
    assert link_imports(tmp_path) == ["guide.md:2"]


@pytest.mark.parametrize(
    "line",
    [
        "import pow2quant.{}",
        "Methods import {} never.",
        "from {} to validators",
        "import {}_of_ours",
        "from pow2quant import {}",
    ],
)
def test_prose_and_the_real_packages_are_no_import_of_a_link(tmp_path, line):
    (tmp_path / "guide.md").write_text(line.format("backends") + "\n", encoding="utf-8")
    assert link_imports(tmp_path) == []
