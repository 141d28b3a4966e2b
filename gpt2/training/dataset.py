"""Token data sets on disk, the order of samples in training, and baseline losses.

A data set is a folder with manifest.json, vocabulary.json (the tokenizer), and the shards train-00000.bin, ... and
val-00000.bin, ... A shard contains raw little-endian ids, in uint16, or in uint32 if the vocabulary has more than 65536
tokens. `data/prepare.py` writes data sets.

A folder without a manifest may contain shards of other GPT-2 programs, with uint16 ids of GPT-2's vocabulary or of the
characters in nanoGPT's meta.pkl:

nanoGPT        train.bin, val.bin: raw ids
build-nanogpt  NAME_train_000001.npy, ..., NAME_val_000000.npy: one-dimensional arrays
llm.c          NAME_train.bin or NAME_train_000001.bin, ..., and NAME_val...: 256 int32 (20240520, version 1, number of
               ids, zeros), then the ids
"""

from __future__ import annotations

import hashlib
import re
import reprlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2 import console
from gpt2.tokenizer import CHARACTERS_FILE, Tokenizer
from tinygrad2.checkpoint import JsonObject, read_json
from tinygrad2.random import DATA_SITE, Key, permutation

MANIFEST = "manifest.json"
FORMAT = 1  # version of the manifest
SPLITS = ("train", "val")
CHECKED_BYTES = 256 << 20  # the checksums of splits up to this size are verified each time a split is opened
PREPARE = f"{console.script('prepare')} SOURCE..."
FOREIGN = re.compile(r"(?:.*_)?(train|val)(?:_.*)?\.(bin|npy)")
FOREIGN_VOCABULARY = {"name": "gpt2", "vocab_size": 50257}
LLMC_HEADER_BYTES, LLMC_TOKENS_MAGIC, LLMC_LLAMA_TOKENS_MAGIC = 1024, 20240520, 20240801
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES = 16, 4096  # blocks covered by the fingerprint of another program's shard
BASELINE_TOKENS = 10_000_000
MAX_VOCAB = 1 << 31
MAX_BIGRAM_VOCAB = 4096  # maximum for the bigram baseline, since its table has vocab_size^2 entries


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which ids below `vocab_size` are stored."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def find_dataset(data: str | Path) -> Path:
    """The folder that `--data NAME|PATH` selects: data/NAME in the current directory, or else the path itself.

    Raises FileNotFoundError, which lists the data sets in data/, if there is none.
    """
    for folder in (Path("data") / data, Path(data)):
        if _is_dataset(folder):
            return folder
    if Path(data).is_file():
        source, name = shlex.quote(str(data)), shlex.quote(f"data/{Path(data).stem}")
        command = f"{console.script('prepare')} {source} --tokenizer bytes --out {name}"
        raise FileNotFoundError(f"data {str(data)!r}: a file, not a data set; prepare it with {command}")
    existing = (
        ", ".join(sorted(folder.name for folder in Path("data").glob("*/") if _is_dataset(folder))) or "no data set"
    )
    raise FileNotFoundError(
        f"data {str(data)!r}: no such data set (data/ contains {existing}); prepare one with {PREPARE}"
    )


