"""Measures the accessibility of built pages with Lighthouse: `python scripts/accessibility.py FOLDER PAGE.html …`.

Prints the score of every page, 1,400 and 390 pixels wide, light and dark, and what fails. Exit status 1 below 95 or
with a contrast error. `--pictures OUT` keeps a screenshot of each. It needs npm, which fetches Lighthouse, and Chromium
(CHROME_PATH says where).
"""

from __future__ import annotations

import argparse
import base64
import functools
import itertools
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
WIDTHS = {1400: ("--preset=desktop", "--screenEmulation.height=900"), 390: ("--screenEmulation.height=844",)}
"""Of the window in pixels: how Lighthouse emulates it, besides its width."""


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, format: str, *values: Any) -> None: ...


def measured(address: str, scheme: str, width: int) -> dict[str, Any]:
    """Lighthouse's report of a page."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        flags = f"--headless=new --no-sandbox --blink-settings=preferredColorScheme={SCHEMES[scheme]}"
        command = ["npx", "--yes", LIGHTHOUSE, address, "--only-categories=accessibility", "--quiet", *WIDTHS[width]]
        command += [f"--screenEmulation.width={width}", "--screenEmulation.deviceScaleFactor=1"]
        subprocess.run([*command, "--output=json", f"--output-path={output}", f"--chrome-flags={flags}"], check=True)
        report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return report


def kept(report: dict[str, Any], path: Path) -> None:
    """Writes the screenshot of a report."""
    picture = report["fullPageScreenshot"]["screenshot"]["data"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(picture.partition(",")[2]))


def main(folder: str, pages: list[str], pictures: Path | None) -> int:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    failed = False
    for page, width, scheme in itertools.product(pages, WIDTHS, SCHEMES):
        report = measured(f"http://127.0.0.1:{server.server_port}/{page}", scheme, width)
        score = round(100 * report["categories"]["accessibility"]["score"])
        wrong = [name for name, audit in report["audits"].items() if audit["score"] == 0]
        failed |= score < LEAST or "color-contrast" in wrong
        print(f"{score:3} {width:4} {scheme:5} {page} {' '.join(wrong)}".rstrip(), flush=True)
        if pictures:
            kept(report, pictures / f"{page.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.webp")
    server.shutdown()
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the built pages")
    parser.add_argument("pages", nargs="+", metavar="PAGE", help="relative to the folder")
    parser.add_argument("--pictures", type=Path, metavar="OUT", help="folder for screenshots")
    options = parser.parse_args()
    sys.exit(main(options.folder, options.pages, options.pictures))
