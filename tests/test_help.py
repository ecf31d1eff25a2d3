"""What the command line says of itself: help, versions, and lists of what there is."""

import json
import re
import sys
from pathlib import Path

import pytest

from pow2quant import __version__
from pow2quant.cli import main
from tests.commands import command


def test_list_names_everything_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    from pow2quant.plugins import TABLES

    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {kind: set(entries) for kind, entries in TABLES.items()} == {k: set(listed[k]) for k in TABLES}
    assert listed.keys() == {*TABLES, "targets"}
    assert all(text.endswith(".") or text.startswith("not ") for k in TABLES for text in listed[k].values())


def test_help_is_quick(tmp_path: Path) -> None:
    """Counted in modules, not in seconds, which depend on the machine."""
    out, _ = command("--help", cwd=tmp_path).communicate()
    for name in COMMANDS:
        assert name in out
    _, err = command("--help", cwd=tmp_path, python=["-X", "importtime"]).communicate()
    loaded = {line.rpartition("|")[2].strip() for line in err.splitlines()}
    assert "typer" in loaded
    assert len(loaded) < 500
    assert loaded.isdisjoint({"torch", "numpy", "onnx", "onnxruntime", "pydantic", "yaml", "jinja2"})


COMMANDS = ("ptq", "validate", "export", "report", "list")


IDLE = {"export", "report", "list"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_the_common_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Example: pow2quant {name}" in out
    for flag in ("--output", "--verbose", "--quiet", "--json"):
        assert re.search(rf"{flag}\b", out), flag
    for flag in ("--seed", "--device", "--config"):
        assert bool(re.search(rf"{flag}\b", out)) == (name not in IDLE), flag


def test_a_flag_without_effect_is_taken_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--seed", "3", "--device", "cpu"]) == 0
    assert "without effect here: --seed, --device" in capsys.readouterr().err
    assert main(["targets", "--device", "abacus"]) == 2


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_list_says_which_operations_have_integers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--operators", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row.pop("module"): row for row in found["modules"]}
    assert rows["torch.nn.Conv2d"] == {
        "in ONNX": "Conv", "integers": "yes", "claim": "proved", "what it computes": "PyTorch's"
    }  # fmt: skip
    assert (rows["GroupNorm"]["integers"], rows["GroupNorm"]["claim"]) == ("yes", "proved")
    assert (rows["LocalResponseNorm"]["integers"], rows["LocalResponseNorm"]["claim"]) == ("no", "observed")
    assert (rows["Div"]["integers"], rows["Div"]["claim"]) == ("yes", "proved")
    assert {"conv2d", "upsample_bilinear2d", "lstm"} <= set(found["operations"])


def test_list_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aimet_torch", None)
    assert main(["list", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"aimet +not installed: pip install 'pow2quant\[aimet\]'", out)
    assert "torchvision:NAME" in out
    assert "digits" in json.loads((tmp_path / "list.json").read_text())["datasets"]
