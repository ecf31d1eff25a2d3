"""What is said of dependencies and releases: the audit's verdict, and who may sign and upload."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import audit  # noqa: E402

SOUND = {"name": "numpy", "version": "2.0", "vulns": []}
UNKNOWN = {"name": "scipy", "skip_reason": "Dependency not found on PyPI"}
BROKEN = {"name": "torch", "version": "2.0", "vulns": [{"id": "CVE-2026-1", "fix_versions": []}]}


@pytest.mark.parametrize(
    ("packages", "status", "words"),
    [
        ([SOUND], 0, "no known vulnerability in 1 packages"),
        ([SOUND, UNKNOWN], 0, "no known vulnerability in 1 packages; not known to the index: scipy"),
        ([UNKNOWN, UNKNOWN], 0, "left out: this index knows no advisories"),
        ([SOUND, BROKEN], 1, "torch 2.0: CVE-2026-1"),
        ([UNKNOWN, BROKEN], 1, "torch 2.0: CVE-2026-1"),
    ],
)
def test_what_was_not_audited_is_not_called_sound(packages: list[dict[str, Any]], status: int, words: str) -> None:
    assert audit.verdict(packages) == (status, words)


def test_a_release_is_signed_and_needs_no_password() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    jobs, uses = yaml.safe_load(text)["jobs"], []
    for job in jobs.values():
        uses += [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]
        assert job["permissions"]["id-token"] == "write"
    assert {"actions/attest-build-provenance", "actions/attest-sbom", "pypa/gh-action-pypi-publish"} <= {*uses}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in text
    assert "password" not in str(jobs)
