"""scripts/create_env.sh: what it refuses, what it calls, and, on request, environments that it really makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "create_env.sh"
BASH = shutil.which("bash")
TOOLS = ("conda", "mamba", "micromamba")

# Writes down how it is called; knows the one environment that KNOWN names; fails at what FAIL names.
STAND_IN = """#!{bash}
case "$*" in
    --version) echo 0.0 ;;
    "env list") printf '# conda environments:\\n#\\nbase  *  /opt/base\\n%s  /opt/envs/it\\n' "${{KNOWN:-}}" ;;
    *)
        printf '%s %s\\n' "${{0##*/}}" "$*" >>"$CALLS"
        case "$*" in *"${{FAIL:-nothing fails}}"*) exit 7 ;; esac
        ;;
esac
"""

pytestmark = pytest.mark.skipif(BASH is None, reason="the script needs bash")


class Machine:
    """A PATH on which nothing is installed but what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.log = folder / "bin", folder / "calls"
        self.bin.mkdir()
        for program in ("dirname", "mktemp", "rm", "cat"):
            found = shutil.which(program)
            assert found, program
            (self.bin / program).symlink_to(found)

    def add(self, *tools: str) -> None:
        for tool in tools:
            (self.bin / tool).write_text(STAND_IN.format(bash=BASH), encoding="utf-8")
            (self.bin / tool).chmod(0o755)

    def create_env(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "CALLS": str(self.log), **variables}
        return subprocess.run(
            [str(BASH), str(SCRIPT), *arguments], cwd="/", env=environment, capture_output=True, text=True, timeout=60
        )

    @property
    def calls(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_help_names_every_flag_and_tool(machine):
    result = machine.create_env("--help")
    assert (result.returncode, result.stderr, machine.calls) == (0, "", [])
    for word in ("--tool", "--name", "--cpu", "--no-aimet", "--dry-run", "--help", *TOOLS, "uv", "venv"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu"], "unknown argument --gpu; legal are --tool"),
        (["env"], "unknown argument env"),
        (["--tool"], "--tool needs a value"),
        (["--name", "--cpu"], "--name needs a value"),
        (["--tool", "poetry"], "unknown tool poetry; legal are conda, mamba, micromamba, uv, venv"),
        (["--tool", "mamba"], "mamba is not installed"),
        (["--tool", "venv", "--name", "tests"], "tests exists and is no complete environment of Python 3.10 to 3.13"),
        (["--tool", "venv", "--name", "pow2quant"], "pow2quant exists and is no complete environment"),  # the package
    ],
)
def test_a_bad_argument_is_one_line_and_exit_status_2(machine, arguments, message):
    machine.add("conda")
    result = machine.create_env(*arguments)
    assert (result.returncode, machine.calls) == (2, [])
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_venv_without_a_suitable_python_is_one_line_and_exit_status_2(machine):
    result = machine.create_env("--name", "none-such")
    assert result.returncode == 2
    assert result.stderr == "create_env.sh: venv needs Python 3.10 to 3.13 on the PATH; uv would fetch one\n"


def test_an_environment_that_was_interrupted_is_not_taken_for_one(machine, tmp_path):
    venv.create(tmp_path / "env")
    dry = ("--tool", "venv", "--dry-run", "--name", str(tmp_path / "env"))
    assert machine.create_env(*dry).returncode == 0
    (tmp_path / "env" / "bin" / "activate").unlink()
    assert "is no complete environment" in machine.create_env(*dry).stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("complete", [True, False])
