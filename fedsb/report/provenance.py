"""What a result came out of: the code, the machine, and the memory that it took there."""

import hashlib
import os
import platform
import resource
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from fedsb.models import device_of

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedsb", "clients", "server", "strategies")


@lru_cache(maxsize=1)
def code() -> dict[str, Any]:
    """The code of this process: version, SHA-256 over the names and bytes of the packages' .py files, and in a git checkout its
    commit and whether the packages differ from it (elsewhere both None)."""
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    commit = _git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    changed = _git("status", "--porcelain", "--", *PACKAGES) if commit else None
    return {
        "version": version("fedsb"),
        "commit": commit,
        "dirty": None if changed is None else bool(changed),
        "sha256": digest.hexdigest(),
    }


def machine(device: str) -> dict[str, Any]:
    """The machine of this process; `device` as `runtime.device` has it."""
    chosen = device_of(device)
    gpu = torch.cuda.get_device_name() if chosen.type == "cuda" else None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": chosen.type,
        "gpu": gpu,
        "system": f"{platform.system()} {platform.release()}",
    }


def peak_memory() -> int:
    """The most memory that this process had resident so far, in bytes.

    Linux keeps it as VmHWM; what getrusage says there begins with the peak of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def _git(*arguments: str) -> str | None:
    """What git says; None without git, or where it refuses."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
