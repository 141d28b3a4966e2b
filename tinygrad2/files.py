"""Atomic writes of files and folders, and file locks. Standard library only."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

HEARTBEAT = 10.0  # seconds between renewals of a lock file
FRESH = 60.0  # seconds without a renewal after which another host's lock file expires
SETTLING = 0.5  # seconds to wait for competing writes to a lock file if the file system does not support locks
LOCKED_BYTE = 1 << 30  # the byte of a lock file that is locked on Windows
# The errors that mean that the file system does not support an operation.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def atomic_write(path: Path, suffix: str = "partial") -> Iterator[Path]:
    """Yield a temporary path at which the block creates a file, a folder or a link, then rename it to `path`.

    The content is flushed to disk before it is renamed. An existing `path` is replaced; a reader sees either the old or
    the new content. If the block raises, the temporary path is removed and `path` is unchanged. A killed process leaves
    at most the temporary path, which the next call removes.

    suffix  the suffix of the temporary name. Processes with different suffixes can write the same path concurrently.
    """
    partial = path.with_name(f".{path.name}.{suffix}")
    remove(partial)
    try:
        yield partial
        if not partial.is_symlink():
            flush(partial)
        if partial.is_dir() and not partial.is_symlink() and path.exists():
            _replace_folder(partial, path)
        else:
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # report the first error
            remove(partial)
        raise
    flush_entry(path.parent)


def _replace_folder(new: Path, path: Path) -> None:
    """Replace a folder with another one. File systems cannot do this in one step."""
    old = path.with_name(f".{path.name}.replaced")
    remove(old)
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    flush_entry(path.parent)
    remove(old)


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises FileExistsError if the path is a file or a broken link."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        found = f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "a file"
        raise FileExistsError(f"{path}: {found}; expected a folder, or a path that does not exist") from None


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder and its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def flush(path: Path) -> None:
    """Flush a file, or a folder and its contents, to disk."""
    if path.is_dir():
        for inside in sorted(path.rglob("*")):
            flush_entry(inside)
    flush_entry(path)


def flush_entry(path: Path) -> None:
    """Flush one file, or the entries of one folder, to disk. Some file systems cannot flush folders."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        with naming(path):
            os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError raised in this block that has no file name, such as an error of an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def clean(folder: Path) -> None:
    """Clean up interrupted writes to a folder: remove temporary files, and restore what was being replaced."""
    for path in [*folder.glob(".*.replaced"), *folder.glob(".*.partial")]:
        name, _, kind = path.name[1:].rpartition(".")
        with suppress(OSError):  # a leftover is harmless; the next write to the same path removes it
            if kind == "replaced" and not os.path.lexists(folder / name):
                path.rename(folder / name)
            else:
                remove(path)


def free_name(path: Path, separator: str = "-") -> Path:
    """`path` or, if it exists, the first of path-1, path-2, ... that does not exist."""
    found, number = path, 0
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.name}{separator}{number}")
    return found


def write_error(folder: Path) -> str:
    """The error message when creating a file in a folder (or in its nearest existing parent), or "" if it succeeds."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
        return ""
    except OSError as error:
        return f"{folder}: {error.strerror}"


def discard_stdout() -> None:
    """Discard all further standard output of this process and its child processes."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


class Lock:
    """Keeps other processes out of a folder, with a file that the operating system locks for this process.

    The lock is released when the process ends, even if it is killed. The file is removed when the lock is released
    normally. It contains the host, the process and the time, for error messages in other processes. Some file systems
    do not share locks between hosts, or do not support locks. Therefore the file's modification time is updated every
    HEARTBEAT seconds, and another host's file counts as locked until it is FRESH seconds old.

    file   the lock file, in a folder that exists.
    what   what is locked, for error messages.
    stale  whether the previous owner ended without removing the file.
    """

    def __init__(self, file: Path, what: str):
        self.file, self.what, self.stale = file, what, False
        self._handle = -1
        self._ending = threading.Event()

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Acquire the lock. Raises ValueError, naming the file and the owner, if another process holds it."""
        while True:
            handle = os.open(self.file, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                with naming(self.file):
                    locked = _try_lock(handle)
                    if locked is not False and not _is_at(handle, self.file):
                        os.close(handle)  # its owner has removed the file in the meantime
                        continue
                    self._own(handle, locked)
                break
            except BaseException:
                os.close(handle)
                raise
        self._handle = handle
        self._ending.clear()
        threading.Thread(target=self._renew, args=(handle,), name="lock", daemon=True).start()

    def _own(self, handle: int, locked: bool | None) -> None:
        """Write this process to the file as its owner. Raises ValueError if another process holds the lock.

        locked  whether the operating system has granted the lock; None if the file system does not support locks.
        """
        content = _content(handle)
        owner = _owner(content)
        if locked is False:
            raise ValueError(f"{self.file}: {owner} is using {self.what}; wait for it to end, or choose another folder")
        age = _age(handle, self.file.parent)
        if content.get("machine") != (machine() if locked else None) and "process" in content and abs(age) < FRESH:
            raise ValueError(
                f"{self.file}: {owner} was using {self.what} {max(0, age):.0f} s ago, and this file system may not "
                f"share locks between hosts; wait for it to end, or if it was killed, wait {FRESH - age:.0f} s"
            )
        self.stale = os.fstat(handle).st_size > 0
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        mine = {"host": socket.gethostname(), "process": os.getpid(), "started": started, "machine": machine()}
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, json.dumps(mine).encode())
        os.fsync(handle)
        if locked is None:  # another process may have written at the same time: the last to write holds the lock
            time.sleep(SETTLING)
            if _content(handle) != mine:
                raise ValueError(f"{self.file}: {_owner(_content(handle))} is using {self.what}")

    def _renew(self, handle: int) -> None:
        while not self._ending.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(handle if os.utime in os.supports_fd else self.file)

    def held(self) -> bool:
        """Whether this lock is held and its file is still in place: the folder was not removed or renamed."""
        return self._handle >= 0 and _is_at(self._handle, self.file)

    def release(self) -> None:
        """Remove the file and release the lock."""
        if self._handle < 0:
            return
        self._ending.set()
        if self.held() and os.name != "nt":  # remove it while locked, so that it cannot be another process's file
            with suppress(OSError):
                self.file.unlink()
        os.close(self._handle)
        self._handle = -1
        if os.name == "nt":  # Windows cannot delete an open file
            with suppress(OSError):
                self.file.unlink()


def _try_lock(handle: int) -> bool | None:
    """Lock an open file without waiting. Returns False if another process holds the lock, and None if the file system
    does not support locks."""
    try:
        if sys.platform == "win32":
            os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)  # past the end, so that the content stays readable
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno in UNSUPPORTED:
            return None
        raise
    return True


def _is_at(handle: int, file: Path) -> bool:
    """Whether an open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except OSError:
        return False


def _content(handle: int) -> dict[str, object]:
    """The content of a lock file; empty if it was not written by a Lock."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        content = json.loads(os.read(handle, 4096))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _owner(content: dict[str, object]) -> str:
    if "process" not in content:
        return "another process"
    return f"process {content['process']} on {content.get('host')}, started {content.get('started')},"


def _age(handle: int, folder: Path) -> float:
    """Seconds since an open file was last modified, by the clock of its file system."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime - os.fstat(handle).st_mtime
    except OSError:
        return time.time() - os.fstat(handle).st_mtime


@functools.cache
def machine() -> str:
    """An identifier of the running system. Containers on it share the identifier, and file locks work among them."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