def test_make_takes_a_complete_environment_for_its_own(tmp_path, complete):
    for source in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / source, tmp_path)
    venv.create(tmp_path / ".venv")
    if not complete:
        (tmp_path / ".venv" / "bin" / "activate").unlink()
    line = ["make", "--no-print-directory", "--dry-run", "demo"]
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(line, cwd=tmp_path, env=outside, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ("-m venv" in result.stdout) is not complete
    assert "install" in result.stdout
    assert any("pow2quant ptq" in line for line in result.stdout.splitlines()[-3:])


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        (["uv", "micromamba", "mamba", "conda"], "conda"),
        (["uv", "micromamba", "mamba"], "mamba"),
        (["uv", "micromamba"], "micromamba"),
        (["uv"], "uv"),
        ([], "venv"),
    ],
)
def test_the_first_tool_that_works_is_chosen_and_a_dry_run_calls_nothing(machine, installed, chosen):
    machine.add(*installed)
    (machine.bin / "python3").symlink_to(sys.executable)
    broken = next((tool for tool in TOOLS if tool not in installed), None)
    if broken:  # as a version manager leaves behind: on the PATH, but unable to run
        (machine.bin / broken).write_text(f"#!{BASH}\nexit 127\n", encoding="utf-8")
        (machine.bin / broken).chmod(0o755)
    result = machine.create_env("--dry-run", "--name", "none-such")
    assert (result.returncode, result.stderr, machine.calls) == (0, "", [])
    assert not (ROOT / "none-such").exists()
    first = {"uv": "+ uv venv --seed", "venv": "+ python3 -m venv"}.get(chosen, f"+ {chosen} create --yes")
    assert result.stdout.startswith(first)
    last = result.stdout.splitlines()[-1]
    assert last == (f"{chosen} activate none-such" if chosen in TOOLS else f"source {ROOT}/none-such/bin/activate")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("known", [False, True], ids=["new", "existing"])
def test_the_calls_to_conda_not_its_solving(machine, tool, known):
    machine.add(tool)
    result = machine.create_env("--tool", tool, "--name", "it", KNOWN="it" if known else "item")
    assert (result.returncode, result.stderr) == (0, "")
    inside = f"{tool} run {'--no-capture-output ' if tool == 'conda' else ''}--name it"
    *calls, smoke = machine.calls
    assert calls == [
        f"{tool} {'install' if known else 'create'} --yes --name it --override-channels"
        " --channel conda-forge python=3.12 pip",
        f"{inside} python -m pip install --disable-pip-version-check --constraint constraints.txt --editable .[aimet]",
        f"{inside} python -c import aimet_torch",
    ]
    assert smoke.startswith(f"{inside} pow2quant ptq --output ")
    assert result.stdout.endswith(f"To enter it:\n{tool} activate it\n")
    assert not Path(smoke.split()[-1]).parent.exists()


def test_the_calls_to_conda_not_its_solving_with_cpu_and_without_aimet(machine):
    machine.add("conda")
    assert machine.create_env("--cpu", "--no-aimet").returncode == 0
    _, uv, install, smoke = machine.calls
    inside = "conda run --no-capture-output --name pow2quant"
    assert uv == f"{inside} python -m pip install --disable-pip-version-check uv"
    assert install == (
        f"{inside} uv pip install --compile-bytecode --system --torch-backend cpu --reinstall-package torch"
        " --reinstall-package torchvision --constraint constraints.txt --editable ."
    )
    assert "ptq" in smoke


@pytest.mark.parametrize("step", ["create", "pip", "aimet_torch", "ptq"])
def test_a_step_that_fails_is_the_last_call_and_its_status_is_the_scripts(machine, step):
    machine.add("conda")
    result = machine.create_env(FAIL=step)
    assert result.returncode == 7
    assert step in machine.calls[-1]
    assert "activate" not in result.stdout


def test_environment_yml_and_requirements_install_the_pinned_checkout():
    import yaml

    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == "pow2quant"
    assert environment["dependencies"][-1] == {"pip": ["--requirement requirements.txt"]}
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in requirements if not line.startswith("#")] == [
        "--constraint constraints.txt",
        "--editable .[aimet]",
    ]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    bats = ROOT / "tests" / "create_env.bats"
    result = subprocess.run(["shellcheck", str(SCRIPT), str(bats)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(shutil.which("bats") is None, reason="bats is not installed")
def test_bats_finds_the_calls_as_they_should_be():
    result = subprocess.run(["bats", str(ROOT / "tests" / "create_env.bats")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not os.environ.get("POW2QUANT_SLOW"), reason="installs gigabytes; POW2QUANT_SLOW=1 runs it")
@pytest.mark.parametrize("tool", ["uv", "venv"])
def test_an_environment_is_made_and_made_again(tmp_path, tool):
    if shutil.which(tool) is None and tool == "uv":
        pytest.skip("uv is not installed")
    folder = tmp_path / "an environment"
    for _ in range(2):  # the second run updates
        result = subprocess.run(
            [str(SCRIPT), "--tool", tool, "--name", str(folder)], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "verdict: 0 of " in result.stdout
    script = '. "$0/bin/activate" && cd / && pow2quant list'
    assert subprocess.run([str(BASH), "-c", script, str(folder)], capture_output=True, text=True).returncode == 0
