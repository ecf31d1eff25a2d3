"""Measures the accessibility of built pages with Lighthouse: `python scripts/accessibility.py FOLDER PAGE.html …`.

Prints the score of every page, light and dark, and what fails. Exit status 1 below 95, or with an error of contrast. It
needs npm, which fetches Lighthouse, and a Chromium (CHROME_PATH says where).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LIGHTHOUSE = "lighthouse@12"
LEAST = 95
SCHEMES = {"light": "1", "dark": "0"}
"""Chromium's preferredColorScheme."""


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, format: str, *values: Any) -> None: ...


def measured(address: str, scheme: str) -> dict[str, Any]:
    """Lighthouse's report of a page."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        flags = f"--headless=new --no-sandbox --blink-settings=preferredColorScheme={SCHEMES[scheme]}"
        command = ["npx", "--yes", LIGHTHOUSE, address, "--only-categories=accessibility", "--quiet"]
        subprocess.run([*command, "--output=json", f"--output-path={output}", f"--chrome-flags={flags}"], check=True)
        report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return report


def main(folder: str, *pages: str) -> int:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    failed = False
    for page in pages:
        for scheme in SCHEMES:
            report = measured(f"http://127.0.0.1:{server.server_port}/{page}", scheme)
            score = round(100 * report["categories"]["accessibility"]["score"])
            wrong = [name for name, audit in report["audits"].items() if audit["score"] == 0]
            failed |= score < LEAST or "color-contrast" in wrong
            print(f"{score:3} {scheme:5} {page} {' '.join(wrong)}".rstrip(), flush=True)
    server.shutdown()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
