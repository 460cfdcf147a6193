"""Programs that try to leave the sandbox, or to fill what is theirs; and that no program runs where there is no sandbox."""

import http.server
import os
import platform
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fedsb.errors import SandboxError
from fedsb.serving import sandbox
from fedsb.serving.languages import _tool
from fedsb.serving.sandbox import DISK, MEMORY, PROCESSES, Outcome, require_sandbox, run
from fedsb.serving.syscalls import CLONE, seccomp_filter

needed = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def python(program: str, seconds: float = 15.0) -> Outcome:
    tool = _tool("python3")
    assert tool is not None
    return run({"program.py": program}, [tool.binary, "-I", "program.py"], tool.folders, seconds)


@pytest.fixture
def listening() -> Iterator[int]:
    """The port of a server on this machine's loopback."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@needed
def test_it_runs_and_tells_how_it_ended() -> None:
    assert python("print('done')") == Outcome(0, "", "done\n")
    failed = python("raise SystemExit(7)")
    assert failed.status == 7 and not failed.ended
    assert "ZeroDivisionError" in python("1 / 0").output


# harmless even where it gets out: it overwrites nothing and ends nobody
LEAVE = """
import ctypes, os, socket
left = []

def tries(what):
    def decorated(function):
        try:
            found = function()
        except (OSError, ValueError):
            return
        if found is not None:
            left.append(f"{what}: {found!r}"[:200])
    return decorated

@tries("reads what the test keeps")
def _(): return open(SECRET).read()
@tries("sees its folder")
def _(): return os.listdir(os.path.dirname(SECRET))
@tries("reads the users")
def _(): return open("/etc/passwd").read()
@tries("reads a home")
def _(): return [name for name in os.listdir(HOME) if not name.startswith(".")] or None
@tries("has the environment")
def _(): return sorted(os.environ.keys() - {"PATH", "HOME", "TMPDIR", "LANG", "PWD", "LC_CTYPE", "OLDPWD", "SHLVL", "_"}) or None
@tries("sees another process")
def _(): return [pid for pid in os.listdir("/proc") if pid.isdigit() and SECRET in open(f"/proc/{pid}/cmdline").read()] or None
@tries("sees many processes")
def _(): return (n := len([pid for pid in os.listdir("/proc") if pid.isdigit()])) > 4 and n or None
@tries("kills its way out")
def _(): return os.kill(PARENT, 0) or "may send it signals"
@tries("calls the loopback")
def _(): return socket.create_connection(("127.0.0.1", PORT), 2) and "connected"
@tries("calls the world")
def _(): return socket.create_connection(("1.1.1.1", 53), 2) and "connected"
@tries("has a network")
def _(): return [name for _, name in socket.if_nameindex() if name != "lo"] or None
for place in ("/", "/usr", "/usr/bin", "/etc", "/dev", "/dev/shm", "/tmp", "/root", os.path.dirname(SECRET)):
    @tries(f"writes in {place}")
    def _(): return open(f"{place}/{NAME}", "x") and "written"
