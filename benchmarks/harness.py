"""What the benchmarks share: the record of machine and versions, peak memory, ours and the peer in turns, the last line.

The last line that a benchmark prints is one JSON object:
    {"benchmark": NAME, "figures": {KEY: {"value": …, "ours": …, "peer": …, "unit": …}}, "machine": …, "versions": …}
"""

import ctypes
import ctypes.util
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

PACKAGES = ("fedsb", "torch", "numpy", "transformers", "peft", "flwr", "ray")
SAMPLING_SECONDS = 0.002  # between looks at the memory, where the kernel keeps no peak that can be reset
ROOT = Path(__file__).parents[1]


def figure(
    value: float | None, unit: str, ours: float | None = None, peer: float | None = None, **more: object
) -> dict[str, Any]:
    """One figure: `value` is what a target speaks of, `ours` and `peer` what it was made from, `more` what explains it."""
    return {"value": _short(value), "ours": _short(ours), "peer": _short(peer), "unit": unit, **more}


def report(benchmark: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the one JSON object that a benchmark ends with, on one line."""
    result = {"benchmark": benchmark, "figures": figures, "machine": machine(), "versions": versions()}
    print(json.dumps(result), flush=True)


def say(text: str) -> None:
    """A line for whoever watches; stdout stays clean for the result."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """The machine, and how busy it was."""
    import torch  # here, since what measures memory is to begin without it

    from fedsb.report.provenance import cpu_name

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache_bytes": last_level_cache(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "load": load,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter and are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0; 32 MiB where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def in_turns(runs: Mapping[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Call every run once to warm it up, then all of them in turns; what each returned, by name.

    In turns, because other work on the machine then slows all of them alike.
    """
    for run in runs.values():
        run()
    results: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            results[name].append(run())
    return results


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def child(module: str, *arguments: str, timeout: float = 3600.0) -> dict[str, Any]:
    """Run `python -m MODULE ARGUMENTS` in a process of its own; the JSON object of its last line."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def resident() -> int:
    """Resident bytes of this process, after freed memory was given back to the system."""
    gc.collect()
    library = ctypes.util.find_library("c")
    if sys.platform == "linux" and library:
        trim = getattr(ctypes.CDLL(library), "malloc_trim", None)  # glibc only
        if trim:
            trim(0)
    return int(psutil.Process().memory_info().rss)


def peak_of_steps(step: Callable[[], object]) -> int:
    """Peak bytes of three calls beyond what is resident now, in this process."""
    with Peak() as peak:
        for _ in range(3):
            step()
    return peak.growth


def memory_of_rows(module: str, rows: Iterable[str], arguments: Sequence[str]) -> dict[str, float]:
    """Row → MB that `python -m MODULE ARGUMENTS --memory-of=ROW` needs beyond the model, in a process each."""
    found = {}
    for row in rows:
        found[row] = child(module, *arguments, f"--memory-of={row}")["bytes"] / 1e6
        say(f"{row:<16} {found[row]:8.0f} MB beyond the model")
    return found


def time_of_rows(steps: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Row → median seconds of its step, all rows in turns."""
    times = in_turns({row: functools.partial(seconds, step) for row, step in steps.items()}, turns)
    found = {row: median(values) for row, values in times.items()}
    for row, value in found.items():
        say(f"{row:<16} {value:8.3f} s per step, median of {turns}")
    return found


class Peak:
    """Context: the highest resident memory of this process within it, in `bytes`, and above its start, in `growth`.

    Linux keeps the peak itself (VmHWM, reset through /proc/self/clear_refs); elsewhere a thread looks every few
    milliseconds.
    """

    def __init__(self) -> None:
        self.start = self.bytes = 0
        self._seen = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def growth(self) -> int:
        """Bytes above what was there at the start."""
        return self.bytes - self.start

    def __enter__(self) -> Self:
        self.start = self._seen = resident()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is None:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.bytes = int(status["VmHWM"].split()[0]) << 10
        else:
            self._stop.set()
            self._thread.join()
            self.bytes = self._seen

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(SAMPLING_SECONDS):
            self._seen = max(self._seen, int(process.memory_info().rss))


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value
