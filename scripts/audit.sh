#!/bin/sh
# Known vulnerabilities of what constraints.txt pins. Without pip-audit or a network it says so and succeeds.
set -u
cd "$(dirname "$0")/.." || exit 1
tool=$(command -v "${BIN:-.venv/bin}/pip-audit" || command -v pip-audit) || {
    echo "audit: left out: no pip-audit (pip install pip-audit)"
    exit 0
}
out=$("$tool" --disable-pip --no-deps --requirement constraints.txt --progress-spinner off 2>&1) && {
    echo "audit: no known vulnerability"
    exit 0
}
if printf '%s' "$out" | grep -Eqi 'connection|resolve|timed out|unreachable|proxy|temporary failure|ServiceError'; then
    echo "audit: left out: no network"
    exit 0
fi
printf '%s\n' "$out"
exit 1
