"""AIMET's own tests of `QuantizationSimModel`, unchanged, on AIMET and on the drop-in: which of them pass, and why not.

    python benchmarks/aimet_tests.py CHECKOUT [--backend none custom aimet] [--tests FILE ...] [--output results.json]

CHECKOUT is a checkout of AIMET's public repository, of October 2024 or newer. Only imports are redirected, through
`sys.modules`: `aimet_torch.quantsim` and its older names have our `QuantizationSimModel` (on `aimet` the class of what
`backend="aimet"` makes), and what aimet-torch has moved since is found where it is now.
`none` is plain AIMET, the baseline: tests that it does not pass here are left out.
Each backend runs in a process of its own. Needs aimet-torch and pytest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

FOLDER = "TrainingExtensions/torch/test/python"
TESTS = (
    "v2/quantsim/test_quantsim.py",
    "v2/quantsim/test_config_utils.py",
    "v2/ab_test/test_quantsim_config_.py",
    "v2/ab_test/test_quantsim_export.py",
    "v2/ab_test/test_quantsim_logits.py",
    "v2/ab_test/test_quantsim_qat.py",
    "v2/ab_test/test_quantsim_transformers_.py",
)
MOVED = {
    "aimet_torch.v1": "aimet_torch",
    "aimet_torch.v1.quantsim": "aimet_torch.quantsim",
    "aimet_torch.v1.qc_quantize_op": "aimet_torch.quantsim",
    "aimet_torch.v1.nn": "aimet_torch.nn",
    "aimet_torch.v1.nn.modules": "aimet_torch.nn.modules",
    "aimet_torch.v1.nn.modules.custom": "aimet_torch.nn.modules.custom",
    "aimet_torch.transformers": "aimet_torch",
    "aimet_torch.transformers.activation": "aimet_torch.nn",
    "aimet_torch.transformers.utils": "aimet_torch.utils",
}
"""Modules that the tests of 2024 import, and where aimet-torch 2.42 has most of their content."""

ELSEWHERE = ("aimet_torch.common.defs", "aimet_torch.onnx_utils", "aimet_torch.utils", "aimet_torch.common.utils")
"""Where single names went."""

REDUCED = ("aimet_torch.utils", "aimet_torch.onnx_utils", "aimet_torch.v2.nn.fake_quant._legacy_impl")
"""Modules that have lost names."""

REPLACED = (
    "aimet_torch.quantsim",
    "aimet_torch.quantsim.quantsim",
    "aimet_torch.v2.quantsim",
    "aimet_torch.v1.quantsim",
)
"""The modules in which a user finds `QuantizationSimModel`."""


elsewhere: list[ModuleType] = []


class _Empty(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Gone(metaclass=_Empty):
    """A name that aimet-torch has no more. A test that needs it fails on AIMET itself, and is not compared."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class Redirected(ModuleType):
    """A module with some names replaced; all others are those of the module that it stands for."""

    def __init__(self, name: str, source: ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update({key: value for key, value in vars(source).items() if key in ("__path__", "__spec__")})
        self.__dict__.update(replaced)
        self.__dict__["source"] = source

    def __getattr__(self, name: str) -> Any:
        for module in (self.source, *elsewhere):
            if hasattr(module, name):
                return getattr(module, name)
        if name.startswith("__"):
            raise AttributeError(name)
        return Gone


def redirect(backend: str) -> None:
    """Makes later imports find what has moved, and our class in place of AIMET's."""
    importlib.import_module("aimet_torch.v2")
    elsewhere.extend(map(importlib.import_module, ELSEWHERE))
    for old, new in MOVED.items():
        sys.modules[old] = Redirected(old, importlib.import_module(new), {})
    for name in REDUCED:
        sys.modules[name] = Redirected(name, importlib.import_module(name), {})
    for name in () if backend == "none" else REPLACED:
        source = sys.modules.get(name) or importlib.import_module(name)
        sys.modules[name] = Redirected(name, source, {"QuantizationSimModel": _ours(backend)})


def _ours(backend: str) -> type:
    from pow2quant import QuantizationSimModel

    if backend == "aimet":
        from pow2quant.backends.aimet.constrained import tools

        return tools()["QuantizationSimModel"]
    return QuantizationSimModel


def results(checkout: Path, backend: str, tests: list[str]) -> dict[str, str]:
    """By test: 'passed', or what went wrong in one line."""
    folder = checkout / FOLDER
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "log.xml"
        environment = os.environ | {
            "AIMET_TESTS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "aimet_tests",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
        ]
        options = ["--continue-on-collection-errors", "--timeout=120", f"--junit-xml={log}", "-c", os.devnull]
        run = [*command, *options, f"--rootdir={folder}", *tests]
        subprocess.run(run, cwd=folder, env=environment, check=False, stdout=subprocess.DEVNULL)
        return dict(map(_outcome, ElementTree.parse(log).iter("testcase")))


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    name = ".".join(filter(None, (case.get("classname"), case.get("name"))))
    for problem in ("failure", "error", "skipped"):
        found = case.find(problem)
        if found is not None:
            return name, f"{problem}: {' '.join((found.get('message') or '').split())[:300]}"
    return name, "passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument(
        "--backend", nargs="+", default=["none", "custom", "aimet"], choices=["none", "custom", "aimet"]
    )
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = {backend: results(options.checkout, backend, options.tests) for backend in options.backend}
    baseline = found.get("none") or next(iter(found.values()))
    compared = [name for name, outcome in baseline.items() if outcome == "passed" or "none" not in found]
    print(f"{len(baseline)} tests, of which AIMET itself passes {len(compared)}")
    for backend in [b for b in options.backend if b != "none"]:
        missed = {name: found[backend].get(name, "not collected") for name in compared}
        missed = {name: outcome for name, outcome in missed.items() if outcome != "passed"}
        passed = len(compared) - len(missed)
        print(f"\n## {backend}: {passed} of {len(compared)} ({passed / max(1, len(compared)):.0%})")
        for name, outcome in missed.items():
            print(f"- {name}: {outcome}")
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
elif "AIMET_TESTS_BACKEND" in os.environ:  # loaded by pytest as a plugin
    redirect(os.environ["AIMET_TESTS_BACKEND"])