def _is_dataset(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or bool(_foreign_files(folder, "train"))


def _foreign_files(folder: Path, split: str) -> list[Path]:
    """The shards of a split written by another program, sorted by name."""
    named = ((FOREIGN.fullmatch(file.name), file) for file in sorted(folder.glob("*")))
    return [file for match, file in named if match and match[1] == split]


@dataclass(frozen=True)
class Shard:
    """A file with `tokens` ids of a data set, starting at byte `offset`.

    The file is read instead of memory-mapped: if a memory-mapped file shrinks, reading it kills the process.
    """

    file: Path
    dtype: np.dtype
    tokens: int
    offset: int = 0

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Read at most `count` ids, starting at position `start`. Raises ValueError if the file has become shorter."""
        count = min(count, self.tokens - start)
        ids = np.fromfile(self.file, self.dtype, count, offset=self.offset + start * self.dtype.itemsize)
        if len(ids) < count:
            expected = self.offset + self.tokens * self.dtype.itemsize
            raise ValueError(
                f"{self.file}: the shard has shrunk from {expected} to {self.file.stat().st_size} bytes since it was "
                f"opened; do not change the data during a run: restore the file, or prepare the data again"
            )
        return ids


class TokenDataset:
    """One split of a data set: a sequence of `tokens` ids, which is read in windows of block_size + 1 ids.

    path        the folder.
    manifest    manifest.json as a dict: format, tokenizer {name, fingerprint, vocab_size}, dtype, documents, bytes,
                tokens {split: count}, shards [{file, split, tokens, sha256}], split_rule, sources. For shards of
                another program: tokenizer {name, vocab_size}, and the shards of the split, whose sha256 covers the size
                and some blocks.
    vocab_size  the number of ids; `read` raises ValueError for larger ids.
    """

    def __init__(self, path: Path, split: str, manifest: JsonObject, shards: list[Shard]):
        self.path, self.split, self.manifest = path, split, manifest
        self.tokens = sum(len(shard) for shard in shards)
        self.vocab_size = int(manifest["tokenizer"]["vocab_size"])
        self._shards = shards
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])

    @staticmethod
    def open(path: str | Path, split: str) -> TokenDataset:
        """Open the split "train" or "val" of the data set in the folder `path`.

        Raises FileNotFoundError if the folder, the manifest or a shard is missing, and ValueError if one is damaged or
        the split is empty. The checksums of splits larger than CHECKED_BYTES are not verified.
        """
        path = Path(path)
        if split not in SPLITS:
            raise ValueError(f"TokenDataset: split is {split!r}; expected one of {', '.join(SPLITS)}")
        if not (path / MANIFEST).exists() and any(_foreign_files(path, name) for name in SPLITS):
            return _open_foreign(path, split)
        manifest = _read_manifest(path)
        dtype = token_dtype(manifest["tokenizer"]["vocab_size"])
        entries = [entry for entry in manifest["shards"] if entry["split"] == split]
        verify = sum(entry["tokens"] for entry in entries) * dtype.itemsize <= CHECKED_BYTES
        if not entries:
            raise ValueError(f"{path}: the split {split} is empty; recreate the data set with more text: {PREPARE}")
        shards = [_open_shard(path / entry["file"], entry, dtype, verify) for entry in entries]
        return TokenDataset(path, split, manifest, shards)

    @property
    def fingerprint(self) -> str:
        """The identity of the split's tokens: the SHA-256 hash, in hexadecimal, of the checksums of its shards."""
        sums = "".join(entry["sha256"] for entry in self.manifest["shards"] if entry["split"] == self.split)
        return hashlib.sha256(sums.encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the ids: the tokenizer in the folder, or, for shards of another program, GPT-2's.

        Raises ValueError if the saved tokenizer is not the tokenizer in the manifest.
        """
        if self.manifest["tokenizer"] is FOREIGN_VOCABULARY:
            return Tokenizer.load("gpt2")
        tokenizer = Tokenizer.load(self.path)
        same = {**self.manifest["tokenizer"], "name": ""} == {**tokenizer.describe(), "name": ""}
        if not same:
            raise ValueError(
                f"{self.path}: manifest.json and vocabulary.json have different tokenizers; prepare the data again: "
                f"{PREPARE} --fresh"
            )
        return tokenizer

    def windows(self, block_size: int) -> int:
        """The number of windows, (tokens - 1) // block_size. Raises ValueError if it is 0."""
        if self.tokens < block_size + 1:
            raise ValueError(
                f"{self.path}: the split {self.split} has {self.tokens} tokens; a block size of {block_size} requires "
                f"{block_size} + 1 = {block_size + 1}; use a smaller --block-size or more text"
            )
        return (self.tokens - 1) // block_size

    def read(self, start: int, count: int) -> np.ndarray:
        """The ids at positions start ... start + count - 1, in the stored dtype. Raises ValueError, which names the
        shard, for an invalid id."""
        if not 0 <= start <= start + count <= self.tokens:
            raise ValueError(
                f"{self.path}: read({start}, {count}) is out of range; {self.split} has {self.tokens} tokens"
            )
        pieces = []
        k = int(np.searchsorted(self._starts, start, side="right")) - 1
        while count > 0:
            piece = self._shards[k].read(start - int(self._starts[k]), count)
            if piece.max() >= self.vocab_size:
                raise ValueError(
                    f"{self._shards[k].file}: contains the id {piece.max()}, but the vocabulary has {self.vocab_size} "
                    f"ids ({self.manifest['tokenizer']['name']}); the shard is damaged or has another vocabulary; "
                    f"recreate the data set: {PREPARE} --fresh"
                )
            pieces.append(piece)
            start, count, k = start + len(piece), count - len(piece), k + 1
        return np.concatenate(pieces) if pieces else np.empty(0, self._shards[0].dtype)

    def batch(self, indices: Sequence[int] | np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows at `indices` as (tokens, targets), both (len(indices), block_size) in int64. A target is the id
        that follows its token.

        Window i covers the ids i * block_size ... i * block_size + block_size, so every id is a target exactly once,
        except the first id and those after the last complete window.
        """
        windows = self.windows(block_size)
        rows = np.empty((len(indices), block_size + 1), dtype=np.int64)
        for row, i in zip(rows, indices, strict=True):
            if not 0 <= i < windows:
                raise ValueError(f"{self.path}: window {i} is out of range; {self.split} has {windows} windows")
            row[:] = self.read(int(i) * block_size, block_size + 1)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def _read_manifest(path: Path) -> JsonObject:
    file = path / MANIFEST
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such data set; prepare one with {PREPARE}")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; prepare the data set with {PREPARE}")
    try:
        manifest = read_json(file)
        version, dtype = manifest["format"], manifest["dtype"]
        size = manifest["tokenizer"]["vocab_size"]
        if type(size) is not int or not 0 < size < MAX_VOCAB:
            raise ValueError(f"the size of the vocabulary is {reprlib.repr(size)}")
        if not isinstance(manifest["tokenizer"]["name"], str):
            raise TypeError("the name of the tokenizer is not a string")
        expected = token_dtype(size).name
        names = set()
        for entry in manifest["shards"]:
            for key, kind in (("file", str), ("split", str), ("tokens", int), ("sha256", str)):
                if type(entry[key]) is not kind:
                    raise TypeError(f"a shard's {key} is {reprlib.repr(entry[key])}")
            if not 0 < entry["tokens"] < 2**63:
                raise ValueError(f"a shard has {entry['tokens']} tokens")
            if Path(entry["file"]).name != entry["file"] or len(entry["file"]) > 255 or "\0" in entry["file"]:
                raise ValueError(f"a shard's file is {entry['file'][:80]!r}, which is not a file name in this folder")
            if entry["file"] in names:
                raise ValueError(f"the file {entry['file']} occurs twice")
            names.add(entry["file"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{file}: not a valid manifest of a data set ({type(error).__name__}: {str(error)[:200]}); recreate it: "
            f"{PREPARE} --fresh"
        ) from None
    if version != FORMAT or dtype != expected:
        raise ValueError(
            f"{file}: format {str(version)[:40]}, dtype {str(dtype)[:40]}; expected format {FORMAT}, dtype {expected}; "
            f"recreate the data set: {PREPARE} --fresh"
        )
    return manifest


def _open_shard(file: Path, entry: JsonObject, dtype: np.dtype, verify: bool) -> Shard:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the shard is missing; recreate the data set: {PREPARE} --fresh")
    got, expected = file.stat().st_size, entry["tokens"] * dtype.itemsize
    if got != expected or not expected:
        raise ValueError(
            f"{file}: the shard has {got} bytes; expected {expected} ({entry['tokens']} tokens of "
            f"{dtype.itemsize} bytes); it is truncated or from another data set; recreate it: {PREPARE} --fresh"
        )
    if verify and file_sha256(file) != entry["sha256"]:
        raise ValueError(
            f"{file}: the shard's checksum differs from the one in {MANIFEST}; recreate the data set: {PREPARE} --fresh"
        )
    return Shard(file, dtype, entry["tokens"])


def _open_foreign(path: Path, split: str) -> TokenDataset:
    files = _foreign_files(path, split)
    if not files:
        raise FileNotFoundError(
            f"{path}: no file of the split {split}; expected {split}.bin, *_{split}_*.bin or *_{split}_*.npy"
        )
    if len({file.suffix for file in files}) > 1:
        raise ValueError(f"{path}: the split {split} has .npy and .bin files; keep only one kind in the folder")
    vocabulary: JsonObject = FOREIGN_VOCABULARY
    if (path / CHARACTERS_FILE).exists():
        try:
            vocabulary = Tokenizer.load(path / CHARACTERS_FILE).describe()
        except ValueError as error:
            raise ValueError(
                f"{error}; the ids are not from GPT-2's vocabulary; prepare the original text instead: {PREPARE}"
            ) from None
    shards: list[Shard] = [_open_array(file) if file.suffix == ".npy" else _open_bin(file) for file in files]
    entries = [
        {"file": file.name, "split": split, "tokens": len(shard), "sha256": _sampled_sha256(shard)}
        for file, shard in zip(files, shards, strict=True)
    ]
    return TokenDataset(path, split, {"tokenizer": vocabulary, "shards": entries}, shards)


def _open_array(file: Path) -> Shard:
    """Open a build-nanogpt shard. Raises ValueError unless it is a one-dimensional uint16 array."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy's header parser raises errors of many types
        raise ValueError(f"{file}: not a valid .npy file, or truncated ({type(error).__name__})") from None
    if not isinstance(array, np.memmap) or array.dtype != "<u2" or array.ndim != 1 or not array.size:
        got = f"{array.dtype}, shape {array.shape}" if isinstance(array, np.ndarray) else "an .npz archive"
        raise ValueError(f"{file}: {got}; expected a one-dimensional uint16 array, as written by build-nanogpt")
    return Shard(file, array.dtype, len(array), array.offset)


def _open_bin(file: Path) -> Shard:
    """Open a .bin shard: an llm.c shard if it starts with the magic number, which cannot be a pair of GPT-2 ids, or
    else a nanoGPT shard. Raises ValueError if the size of the file is wrong."""
    size = file.stat().st_size
    header = np.fromfile(file, "<i4", 256)
    magic = int(header[0]) if len(header) else 0
    if magic == LLMC_LLAMA_TOKENS_MAGIC:
        raise ValueError(f"{file}: llm.c's ids for Llama 3; expected ids for GPT-2 (header {LLMC_TOKENS_MAGIC})")
    if magic != LLMC_TOKENS_MAGIC:
        if size % 2 or not size:
            raise ValueError(f"{file}: {size} bytes; expected raw uint16 ids, two bytes each")
        return Shard(file, np.dtype("<u2"), size // 2)
    version, tokens = (int(value) for value in header[1:3]) if len(header) == 256 else (0, 0)
    if version != 1 or tokens < 1 or size != LLMC_HEADER_BYTES + 2 * tokens:
        raise ValueError(
            f"{file}: llm.c's header declares version {version} and {tokens} ids, but the file has {size} bytes; "
            f"expected version 1 and {LLMC_HEADER_BYTES} + 2 * ids bytes; the file is truncated or damaged; copy it "
            f"again"
        )
    return Shard(file, np.dtype("<u2"), tokens, LLMC_HEADER_BYTES)


def _sampled_sha256(shard: Shard) -> str:
    """The SHA-256 hash, in hexadecimal, of the number of ids and of 16 evenly spaced blocks of 4 KiB, including the
    first and the last block."""
    sha = hashlib.sha256(len(shard).to_bytes(8, "little"))
    block = FINGERPRINT_BLOCK_BYTES // shard.dtype.itemsize
    for start in np.linspace(0, max(0, len(shard) - block), FINGERPRINT_BLOCKS).astype(int):
        sha.update(shard.read(int(start), block).tobytes())
    return sha.hexdigest()


def file_sha256(file: Path) -> str:
    """The SHA-256 hash of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class SampleOrder:
    """The order of `n` samples in training: an infinite sequence of epochs, each a permutation of 0 ... n-1.

    Position p is sample i = p % n of epoch e = p // n, which is permutation(Key(seed, step=e, site=DATA_SITE), n)[i], a
    fixed function of (seed, e, i). The sample at a position therefore does not depend on how a run is split into
    micro-steps, ranks and restarts, and each sample occurs exactly once per epoch.
    """

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError(f"SampleOrder: n is {n}; expected at least one sample")
        self.n, self.seed = n, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def indices(self, first: int, count: int) -> np.ndarray:
        """The samples at positions first ... first + count - 1 (int64)."""
        out = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, i = divmod(first + done, self.n)
            piece = self._permutation(epoch)[i : i + count - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._order = permutation(Key(self.seed, step=epoch, site=DATA_SITE), self.n)
            self._epoch = epoch
        return self._order


def baselines(train: TokenDataset, val: TokenDataset) -> dict[str, float]:
    """The cross-entropies on `val`, in nats per token, of n-gram models of `train`.

    unigram  p(b) = (n(b) + 1) / (N + V), where n(b) of N targets are b, and the vocabulary has V ids.
    bigram   p(b | a) = (n(a, b) + 1) / (n(a) + V), where n(a, b) targets b follow a; only for V <= 4096.

    The models use add-one (Laplace) smoothing. Every id of a split except the first is a target. At most the first 10
    million ids are used.
    """
    V = train.vocab_size
    order = 2 if V <= MAX_BIGRAM_VOCAB else 1
    train_counts, val_counts = _counts(train, order), _counts(val, order)

    def cross_entropy(seen: np.ndarray, targets: np.ndarray) -> float:
        log_p = np.log(seen + 1.0) - np.log(seen.sum(axis=-1, keepdims=True) + float(V))
        return float(-(targets * log_p).sum() / targets.sum())

    if order == 1:
        return {"unigram": cross_entropy(train_counts, val_counts)}
    return {
        "unigram": cross_entropy(train_counts.sum(axis=0), val_counts.sum(axis=0)),
        "bigram": cross_entropy(train_counts, val_counts),
    }


def bytes_per_token(data: TokenDataset, tokenizer: Tokenizer) -> float:
    """The mean number of bytes per target, for the targets of `baselines`. loss / (log(2) * bytes_per_token) is in bits
    per byte, which is comparable between tokenizers."""
    counts = _counts(data, 1)
    ids = np.flatnonzero(counts)
    sizes = np.array([0 if i in tokenizer.end_ids else len(tokenizer.decode_bytes([int(i)])) for i in ids])
    return float((counts[ids] * sizes).sum() / counts.sum())


def _counts(data: TokenDataset, order: int) -> np.ndarray:
    """The number of occurrences of each target in `data`, (V,), or of each pair of an id and its target, (V, V)."""
    if data.tokens < 2:
        raise ValueError(f"{data.path}: the split {data.split} has {data.tokens} token; expected at least 2")
    V, total = data.vocab_size, min(data.tokens, BASELINE_TOKENS)
    counts = np.zeros(V**order, dtype=np.int64)
    chunk = 1 << 21
    for start in range(0, total - 1, chunk):
        ids = data.read(start, min(chunk + 1, total - start)).astype(np.int64)
        keys = ids[1:] if order == 1 else ids[:-1] * V + ids[1:]
        counts += np.bincount(keys, minlength=len(counts))
    return counts.reshape((V,) * order)
