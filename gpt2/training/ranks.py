"""Checks that all ranks of a job have the same code, options and data."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

import tinygrad2
from gpt2.training.dataset import TokenDataset
from gpt2.training.options import Options, UsageError, flag
from tinygrad2.distributed import Comm

PACKAGES = (Path(str(tinygrad2.__file__)).parent, Path(__file__).parents[1])  # tinygrad2 and gpt2
SHOWN_BYTES = 160  # maximum length of a value in the message


def compare(comm: Comm, options: Options, splits: Sequence[TokenDataset]) -> None:
    """Raise UsageError, on every rank, unless all ranks have the same code, options and data.

    options  the final options of this rank.
    splits   the training and the validation split.
    """
    if comm.size == 1:
        return
    # Compare the code first, since another version may have other options.
    _compare(comm, {"the code of tinygrad2 and gpt2": code_version(), "NumPy": np.__version__})
    data = {f"the data, {split.split}": f"{split.path}, fingerprint {split.fingerprint}" for split in splits}
    same = {name: split.fingerprint for name, split in zip(data, splits, strict=True)}
    _compare(comm, {flag(f.name): repr(getattr(options, f.name)) for f in fields(Options)} | data, same)


def _compare(comm: Comm, shown: dict[str, str], same: dict[str, str] | None = None) -> None:
    """Raise UsageError if a value differs between ranks.

    shown  the values of this rank by name, as shown in the message.
    same   values to compare instead of `shown`, by name. For example, the paths of the data may differ between ranks.
    """
    compared = shown | (same or {})
    rows = [hashlib.sha256(compared[name].encode()).digest() + _cut(text) for name, text in shown.items()]
    own = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
    everyone = comm.all_gather(own)
    for rank in range(1, comm.size):
        for name, mine, theirs in zip(shown, everyone[0], everyone[rank], strict=True):
            if (mine[:32] != theirs[:32]).any():
                first, other = (row[32:].tobytes().rstrip(b"\0").decode(errors="replace") for row in (mine, theirs))
                raise UsageError(
                    f"rank {rank} differs from rank 0 in {name}: {other} instead of {first}; all ranks need the same "
                    f"code, options and data"
                )


def _cut(text: str) -> bytes:
    return text.encode()[:SHOWN_BYTES].ljust(SHOWN_BYTES, b"\0")


def code_version() -> str:
    """The version of the code, the first digits of the SHA-256 hash of all its files, and the version of Python."""
    sha = hashlib.sha256()
    for folder in PACKAGES:
        for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cu", ".cuh")):
            sha.update(f"{file.relative_to(folder.parent).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return f"version {tinygrad2.__version__}, SHA-256 {sha.hexdigest()[:16]}, Python {platform.python_version()}"
