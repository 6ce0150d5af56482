"""Files and folders that are never half written, and the lock of who writes them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any

from bayeslora.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "digests",
    "fingerprint",
    "hidden",
    "left",
    "locked",
    "make",
    "move",
    "remove",
    "replaced",
    "settle",
    "write_json",
    "write_tensors",
    "write_text",
]

#: Bytes of a file of which `fingerprint` reads all; of a larger one it reads as many parts of so many bytes.
WHOLE, PARTS, PART = 2**28, 64, 2**20


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a hidden place beside ``path``; the file or folder that the block makes there takes its place as a whole.

    A folder cannot replace another one in one step: the old one is put aside, and the new one takes its place. Whoever
    looks for `path` between the two finds the old one at ``hidden(path, "old")``.

    Raises:
        SettingError: another process is writing there, or there can be no such place.
    """
    make(path.parent)
    new = hidden(path, "new")
    with locked(hidden(path, "lock")):
        settle(path)
        try:
            yield new
            move(new, path)
        finally:
            settle(path)


def make(folder: Path) -> None:
    """Make a folder and those that it is in, as far as they are not there.

    Raises:
        SettingError: there can be none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"There can be no folder '{folder}': {error.strerror}.") from error


def move(source: Path, target: Path) -> None:
    """Let a file or folder take the place of another one, which is whole at ``target`` or aside until then."""
    if source.is_dir() and target.is_dir():
        os.rename(target, hidden(target, "old"))
    os.replace(source, target)
    remove(hidden(target, "old"))


def settle(path: Path) -> None:
    """End or undo what a process that was killed had begun with ``path``.

    Raises:
        SettingError: another process is writing there.
    """
    with locked(hidden(path, "lock")):
        remove(hidden(path, "new"))
        old = hidden(path, "old")
        if path.exists():
            remove(old)
        elif old.exists():
            os.rename(old, path)


def hidden(path: Path, what: str) -> Path:
    """Where the lock, the new or the old one of ``path`` is while it is being replaced."""
    return path.parent / f".{path.name}.bayeslora-{what}"


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Hold a file as a lock, which ends with its process however that ends; who has it already may take it again.

    Raises:
        SettingError: another process, or another thread of this one, holds it; the message says who, and since when.
    """
    lock = lock.absolute()
    if lock in _HELD.get():
        yield
        return
    descriptor = _take(lock)
    token = _HELD.set(_HELD.get() | {lock})
    try:
        yield
    finally:
        _HELD.reset(token)
        try:  # while it is still held: who has opened it already will see that it is gone, and try again
            lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def left(lock: Path) -> bool:
    """Whether a process that was killed has left a lock behind, which nobody holds since."""
    import fcntl

    try:
        with lock.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that is empty is being taken, and one that is gone has been given back.
            return bool(file.read()) and lock.exists()
    except (FileNotFoundError, BlockingIOError):
        return False


#: Locks of this thread.
_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


def _take(lock: Path) -> int:
    import fcntl

    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(lock.stat(), os.fstat(descriptor)):
                    break
            os.close(descriptor)  # its holder has removed it in between
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise SettingError(
                f"'{_subject(lock)}' is being written by {holder}: wait until it is done, or stop it."
            ) from None
    os.ftruncate(descriptor, 0)
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    os.write(descriptor, f"process {os.getpid()} on {gethostname()}, since {since}".encode())
    return descriptor


def _subject(lock: Path) -> Path:
    """What a lock is of: the folder that it is in, or the file beside it."""
    name = lock.name.removeprefix(".").removesuffix("bayeslora-lock").removesuffix(".")
    return lock.parent / name


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replaced(path) as new:
        new.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, str(path))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in ``folder``."""
    return {path.name: _of_all(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _of_all(path: Path) -> str:
    found = sha256()
    with path.open("rb") as content:
        while part := content.read(2**24):  # a network that was trained in full need not fit into memory twice
            found.update(part)
    return found.hexdigest()


def fingerprint(path: Path) -> str:
    """What tells whether a file is another one than before; of a large file, such as a network, parts are looked at."""
    known = path.stat()
    return _of_parts(path, known.st_size, known.st_mtime_ns)


@cache
def _of_parts(path: Path, size: int, changed: int) -> str:
    """Digest of a file's content, read once as long as its size and the time of its change are the same."""
    found = sha256(str(size).encode())
    with path.open("rb") as content:
        if size <= WHOLE:
            found.update(content.read())
        else:
            for number in range(PARTS):
                content.seek((size - PART) * number // (PARTS - 1))
                found.update(content.read(PART))
    return found.hexdigest()[:16]
