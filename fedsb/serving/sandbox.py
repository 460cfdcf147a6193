"""Where generated programs run, and nowhere else: Bubblewrap (`bwrap`), with limits on time, memory, files and processes.

A program sees /usr, read-only, and a folder /work of its own in memory that is gone afterwards: no home, no data, no environment,
no network, no other process, no capability, no name spaces of its own (`fedsb.serving.syscalls`); root's guest is somebody whom
the machine does not know. It can still read what /usr holds, and shares the kernel: against a fault in that only a machine of its
own helps.
"""

import functools
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedsb.errors import SandboxError
from fedsb.serving.syscalls import seccomp_filter

MIB = 1 << 20
SECONDS = 15.0  # of wall time, compiling included
MEMORY = 1024 * MIB  # of all its processes together, and of the data of each
DISK = 256 * MIB  # of /work, and of a file: a compiler of Go keeps its library there
PROCESSES = 64  # and threads
FILES = 256  # open at a time
POLL = 0.02  # seconds between looks at its memory
GUESTS = 1 << 30  # as root: user ids from here on, one for each program, since limits on processes count by user
OUTPUT = 1 << 16  # bytes of the end of what it said that are looked at
SHOWN = ("/etc/alternatives", "/etc/ld.so.cache", *map(str, sorted(Path("/etc").glob("java-*-openjdk"))))


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit status, or why it was ended; and the end of what it wrote to stdout."""

    status: int | None
    ended: str
    output: str


def run(files: dict[str, str], command: Sequence[str], binds: Sequence[str] = (), seconds: float = SECONDS) -> Outcome:
    """Run a command in a sandbox, in a folder with these files (name → text).

    Args:
        binds: folders outside /usr that it may read, such as a compiler's.
        seconds: wall time after which it is ended.

    Raises SandboxError if no sandbox can be made here; then nothing has run.
    """
    require_sandbox()
    return _run(files, command, binds, seconds)


@functools.cache
def require_sandbox() -> None:
    """Raise SandboxError unless programs can be shut in here."""
    if shutil.which("bwrap") is None:
        raise SandboxError("generated code runs in a sandbox only, and there is none; apt install bubblewrap")
    outcome = _run({}, ["true"], (), SECONDS)
    if outcome.status != 0:
        said = " ".join(outcome.output.split()) or outcome.ended or f"status {outcome.status}"
        raise SandboxError(
            f"generated code runs in a sandbox only, and bwrap cannot make one here ({said}); allow user namespaces, or score "
            "code on another machine"
        )


def _run(files: dict[str, str], command: Sequence[str], binds: Sequence[str], seconds: float) -> Outcome:
    with tempfile.TemporaryFile() as said, tempfile.TemporaryDirectory(prefix="fedsb-sandbox-") as folder:
        opened = []
        try:
            for number, content in enumerate((seccomp_filter(), *(text.encode() for text in files.values()))):
                path = Path(folder) / str(number)
                path.write_bytes(content)
                opened.append(os.open(path, os.O_RDONLY))
            told = ["--seccomp", str(opened[0])]
            told += [item for fd, name in zip(opened[1:], files, strict=True) for item in ("--file", str(fd), f"/work/{name}")]
            process = subprocess.Popen(
                [*_walls(binds), *told, "--chdir", "/work", "--remount-ro", "/", *_drop(), *_limits(), *command],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={"PATH": os.environ.get("PATH", "/usr/bin:/bin")},  # bwrap's own; what it starts has another
                pass_fds=opened,
                start_new_session=True,
            )
        finally:
            for fd in opened:
                os.close(fd)
        ended = _watched(process, seconds)
        said.seek(max(0, said.seek(0, os.SEEK_END) - OUTPUT))
        return Outcome(None if ended else process.returncode, ended, said.read().decode(errors="replace"))


def _walls(binds: Sequence[str]) -> list[str]:
    apart = ["ipc", "pid", "net", "uts", *([] if os.geteuid() == 0 else ["user"])]
    walls = ["bwrap", *(f"--unshare-{what}" for what in apart), "--unshare-cgroup-try", "--die-with-parent", "--new-session"]
    walls += ["--clearenv", "--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin", "--setenv", "HOME", "/work"]
    walls += ["--setenv", "TMPDIR", "/work", "--setenv", "LANG", "C.UTF-8"]
    walls += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64", "sbin"):  # where these are no links into /usr, they are folders of their own
        link = Path("/") / name
        walls += ["--symlink", f"usr/{name}", str(link)] if link.is_symlink() else ["--ro-bind-try", str(link), str(link)]
    for path in map(Path, (*SHOWN, *binds)):
        if path.exists() and not path.is_relative_to("/usr"):
            above = [str(parent) for parent in reversed(path.parents)][1:]
            walls += [item for parent in above for item in ("--perms", "0755", "--dir", parent)]  # or nobody could pass
            walls += ["--ro-bind", str(path), str(path)]
    walls += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    return [*walls, "--perms", "1777", "--size", str(DISK), "--tmpfs", "/work"]


def _drop() -> list[str]:
    """Let root's guest become somebody unknown, so that limits on processes hold; anybody else's has a name space of users."""
    if os.geteuid() != 0:
        return ["--cap-drop", "ALL", "--"]
    needed = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
    kept = ["--cap-drop", "ALL", *(item for name in needed for item in ("--cap-add", name)), "--"]
    guest = GUESTS + secrets.randbelow(GUESTS)
    return [*kept, "setpriv", f"--reuid={guest}", f"--regid={guest}", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]


def _limits() -> list[str]:
    return ["prlimit", f"--nproc={PROCESSES}", f"--data={MEMORY}", f"--fsize={DISK}", f"--nofile={FILES}", "--core=0"]


def _watched(process: "subprocess.Popen[bytes]", seconds: float) -> str:
    """Wait for the end; "" or why it was brought about. With bwrap all that it started ends."""
    deadline, ended = time.monotonic() + seconds, ""
    while not ended:
        try:
            process.wait(POLL)
            break
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                ended = "took too long"
            elif _memory(process.pid) > MEMORY:
                ended = "took too much memory"
    if ended:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return ended


def _memory(pid: int) -> int:
    """Bytes that a process and all below it hold; what several hold together counts once, if that matters."""
    try:
        family = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    total = sum(map(_resident, family))
    return total if total <= MEMORY else sum(map(_share, family))  # which takes longer to find out


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has ended
        return 0


def _share(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.AccessDenied:
        return _resident(process)
    except psutil.Error:
        return 0
