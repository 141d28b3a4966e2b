"""Files and folders that are written completely or not at all, and locks. Standard library only."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: Path, suffix: str = "partial") -> Iterator[Path]:
    """Yields a temporary path beside `path` at which to make a file, a folder or a link, and renames that to `path`.

    The content is flushed to the disk first. An existing `path` is replaced; a reader sees the old or the new content.
    If the block raises, the temporary path is removed and `path` is unchanged. A killed process leaves at most the
    temporary path, which the next call removes.

    suffix  of the temporary name; if it differs between processes, several may write the same path concurrently.
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
    """Rename a folder to the name of an existing one, which file systems cannot do in one step."""
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


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def flush(path: Path) -> None:
    """Flush a file, or a folder and its contents, to the disk."""
    if path.is_dir():
        for inside in sorted(path.rglob("*")):
            flush_entry(inside)
    flush_entry(path)


def flush_entry(path: Path) -> None:
    """Flush one file, or the entries of one folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_name(path: Path, separator: str = "-") -> Path:
    """`path`, or if that name is taken the first free one of path-1, path-2, ..."""
    found, number = path, 0
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.name}{separator}{number}")
    return found


def write_error(folder: Path) -> str:
    """Why no file can be created in a folder, or in its nearest existing parent; "" if it can."""
    existing = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
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
    """Keeps a second process out of a folder: a file with the owner's process id, removed at the end.

    Raises ValueError if a running process holds it. The lock of a process that was killed is taken over.
    """

    def __init__(self, file: Path, what: str):
        self.file, self.what = file, what

    def check(self) -> None:
        """Raise ValueError if another running process holds the lock."""
        owner = self.file.read_text(encoding="ascii", errors="replace") if self.file.is_file() else ""
        if owner.isdigit() and int(owner) != os.getpid() and is_running(int(owner)):
            raise ValueError(f"{self.what}: process {owner} is using it; wait for it to end, or choose another folder")

    def __enter__(self) -> Lock:
        try:
            handle = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            self.check()
            self.file.unlink(missing_ok=True)
            return self.__enter__()
        with os.fdopen(handle, "w") as stream:
            stream.write(str(os.getpid()))
        return self

    def __exit__(self, *_: object) -> None:
        self.file.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether a process with this id is running."""
    if os.name == "nt":
        return True  # where os.kill would end the process; the user has to remove the lock
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return True  # a system without /proc
    return state != "Z"  # a zombie has ended; its parent has not read its status yet
