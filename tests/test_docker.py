"""docker/: what can be checked without an engine. The build and a run are in docker/README.md."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
README = (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    if line
]
ARGUMENTS = dict(text.split("=", 1) for name, text in INSTRUCTIONS if name == "ARG")
FROM_CONTEXT = {
    source
    for name, text in INSTRUCTIONS
    if name == "COPY" and not text.startswith("--from")
    for source in text.split()[:-1]
}


def instructions(name: str) -> list[str]:
    return [text for instruction, text in INSTRUCTIONS if instruction == name]


def final_stage() -> list[str]:
    return DOCKERFILE.rpartition("\nFROM ")[2].splitlines()


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    result = subprocess.run([hadolint, str(ROOT / "docker" / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_context_is_what_is_copied_and_it_is_all_there():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == FROM_CONTEXT
    assert "**/__pycache__" in ignored
    assert [source for source in sorted(FROM_CONTEXT) if not (ROOT / source).exists()] == []


def test_the_package_builds_from_what_is_copied(tmp_path):
    """What setuptools reads of the checkout, README and license included, is in the context."""
    for source in FROM_CONTEXT:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list(tmp_path.glob("dist/*.whl"))) == 1


def test_versions_come_from_the_constraints_alone():
    installs = [text for text in instructions("RUN") if " install " in text]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in text and "==" not in text for text in installs)
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python = re.fullmatch(r"python:(3\.\d+)-slim-\w+", ARGUMENTS["BASE"])
    assert python
    assert f'"Programming Language :: Python :: {python[1]}"' in pyproject
    for extra in re.findall(r"EXTRAS=(\w+)", README):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE)


def test_the_final_image_installs_nothing_and_is_not_root():
    stage = final_stage()
    assert not re.search(r"\b(pip|apt-get|apt)\b", "\n".join(stage))
    assert instructions("USER") == ["1000:1000"]
    assert stage[-2:] == ["WORKDIR /data", 'ENTRYPOINT ["pow2quant"]']


def test_compose_builds_and_runs_the_same_image():
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert services.keys() == {"pow2quant", "cuda"}
    for service in services.values():
        folder = (ROOT / "docker" / service["build"]["context"]).resolve()
        assert folder == ROOT
        assert (folder / service["build"]["dockerfile"]).is_file()
        assert service["build"].get("args", {}).keys() <= ARGUMENTS.keys()
        assert (service["network_mode"], service["volumes"]) == ("none", ["${PWD}:/data"])


def test_readme_names_every_build_argument_with_its_default():
    for name, default in ARGUMENTS.items():
        assert f"| `{name}` | {f'`{default}`' if default else 'none'} |" in README


def test_the_commands_in_readme_are_those_of_the_command_line():
    """docker's own options are docker's; what follows the image's name is parsed by pow2quant, except that it runs."""
    from pow2quant.cli import main

    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    calls = [line[line.index("pow2quant") + 1 :] for line in lines if "run" in line]
    assert len(calls) == 3
    for call in calls:
        assert main([*call, "--help"]) == 0
    for target in (line[1] for line in lines if line[0] == "make"):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
