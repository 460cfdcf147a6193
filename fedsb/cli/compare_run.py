"""One run of a comparison, in a process of its own, so that the memory it takes is its own.

The process is `python -m fedsb.cli.compare_run FOLDER`, with the configuration as JSON at its standard input.
"""

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsb.cli.simulate import simulated
from fedsb.config import RunConfig
from fedsb.errors import FederationError, FedsbError
from fedsb.store.files import read_json
from server.run_folder import at_work

MISTAKE, FAILED, STOPPED = 2, 3, 130  # exit codes
DONE = "data"  # what only the summary of a finished run has


def run_apart(config: RunConfig, folder: Path, hear: Callable[[str], None] = print) -> dict[str, Any]:
    """Run a federation, or what is left of it, in a process of its own; returns its summary.json. A finished one is not repeated.
    `hear` gets each line that it prints.

    Raises FederationError if it ends without a result, FedsbError for whatever else is wrong with it; on KeyboardInterrupt
    the process is interrupted too, and waited for.
    """
    if (folder / "summary.json").exists() and DONE in (summary := read_json(folder / "summary.json")):
        return summary
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "fedsb.cli.compare_run", str(folder)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        child = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
        assert child.stdin and child.stdout
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:  # one that ends at once says why
                child.stdin.write(config.to_json())
            for line in child.stdout:
                hear(line.rstrip("\n"))
            child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)  # which, in a session of its own, it has not got from the terminal
            child.wait()
            raise
        finally:
            child.stdout.close()
        errors.seek(0)
        said = errors.read()
    if child.returncode == 0:
        return read_json(folder / "summary.json")
    if child.returncode in (MISTAKE, FAILED):
        raise (FederationError if child.returncode == FAILED else FedsbError)(said.strip().splitlines()[-1])
    sys.stderr.write(said)
    raise FedsbError(f"{folder}: its process ended with exit code {child.returncode}; the same command goes on with it")


def run_here(config: RunConfig, folder: Path) -> None:
    """What that process does. Before its first checkpoint a run begins anew: what it has moved by then is counted nowhere."""
    if folder.exists() and not any(folder.glob("checkpoints/round-*")) and not at_work(folder):
        shutil.rmtree(folder)
    progress = "none" if config.runtime.progress == "none" else "lines"
    runtime = config.runtime.model_copy(update={"progress": progress})
    simulated(config.model_copy(update={"runtime": runtime}), folder, resume=True)


def main() -> None:
    """Entry point of that process."""
    try:
        run_here(RunConfig.from_json(sys.stdin.read()), Path(sys.argv[1]))
    except FedsbError as error:
        print(error, file=sys.stderr)
        sys.exit(FAILED if isinstance(error, FederationError) else MISTAKE)
    except KeyboardInterrupt:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
