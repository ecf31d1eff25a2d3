"""Known vulnerabilities of what constraints.txt pins, by pip-audit: `python scripts/audit.py`.

Exit status 1 where there is one. Without a network, or where the index has no advisories, it says so and succeeds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PINS = Path(__file__).resolve().parents[1] / "constraints.txt"
FLAGS = ["--disable-pip", "--no-deps", "--progress-spinner=off", "--timeout=20", "--format=json"]
SECONDS = 300
AWAY = re.compile(r"connection|resolve|timed out|unreachable|proxy|temporary failure|serviceerror", re.IGNORECASE)


def audited() -> tuple[int, str]:
    """The exit status, and what to say."""
    if find_spec("pip_audit") is None:
        return 0, "left out: no pip-audit (pip install pip-audit)"
    command = [sys.executable, "-m", "pip_audit", *FLAGS, "--requirement", str(PINS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 0, f"left out: no answer in {SECONDS} s"
    try:
        return verdict(json.loads(done.stdout)["dependencies"])
    except (ValueError, KeyError, TypeError):
        if AWAY.search(done.stderr):
            return 0, "left out: no network"
        return 1, f"pip-audit ended with {done.returncode}: {done.stderr.strip()[-2000:]}"


def verdict(packages: list[dict[str, Any]]) -> tuple[int, str]:
    """Of pip-audit's document. What the index does not know has not been audited, and is not called sound."""
    found = [f"{p['name']} {p['version']}: {v['id']}" for p in packages for v in p.get("vulns", ())]
    if found:
        return 1, "\n".join(found)
    unknown = [p["name"] for p in packages if "skip_reason" in p]
    if len(unknown) == len(packages):
        return 0, "left out: this index knows no advisories"
    rest = f"; not known to the index: {', '.join(unknown)}" if unknown else ""
    return 0, f"no known vulnerability in {len(packages) - len(unknown)} packages{rest}"


if __name__ == "__main__":
    status, text = audited()
    print(f"audit: {text}")
    sys.exit(status)
