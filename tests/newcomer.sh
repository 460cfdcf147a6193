#!/usr/bin/env bash
# A newcomer's walk through the README and the tutorials, each command as it stands there, on a machine that has Python and git.
#   tests/newcomer.sh           in a clone that it makes, and removes again
#   tests/newcomer.sh FOLDER    in a clone that is there
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -gt 0 ]; then
    cd "$1"
else
    clone=$(mktemp -d)
    trap 'rm -rf "$clone"' EXIT
    git clone --quiet "$here" "$clone/fedsb"
    cd "$clone/fedsb"
fi

make demo | tee demo.log
grep -q "^personal adapters: runs/demo/adapters" demo.log
PYTHONPATH=. .venv/bin/python - demo.log README.md <<'END'
"""What the README shows of the demo is what the demo printed, and the clients have learned."""
import re
import sys

from tests.test_tutorials import plain

printed, readme = (open(path, encoding="utf-8").read() for path in sys.argv[1:])
lines = {plain(line) for line in printed.splitlines()}
shown = readme.split("The demo prints\n\n```\n")[1].split("```")[0].splitlines()
if missing := [line for line in shown if line != "…" and plain(line) not in lines]:
    sys.exit(f"the README shows what the demo did not print: {missing}")
mean = next(line for line in printed.splitlines() if line.startswith("│ mean"))
base, _, match, *_ = map(float, re.findall(r"\d\.\d+", mean))
if match < base + 0.3:
    sys.exit(f"the demo did not learn: {base} before, {match} after")
END
rm demo.log

. .venv/bin/activate
fedsb report runs/demo
fedsb evaluate runs/demo
fedsb export runs/demo --all --out runs/demo-exported
fedsb privacy plan configs/private.toml
fedsb doctor
make test-tutorials
