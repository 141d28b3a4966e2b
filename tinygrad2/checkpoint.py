"""Checkpoints: folders that are written atomically, with a checksum for every file.

A checkpoint is written under a temporary name. `manifest.json` lists every file with its SHA-256. After everything has
been flushed to disk, the folder is renamed (see files.atomic_write). If writing is interrupted, there is either no
folder of that name, or the old one, or the complete new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tinygrad2.files import atomic_write

MANIFEST = "manifest.json"
JSON_BYTES = 8 << 20  # maximum size of a JSON file; when parsed, it can take up to 40 times as much memory
_NAME = re.compile(r"ckpt-(\d+)")
JsonObject = dict[str, Any]  # as returned by json.loads


class CheckpointError(ValueError):
    """Raised if a checkpoint is damaged. The message names the file and the damage."""


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. On exit, write its manifest, flush it and rename it to `folder`.

    An existing `folder` is replaced. If the block raises, the new files are removed and `folder` is unchanged.
    """
    with atomic_write(folder) as partial:
        partial.mkdir(parents=True)
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        listed = {path.relative_to(partial).as_posix(): _describe(path) for path in files}
        write_json(partial / MANIFEST, {"files": listed})


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file can be read and has the size and checksum listed in the manifest."""
    listed = read_json(folder / MANIFEST).get("files")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / MANIFEST}: no files in this manifest")
    for name, expected in listed.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise CheckpointError(f"{folder / MANIFEST}: {name[:80]!r} is not the name of a file in this folder")
        kinds = {key: type(value) for key, value in expected.items()} if isinstance(expected, dict) else {}
        if kinds != {"bytes": int, "sha256": str}:
            raise CheckpointError(f"{folder / MANIFEST}: the entry for {name} is not valid; expected bytes and sha256")
        try:
            if not path.is_file():
                raise CheckpointError(f"{path}: the file is missing")
            if path.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes; expected {expected['bytes']:,}")
            if _describe(path) != expected:
                raise CheckpointError(f"{path}: its checksum differs from the manifest's")
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None


def name(step: int) -> str:
    """The folder name of the checkpoint after `step` steps."""
    return f"ckpt-{step:06d}"


def find(out: Path) -> list[Path]:
    """The checkpoints in the folder `out`, newest (highest step) first. They are not verified."""
    if not out.is_dir():
        return []
    found = [(int(match[1]), path) for path in out.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def newest(out: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint in `out`, or None, and an error message for each newer, damaged checkpoint."""
    damaged: list[str] = []
    for folder in find(out):
        try:
            verify(folder)
            return folder, damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def prune(out: Path, keep: int, spare: set[str]) -> list[str]:
    """Delete the checkpoints in `out`, except the `keep` newest ones and those named in `spare`.

    Returns an error message for each one that cannot be deleted, for example because NFS keeps open files.
    """
    left = []
    for folder in find(out)[keep:]:
        if folder.name not in spare:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                left.append(f"{error.filename or folder}: not deleted: {error.strerror}")
    return left


def step_of(folder: Path) -> int:
    """The step number in the name of a checkpoint. Raises ValueError if it is not the name of a checkpoint."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder}: not the name of a checkpoint; expected ckpt-NUMBER")
    return int(match[1])


def save_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write named arrays to a safetensors file. Raises OSError if it cannot be written."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({key: np.asarray(array, order="C") for key, array in arrays.items()}, path, metadata)
    except SafetensorError as error:  # the library's error for a full disk
        raise OSError(f"{path}: cannot be written ({error})") from None
    with suppress(OSError):  # (some file systems have no permissions)
        path.chmod(mode)  # the library creates files that only the owner can read


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a file written by save_arrays. Raises CheckpointError naming the file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({str(error)[:200]})") from None


def write_json(path: Path, values: object) -> None:
    """Write `values` as indented JSON; see `to_json`."""
    path.write_text(to_json(values, indent=2) + "\n", encoding="utf-8")


def to_json(values: object, indent: int | None = None) -> str:
    """`values` as JSON. NaN and infinities, which JSON cannot represent, become null."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> JsonObject:
    """Read a JSON object. Raises CheckpointError naming the file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if path.stat().st_size > JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes; expected at most {JSON_BYTES:,}")
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return values


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
