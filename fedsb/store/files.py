"""Files that are whole or absent: atomic writes, staged folders, hashes, and the event log. Imports no torch.

Everything is written under a name that begins with a dot and ends in `.tmp`, synced to the disk, and renamed. A process
killed at any moment leaves the old content or the new one, and at most such a leftover beside it, which every reader
passes over and `clean_leftovers` removes.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fedsb.errors import DiskError, StoreError

FILE_MODE = 0o644  # mkstemp and safetensors make 0600, which a server under another user cannot read
FOLDER_MODE = 0o755
STAGED, REPLACED = ".tmp", ".old"
REMEDIES = {
    errno.ENOSPC: "free some space on that disk, or choose a folder on another one",
    errno.EDQUOT: "free some of this user's quota, or choose a folder on another disk",
    errno.EROFS: "mount that disk writable, or choose a folder on another one",
    errno.EACCES: "let this user write there, or choose another folder",
    errno.EPERM: "let this user write there, or choose another folder",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a DiskError that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "check that disk, or choose another folder")
        raise DiskError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error


def write_file(path: Path, data: bytes, mode: int = FILE_MODE) -> None:
    """Put `data` at `path`, whole or not at all, with that mode; folders above are made.

    Raises DiskError; then the old content, if any, is still there and no temporary file is.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=STAGED, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(descriptor, mode)
                os.fsync(descriptor)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`write_file` of an indented JSON object with sorted keys. Raises DiskError."""
    write_file(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises StoreError if it is missing or unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise StoreError(f"{path}: there is no such file; check the folder's name") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error}); mend that, then try again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises StoreError if it is missing, torn, or no object."""
    try:
        content = json.loads(read_file(path))
    except ValueError:  # also UnicodeDecodeError
        content = None
    if not isinstance(content, dict):
        raise StoreError(f"{path}: is no JSON object (torn or overwritten); restore the file or delete its folder")
    return content


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on any error it is removed.

    An existing folder at `path` is renamed away, the new one renamed in, the old one deleted. Between the two renames
    (microseconds) `path` does not exist; a process killed exactly then leaves both whole beside it, as `.NAME.*.old`
    and `.NAME.*.tmp`. Where nothing is at `path` there is no such window.

    Raises DiskError for an OSError inside or of its own, and StoreError if `path` is a file.
    """
    path = path.resolve()  # so that "." and a symbolic link mean the folder itself
    if path.is_file():
        raise StoreError(f"{path}: is a file where a folder is to be written; name another folder")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=STAGED, dir=path.parent))
        try:
            staged.chmod(FOLDER_MODE)
            yield staged
            _sync_tree(staged)
            _swap_in(staged, path)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        sync_folder(path.parent)


def clean_leftovers(folder: Path) -> None:
    """Remove what killed processes left in `folder`. Only for a folder with a single writer. Raises DiskError."""
    with writing(folder):
        for suffix in (STAGED, REPLACED):
            for leftover in folder.glob(f".*{suffix}"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _swap_in(staged: Path, path: Path) -> None:
    if not path.exists():
        os.replace(staged, path)
        return
    old = staged.with_suffix(REPLACED)
    os.replace(path, old)
    try:
        os.replace(staged, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)  # the new folder stands, whatever happens to the old one


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync_folder(Path(root, name))
        sync_folder(Path(root))


def sync_folder(path: Path) -> None:
    """Have a folder's entries on disk, as a rename leaves them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Stamp(NamedTuple):
    """What is another for every change of a file, whether written over (its inode stays) or replaced."""

    changed: int
    inode: int
    size: int


def stamp_of(path: Path) -> Stamp | None:
    """A file's stamp; None: it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Stamp(found.st_mtime_ns, found.st_ino, found.st_size)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes. Raises StoreError if it is missing or unreadable."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise StoreError(f"{path}: there is no such file; check the folder's name") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error}); mend that, then try again") from error


def append_line(path: Path, text: str) -> None:
    """Append one line with one unbuffered write; for files with one writer, such as `events.jsonl`.

    A torn last line (one without its newline, left by a killed process) is cut off first. Raises DiskError, then the
    file ends where it ended before; and ValueError if `text` holds a newline.
    """
    if "\n" in text:
        raise ValueError("a line holds no newline")
    line = text.encode() + b"\n"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            end = _end_of_whole_lines(file)
            try:
                file.truncate(end)
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except BaseException:
                file.truncate(end)
                raise


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of an `events.jsonl`, oldest first; none if there is no file. A torn last line is passed over.

    Raises StoreError, naming the line, if any other line is not a JSON object.
    """
    if not path.exists():
        return []
    *lines, _torn = read_file(path).split(b"\n")
    return [_event(path, number, line) for number, line in enumerate(lines, 1)]


def _event(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise StoreError(f"{path}: line {number} is no JSON object; remove that line")
    return event


def _end_of_whole_lines(file: BinaryIO) -> int:
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return 0
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return end
    file.seek(0)
    return file.read().rfind(b"\n") + 1
