"""The command line beside its commands: recipes, methods with parameters, budgets, errors as JSON, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pow2quant.cli import main
from pow2quant.plugins import TABLES

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml"))
SHORT = ["--max-calibration-batches", "1", "--max-eval-batches", "1", "--quiet"]


def test_a_recipe_is_a_configuration_that_flags_override(tmp_path: Path) -> None:
    quick = ["--output", str(tmp_path / "run"), *SHORT, "--activation-bits", "6"]
    assert main(["ptq", "--recipe", "mcu_int8", *quick]) == 0
    said = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    recipe = yaml.safe_load((ROOT / "configs" / "recipes" / "mcu_int8.yaml").read_text())
    assert said["quantization"]["output"]["bitwidth"] == 6
    assert said["quantization"]["output"]["symmetric"] == recipe["quantization"]["output"]["symmetric"]


def test_a_method_s_parameters_stand_behind_its_name(tmp_path: Path) -> None:
    methods = ["--method", "none", "--method", "gpfq:conv_scalar=1.16,narrow=true"]
    assert main(["ptq", *methods, "--output", str(tmp_path / "run"), *SHORT]) == 0
    said = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["ptq"]["methods"]
    assert said[-1] == {"gpfq": {"conv_scalar": 1.16, "narrow": True}}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ptq", "--recipe", "mcu"], f"mcu is unknown; known: {', '.join(RECIPES)}"),
        (["ptq", "--recipe", "mcu_int8", "--config", "a.yaml"], "give one of them"),
        (["ptq", "--method", "gpfq:scalar=2"], "ptq.methods.gpfq.scalar: unknown key, did you mean"),
        (["ptq", "--method", "gpfq:"], "a list of NAME, NAME:parameter=value"),
        (["ptq", "--method", "gpfq:conv_scalar"], "a list of NAME, NAME:parameter=value"),
        (["ptq", "--method", "adarund:iterations=3"], "names: none, aciq, adaround"),
        (["ptq", "--budget", "3"], "is for --method auto"),
        (["ptq", "--weights", "nowhere.pt"], "nowhere.pt: cannot be read: no such file"),
        (["ptq", "--model"], "requires an argument"),
        (["nonsense"], "No such command"),
    ],
)
def test_an_error_is_one_line_and_with_json_a_document(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert not printed.out
    assert main([*arguments, "--json"]) == 2
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["exit_status"] == 2
    assert printed.err.endswith(f"error: {document['error']}\n")


@pytest.mark.parametrize(("command", "kind"), [("ptq", "methods"), ("ptq", "backends"), ("export", "exporters")])
def test_help_names_the_choices(command: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    words = "".join(character for character in capsys.readouterr().out if character.isalnum() or character in "-_.,")
    for name in TABLES[kind]:
        assert name in words, name


def test_a_shell_completes_commands() -> None:
    asked = {"_POW2QUANT_COMPLETE": "complete_bash", "COMP_WORDS": "pow2quant pt", "COMP_CWORD": "1"}
    code = "from pow2quant.cli import run; run()"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert found.stdout.split() == ["ptq"]


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["ptq", "--model", "nothing"], 2)])
def test_the_process_ends_at_once_but_prints_all_and_calls_what_waits_for_its_end(
    arguments: list[str], status: int
) -> None:
    code = (
        "import atexit\n"
        "class Module:\n    def __del__(self): print('freed')\n"
        "held = Module()\n"
        "atexit.register(print, 'the end')\n"
        "from pow2quant.cli import run\nrun()"
    )
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.split("\n")[-2:]) == (status, ["the end", ""])
    assert len(found.stderr.split("\n")) == (2 if status else 1)


def test_the_process_waits_for_threads_of_its_own() -> None:
    code = (
        "import threading, time\n"
        "def work():\n    time.sleep(0.5)\n    print('done')\n"
        "threading.Thread(target=work).start()\n"
        "from pow2quant.cli import run\nrun()"
    )
    found = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.split("\n")[-2:]) == (0, ["done", ""])
