"""What is installed here with pow2quant, as CycloneDX 1.6: `python scripts/sbom.py > sbom.json`."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

ROOT = "pow2quant"


def needed(name: str, found: dict[str, Distribution]) -> None:
    """Adds a distribution and what it requires, as far as it is installed; extras are left out."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return
    try:
        found[key] = distribution(name)
    except PackageNotFoundError:
        return
    for requirement in found[key].requires or ():
        if "extra ==" not in requirement:
            needed(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0], found)


def component(name: str, package: Distribution) -> dict[str, Any]:
    """One entry of the document."""
    reference = f"pkg:pypi/{name}@{package.version}"
    made = {"type": "library", "bom-ref": reference, "name": name, "version": package.version, "purl": reference}
    license_ = package.metadata.get("License-Expression") or package.metadata.get("License") or ""
    if license_ and "\n" not in license_ and len(license_) < 100:
        made["licenses"] = [{"license": {"name": license_}}]  # type: ignore[assignment]
    return made


def document() -> dict[str, Any]:
    """The whole document; equal installations give equal ones."""
    found: dict[str, Distribution] = {}
    needed(ROOT, found)
    own = component(ROOT, found.pop(ROOT))
    components = [component(name, package) for name, package in sorted(found.items())]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own | {"type": "application"}},
        "components": components,
    }


if __name__ == "__main__":
    json.dump(document(), sys.stdout, indent=1)
    print()
