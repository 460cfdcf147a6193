"""Which system calls generated programs may not make, as a seccomp filter (man 2 seccomp) that `bwrap --seccomp` takes.

A program that is nobody may still make name spaces of its own, be root in them, and mount; and memory that it gets by
memfd_create or shmget is nobody's resident memory, so no limit sees it. None of the languages here needs any of these.
"""

import errno
import platform
import struct

from fedsb.errors import SandboxError

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_…
CLONE = {"x86_64": 56, "aarch64": 220}
NEW_SPACES = 0x7E020000  # CLONE_NEW…, the first argument of clone
CLONE3 = 435  # whose arguments no filter sees; libraries try clone where it is not there
X32 = 0x40000000  # beginning of a second numbering on x86_64
FORBIDDEN = {  # name: (x86_64, aarch64)
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ, JGE, JSET, BPF_RET
NUMBER, MACHINE, FIRST = 0, 4, 16  # offsets in struct seccomp_data: the call, AUDIT_ARCH, the low half of its first argument
ALLOW, REFUSE = 0x7FFF0000, 0x00050000


def seccomp_filter() -> bytes:
    """The filter for this machine. Raises SandboxError on one whose numbers are not known."""
    name = platform.machine()
    if name not in MACHINES:
        raise SandboxError(f"generated code runs in a sandbox only, and none is known for {name}; use {' or '.join(MACHINES)}")
    column = list(MACHINES).index(name)
    steps = [
        (LOAD, 0, 0, MACHINE),
        (EQUAL, 1, 0, MACHINES[name]),
        (RETURN, 0, 0, REFUSE | errno.ENOSYS),
        (LOAD, 0, 0, NUMBER),
        *_refused(AT_LEAST, X32, errno.ENOSYS),
        *_refused(EQUAL, CLONE3, errno.ENOSYS),
    ]
    for numbers in FORBIDDEN.values():
        steps += _refused(EQUAL, numbers[column], errno.EPERM)
    steps += [(EQUAL, 0, 3, CLONE[name]), (LOAD, 0, 0, FIRST), *_refused(ANY_BIT, NEW_SPACES, errno.EPERM), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _refused(test: int, value: int, error: int) -> list[tuple[int, int, int, int]]:
    """If so, return the error; or go on."""
    return [(test, 0, 1, value), (RETURN, 0, 0, REFUSE | error)]