@tries("is root")
def _(): return 0 if os.getuid() == 0 or os.geteuid() == 0 else None
@tries("becomes root")
def _(): return os.setuid(0) or "root"
@tries("has a capability")
def _():
    held = [line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm", "CapBnd", "CapAmb"))]
    return held if any(int(each, 16) for each in held[:2]) else None
libc = ctypes.CDLL(None, use_errno=True)
@tries("mounts")
def _(): return os.mkdir(NAME) or libc.mount(b"none", NAME.encode(), b"tmpfs", 0, None) == 0 or None
def unshared(flags):
    # whether a child that asks for other name spaces gets them
    child = os.fork()
    if child == 0:
        os._exit(0 if libc.unshare(flags) == 0 else 1)
    return os.waitpid(child, 0)[1] == 0 or None
@tries("makes users of its own")
def _(): return unshared(0x10000000)
@tries("makes mounts of its own")
def _(): return unshared(0x10000000 | 0x20000)
@tries("clones itself into other name spaces")
def _():
    found = libc.syscall(CLONE, 0x10000000 | 17, 0, 0, 0, 0)
    if found == 0: os._exit(0)
    return found > 0 and (os.waitpid(found, 0), "child")[1] or None
@tries("keeps what no limit sees")
def _(): return os.memfd_create("hidden")
@tries("shares memory that no limit sees")
def _(): return libc.shmget(0, 1 << 20, 0o1600) >= 0 or None
@tries("makes a device")
def _(): return os.mknod("disk", 0o60666, os.makedev(8, 0)) or "made"
@tries("reads the kernel's memory")
def _(): return open("/proc/kcore", "rb").read(1)
@tries("uses a setuid program")
def _(): return "nonewprivs" if "NoNewPrivs:\\t1" not in open("/proc/self/status").read() else None
print("left:", left)
"""


@needed
def test_a_program_that_tries_to_leave_does_not(listening: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_SECRET", "a token")
    kept = tmp_path / "kept"
    kept.write_text("what nobody is to read")
    tmp_path.chmod(0o777)
    told = {
        "SECRET": str(kept),
        "HOME": str(Path.home()),
        "PARENT": os.getpid(),
        "PORT": listening,
        "CLONE": CLONE[platform.machine()],
        "NAME": f"fedsb-{secrets.token_hex(8)}",
    }
    outcome = python("".join(f"{name} = {value!r}\n" for name, value in told.items()) + LEAVE)
    assert outcome.output == "left: []\n" and outcome.status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"] and kept.read_text() == "what nobody is to read"
    socket.create_connection(("127.0.0.1", listening), 2).close()  # as whoever is outside can


STAY = """
import os, time
if os.fork() == 0:
    os.setsid()
    os.execv({0!r}, [{0!r}, "-c", "import time; time.sleep(60)", {1!r}])
"""
SHARE = f"""
import os, time
for _ in range(4):
    if os.fork() == 0:
        held = b"1" * {MEMORY // 3}
        time.sleep(60)
time.sleep(60)
"""
BOMB = """
import os, time
n = 0
try:
    while n < 1000:
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        n += 1
except OSError:
    print(n)
"""


@needed
def test_nothing_of_it_stays(tmp_path: Path) -> None:
    """Neither a process that has left its parent, when the program ends, nor one when it is ended."""
    marks = [f"stays-{secrets.token_hex(8)}" for _ in range(2)]
    tool = _tool("python3")
    assert tool is not None
    assert python(STAY.format(tool.binary, marks[0]) + "time.sleep(0.3)").status == 0
    assert python(STAY.format(tool.binary, marks[1]) + "time.sleep(60)", seconds=1.0).ended == "took too long"
    time.sleep(0.2)
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines for mark in marks if mark in line]


@needed
def test_time_is_limited() -> None:
    started = time.monotonic()
    assert python("while True: pass", seconds=1.0) == Outcome(None, "took too long", "")
    assert time.monotonic() - started < 5


@needed
def test_memory_is_limited_of_one_process_and_of_all() -> None:
    hog = python(f"bytearray({2 * MEMORY})")
    assert "MemoryError" in hog.output and hog.status == 1
    assert python(SHARE).ended == "took too much memory"


@needed
def test_what_several_processes_hold_together_counts_once() -> None:
    held = f"held = b'1' * {MEMORY // 3}\n"
    forks = "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        time.sleep(1)\n        os._exit(0)\n"
    assert python(held + forks + "for _ in range(4): os.wait()\nprint('done')") == Outcome(0, "", "done\n")


@needed
def test_files_are_limited() -> None:
    fill = f"with open('big', 'wb') as file:\n    for _ in range({2 * DISK >> 20}):\n        file.write(bytes(1 << 20))"
    assert python(fill).status not in (0, None)
    several = "import os\nfor i in range(1000):\n    open(f'{i}', 'wb').write(bytes(1 << 20))"
    found = python(several)
    assert found.status == 1 and "No space left" in found.output
    shouting = python("while True: print('x' * 10000)", seconds=10.0)
    assert shouting.ended or shouting.status != 0
    assert len(shouting.output) <= sandbox.OUTPUT


@needed
def test_processes_are_limited() -> None:
    found = python(BOMB)
    assert found.status == 0 and 0 < int(found.output) <= PROCESSES


@needed
def test_programs_at_the_same_time_have_limits_of_their_own() -> None:
    many = "import threading, time\nthreads = [threading.Thread(target=time.sleep, args=(1,)) for _ in range(40)]\n"
    many += "for thread in threads: thread.start()\nfor thread in threads: thread.join()\nprint('done')"
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(python, [many, many])) == [Outcome(0, "", "done\n")] * 2


@needed
def test_texts_are_utf_8_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    tool = _tool("python3")
    assert tool is not None
    found = run({"a.txt": "é"}, [tool.binary, "-c", "print(len(open('a.txt').read()), 'ü')"], tool.folders)
    assert found == Outcome(0, "", "1 ü\n")


def test_a_machine_whose_system_calls_are_not_known_has_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="and none is known for riscv64; use x86_64 or aarch64"):
        seccomp_filter()


def test_without_a_sandbox_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_sandbox.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="in a sandbox only, and there is none; apt install bubblewrap"):
        python("open('/tmp/ran', 'w')")
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'No permissions to create new namespace'; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    require_sandbox.cache_clear()
    with pytest.raises(SandboxError, match=r"cannot make one here \(No permissions to create new namespace\); allow user namesp"):
        python("open('/tmp/ran', 'w')")
    require_sandbox.cache_clear()
