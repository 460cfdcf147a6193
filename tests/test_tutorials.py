"""Each tutorial is run as it stands: its `bash` blocks in one shell, and what a `text` block shows must be what the block
before it prints, but for what no two machines agree on. Blocks of other kinds (`console`) need what a test has not, such as
Docker, and are not run."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "=== block "
SECONDS = 900


def blocks(page: str) -> Iterator[tuple[str, list[str]]]:
    """Each `bash` block, with the lines of the `text` blocks that follow it."""
    script, shown = "", list[str]()
    for kind, content in BLOCK.findall(page):
        if kind == "bash":
            if script:
                yield script, shown
            script, shown = content, []
        elif kind == "text":
            shown += content.splitlines()
    yield script, shown


def plain(line: str) -> str:
    """A line without what differs from run to run: fingerprints, times, numbers with a point, the width of cells. Whole numbers
    (of parameters, rounds, rows) stay."""
    line = re.sub(r"\b[0-9a-f]{12}\b", "HASH", line)
    line = re.sub(r"\b(?:\d+ h \d+ min|\d+ min \d+ s|\d+\.\d s)\b", "TIME", line)
    line = re.sub(r"\d+\.\d+(?:e[+-]?\d+)?", "#", line)
    return " ".join(line.split())


@pytest.fixture
def clone() -> Iterator[Path]:
    """A folder with what a clone has that tutorials name; with a short path, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="tutorial-") as folder:
        (Path(folder) / "configs").symlink_to(ROOT / "configs")
        yield Path(folder)


@pytest.mark.tutorials
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_does_what_it_says(path: Path, clone: Path) -> None:
    found = list(blocks(path.read_text()))
    parts = [f"echo '{MARK}{number}'\n{script}" for number, (script, _) in enumerate(found)]
    script = "set -euo pipefail\nset -m\n" + "\n".join(parts)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }
    out = clone / "printed"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the suite in the background
    with out.open("w") as file:
        try:
            process = subprocess.Popen(
                ["bash", "-c", script], cwd=clone, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            code = process.wait(SECONDS)
        finally:
            _end_what_is_left(process, clone)
    printed = out.read_text()
    assert code == 0, printed[-4000:]
    for number, (_, shown) in enumerate(found):
        part = printed.split(f"{MARK}{number}\n")[1].split(MARK)[0]
        lines = [plain(line) for line in part.splitlines()]
        for line in shown:
            assert any(plain(line) in each for each in lines), f"{line!r} is not in\n{part}"


def _end_what_is_left(process: subprocess.Popen[bytes], clone: Path) -> None:
    """End the shell and, where a tutorial stopped before its own end, what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if (clone / "federation").exists():
        subprocess.run([sys.executable, "-m", "fedsb.cli.main", "down"], cwd=clone, capture_output=True, check=False)


def test_they_lead_from_one_to_the_next_and_the_readme_names_the_first() -> None:
    text = {path.name: path.read_text() for path in TUTORIALS}
    name, seen = "first-federation.md", list[str]()
    while name:
        seen.append(name)
        following = re.search(r"^Next: \[.*\]\((.*)\)\.$", text[name], re.MULTILINE)
        name = following[1] if following else ""
    assert sorted(seen) == sorted(text)
    assert "docs/tutorials/first-federation.md" in (ROOT / "README.md").read_text()
