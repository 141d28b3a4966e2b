"""Turn text into a token data set: `python data/prepare.py SOURCE... [--tokenizer gpt2|bytes|PATH] [--out data/NAME]`.

A source is a text file, a .jsonl file (one document per line), a .csv, .tsv or .parquet file (one document per row), a
folder of such files, `-` (stdin), or a named data set: `pydoc` (the documentation that comes with Python),
`shakespeare`, `openwebtext` or `fineweb-edu`. All files but .parquet can be compressed as .gz or .zst. The result is
read by gpt2/training/dataset.py. It is bitwise the same for any number of threads and with or without interruptions.

To limit memory use, a document is split into parts of at most 16 KiB. A part ends before the whitespace around its last
newline. GPT-2's pattern never joins a character with the whitespace that follows it, so the tokens are those of the
unsplit text. (Without a newline, a part ends before its last whitespace; without whitespace, it ends at 16 KiB, within
a word.) The SHA-256 of its text decides whether a part is for training or validation, so that equal parts are never in
both splits. An end-of-text token follows a part unless its continuation comes next in the same split.

In a text of less than SMALL_TEXT bytes, parts are smaller. They are sorted by SHA-256, and the first ones, up to the
given fraction of the bytes, are for validation. The last of these is cut where the fraction is reached, in each copy.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a script, Python searches only its folder
    import gpt2  # noqa: F401 - first, so that Ctrl-C during the other imports exits silently

import codecs
import hashlib
import os
import re
import reprlib
import shlex
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from itertools import chain, islice
from typing import BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

from data.sources import (
    BOM,
    HUB_SETS,
    NAMES,
    VAL_FRACTIONS,
    Document,
    HubParquet,
    Source,
    decoded,
    explained,
    find_sources,
    skip,
    unpacked_name,
)
from gpt2 import console, familiar_options
from gpt2.config import GPT2Config
from gpt2.console import Parser
from gpt2.tokenizer import Tokenizer
from gpt2.training.dataset import FORMAT, MANIFEST, SPLITS, TokenDataset, file_sha256, token_dtype
from tinygrad2.checkpoint import JsonObject, read_json, write_json
from tinygrad2.files import Lock, atomic_write, free_name, make_folder, naming
from tinygrad2.machine import usable_threads

T = TypeVar("T")
PART_BYTES = 16 << 10
BATCH_PARTS = 32  # parts per task of the thread pool
BATCHES_AHEAD = 16  # queued batches, besides two per thread, that keep the threads busy while a source is slow
JOURNAL_BYTES = 16 << 20  # bytes of text between two writes of the journal; an interruption loses at most this much
ESTIMATE_BYTES = 64 << 20  # for larger inputs, the disk space and time are estimated first
SHARD_TOKENS = 100_000_000
VAL_FRACTION = 0.05
SMALL_TEXT = 1_000_000  # bytes; the validation split of a smaller text is exact
SMALL_PARTS, SMALLEST_PART = 64, 256  # number of parts of a small text; minimum number of bytes per part
CUT_TOLERANCE = 0.05  # maximum distance to move a cut to a newline or space, as a fraction of the validation split
WIKIPEDIA_URL = re.compile(r"https?://([\w-]+\.)*wikipedia\.org(?![\w.-])")
WIKIPEDIA, WIKIPEDIA_BYTES = b"From Wikipedia, the free encyclopedia", 4096  # searched for in the first bytes
JOURNAL, LOCK, SEEN, DATA = "journal.json", "lock", "seen.bin", "data"  # in OUT.partial


# Filters.


@dataclass(frozen=True)
class Filters:
    """Filters that drop documents, as in WebText (Radford et al., 2019, section 2.1). By default, none are dropped.
    The filters are applied in this order:

    drop_wikipedia   drop documents with a Wikipedia URL, or whose first bytes name Wikipedia as the source.
    min_bytes        drop shorter documents.
    drop_duplicates  drop repeated documents, detected by 8 bytes of their SHA-256. A hash of each document is
                     kept in memory; nothing else in this file grows with the input.
    """

    drop_wikipedia: bool = False
    min_bytes: int = 0
    drop_duplicates: bool = False

    def check(self, document: Document, seen: set[int]) -> tuple[str, int | None]:
        """Return the name of the filter that drops the document, or "", and the digest of the document if it was added
        to `seen`, or None."""
        sha, size, head = hashlib.sha256(), 0, b""
        with document.open() as stream:
            while block := stream.read(1 << 20):
                block = block if size else block.removeprefix(BOM)
                head = head or block[:WIKIPEDIA_BYTES]
                size += len(block)
                sha.update(block)
        if not size:
            return "", None  # empty documents are ignored
        if self.drop_wikipedia and (WIKIPEDIA_URL.match(document.url) or WIKIPEDIA in head):
            return "wikipedia", None
        if size < self.min_bytes:
            return "short", None
        if not self.drop_duplicates:
            return "", None
        digest = int.from_bytes(sha.digest()[:8], "little")
        if digest in seen:
            return "duplicate", None
        seen.add(digest)
        return "", digest


NO_FILTERS = Filters()


# Parts.


@dataclass(frozen=True)
class Part:
    """A part of a document.

    data       the text.
    ends       whether this is the last part of the document.
    cursor     (source, position of the document, byte offset in the document) of the text after this part.
    dropped    the filter that dropped the document. The part then has no text, and represents the entire document.
    digest     the digest of the document, in its first part, if duplicates are dropped.
    continues  whether this part follows another part of the same document.
    """

    data: bytes
    ends: bool
    cursor: tuple[int, int, int]
    dropped: str = ""
    digest: int | None = None
    continues: bool = False


def read_parts(
    sources: Sequence[Source],
    cursor: Sequence[int],
    filters: Filters = NO_FILTERS,
    seen: set[int] | None = None,
    part_bytes: int = PART_BYTES,
) -> Iterator[Part]:
    """Yield all parts from `cursor` on, of at most `part_bytes` each. `seen` contains digests of earlier documents."""
    seen = set() if seen is None else seen
    first, position, offset = cursor
    for k, source in enumerate(sources[first:], first):
        with explained(source, OSError):
            for document in source.documents(position):
                dropped, digest = filters.check(document, seen) if filters != NO_FILTERS and not offset else ("", None)
                if dropped:
                    yield Part(b"", True, (k, document.after, 0), dropped)
                else:
                    with document.open() as stream:
                        continues = offset > 0
                        for data, following, ends in _cut(stream, offset, document.name, part_bytes):
                            after = (k, document.after, 0) if ends else (k, position, following)
                            yield Part(data, ends, after, "", digest, continues)
                            digest, continues = None, True
                position, offset = document.after, 0
        position = 0


def _cut(stream: BinaryIO, offset: int, name: str, part_bytes: int) -> Iterator[tuple[bytes, int, bool]]:
    """Yield (part, offset after it, whether it is the last) of a document, from byte `offset` on. A BOM is skipped."""
    if offset:
        skip(stream, offset)
        data = b""
    else:
        data = stream.read(len(BOM))
        if data == BOM:
            data, offset = b"", len(BOM)
    while True:
        data += stream.read(part_bytes + 1 - len(data))
        if not data:
            return  # the document is empty
        if len(data) <= part_bytes:
            decoded(data, offset, name)
            yield data, offset + len(data), True
            return
        end = _character_start(data, part_bytes)
        text = decoded(data[:end], offset, name)
        part = text[: _cut_point(text)].encode()
        offset += len(part)
        yield part, offset, False
        data = data[len(part) :]


def _character_start(data: bytes, end: int) -> int:
    """The last position up to `end` at which a UTF-8 character starts."""
    start = end
    while start > max(0, end - 3) and data[start] & 0xC0 == 0x80:
        start -= 1
    return start


def _cut_point(text: str) -> int:
    """The length of a part that is not the last part of its document."""
    at_line_end = len(text[: text.rfind("\n") + 1].rstrip())
    if at_line_end:
        return at_line_end
    words = text.rsplit(maxsplit=1)  # [all but the last word, the last word]
    return len(words[0]) if len(words) == 2 else len(text)


# The splits.


@dataclass(frozen=True)
class HashSplit:
    """The split of a large text: a part is for validation if the first 8 bytes of its SHA-256 are below
    val_fraction * 2**64."""

    val_fraction: float
    part_bytes: int = PART_BYTES

    rule = (
        f"documents are cut at newlines into parts of at most {PART_BYTES} bytes; a part is for validation if the "
        "first 8 bytes of its SHA-256 are below val_fraction * 2**64; if none or all are, the last tokens are moved"
    )

    def pieces(self, data: bytes) -> list[tuple[str, bytes]]:
        """Return (split, text) for each piece of a part. There is only one piece, the part itself."""
        return [(split_of(data, self.val_fraction), data)]


@dataclass(frozen=True)
class ExactSplit:
    """The split of a small text.

    validation  the SHA-256 digests of the parts for validation.
    cut         the SHA-256 digest of the part that is cut: its first `cut_bytes` are for validation, in every copy.
    """

    part_bytes: int
    validation: frozenset[bytes]
    cut: bytes
    cut_bytes: int

    rule = (
        f"documents are cut at newlines into parts of about 1/{SMALL_PARTS} of the text; the parts with the first "
        "SHA-256 values are for validation, val_fraction of the bytes, and the last of them is cut there"
    )

    def pieces(self, data: bytes) -> list[tuple[str, bytes]]:
        digest = hashlib.sha256(data).digest()
        if digest == self.cut and self.cut_bytes:
            return [("val", data[: self.cut_bytes]), ("train", data[self.cut_bytes :])]
        return [("val" if digest in self.validation else "train", data)]


def choose_split(sources: Sequence[Source], filters: Filters, val_fraction: float) -> HashSplit | ExactSplit:
    """Choose the split of the text in the sources. It depends only on the text and the fraction. A small text is read
    twice; only the beginning of a large text is read."""
    large = (isinstance(s, HubParquet) or (s.text_size() or 0) > 64 * SMALL_TEXT for s in sources)
    if any(large):  # (some sizes are estimates)
        return HashSplit(val_fraction)
    total = 0
    for part in read_parts(sources, (0, 0, 0), filters):
        total += len(part.data)
        if total >= SMALL_TEXT:
            return HashSplit(val_fraction)
    part_bytes = max(SMALLEST_PART, min(PART_BYTES, total // SMALL_PARTS))
    copies: dict[bytes, list[bytes]] = {}
    for part in read_parts(sources, (0, 0, 0), filters, None, part_bytes):
        if part.data:
            copies.setdefault(hashlib.sha256(part.data).digest(), []).append(part.data)
    left = target = round(val_fraction * total)
    validation: set[bytes] = set()
    for digest in sorted(copies):
        same = copies[digest]
        if left < len(same) * len(same[0]):
            cut_bytes = _nearest_cut(same[0], left // len(same), CUT_TOLERANCE * target / len(same))
            return ExactSplit(part_bytes, frozenset(validation), digest, cut_bytes)
        validation.add(digest)
        left -= len(same) * len(same[0])
    return ExactSplit(part_bytes, frozenset(validation), b"", 0)


def _nearest_cut(data: bytes, size: int, tolerance: float) -> int:
    """The position at which to cut a text near byte `size`: before the whitespace at a newline or between words if that
    is at most `tolerance` bytes earlier, otherwise between characters."""
    text = data[: _character_start(data, size)].decode()
    for shorter in (text[: text.rfind("\n") + 1].rstrip(), text.rsplit(maxsplit=1)[0] if " " in text.strip() else ""):
        cut = len(shorter.encode())
        if size - cut <= tolerance:
            return cut
    return len(text.encode())


# The job.


@dataclass
class State:
    """The progress of a job, as stored in the journal. All shards but the last have shard_tokens tokens, so the token
    counts determine which bytes of which shards are valid. Any bytes after them were written later."""

    cursor: list[int] = field(default_factory=lambda: [0, 0, 0])
    side: str | None = None  # the split of the last part; None between documents
    documents: int = 0
    bytes: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped: dict[str, int] = field(default_factory=dict)  # number of dropped documents, by filter
    seen: int = 0  # number of digests in seen.bin

    @staticmethod
    def of(values: object, sources: int) -> State:
        """Parse the state in the journal of a job with this number of sources. Raises ValueError if it is not valid."""
        if not isinstance(values, dict) or values.keys() != {f.name for f in fields(State)}:
            raise ValueError("its state does not have the fields of this version")
        state = State(**values)
        numbers = {"documents": state.documents, "bytes": state.bytes, "seen": state.seen}
        for name, listed, length in (("tokens", state.tokens, SPLITS), ("dropped", state.dropped, state.dropped)):
            if not isinstance(listed, dict) or set(listed) != set(length):
                raise ValueError(f"{name} is {reprlib.repr(listed)}")
            numbers |= {f"{name}.{key}": number for key, number in listed.items()}
        if not isinstance(state.cursor, list) or len(state.cursor) != 3 or state.side not in (None, *SPLITS):
            raise ValueError(f"cursor is {reprlib.repr(state.cursor)} and side {reprlib.repr(state.side)}")
        numbers |= {f"cursor[{i}]": number for i, number in enumerate(state.cursor)}
        for name, number in numbers.items():
            if type(number) is not int or not 0 <= number < 2**63:
                raise ValueError(f"{name} is {reprlib.repr(number)}; expected an integer from 0 to 2**63 - 1")
        if state.cursor[0] > sources:
            raise ValueError(f"cursor is {state.cursor}, but there are {sources} sources")
        return state


class Shards:
    """The shards of both splits in the folder `work`/data, to which token IDs are appended. If duplicates are dropped,
    also `work`/seen.bin, which contains the digests of the documents."""

    def __init__(self, work: Path, dtype: np.dtype, limit: int):
        self.work, self.folder, self.dtype, self.limit = work, work / DATA, dtype, limit
        self.folder.mkdir(exist_ok=True)
        self.tokens = dict.fromkeys(SPLITS, 0)
        self._open: dict[str, BinaryIO] = {}

    def file(self, split: str, k: int) -> Path:
        return self.folder / f"{split}-{k:05d}.bin"

    def shards(self, split: str, tokens: int) -> Iterator[tuple[Path, int]]:
        """Yield (file, number of tokens) for each shard of a split with this number of tokens."""
        for k, start in enumerate(range(0, tokens, self.limit)):
            yield self.file(split, k), min(self.limit, tokens - start)

    def contain(self, state: State) -> bool:
        """Whether the files contain all tokens and digests counted by the state."""
        files = sum(1 for _ in self.folder.iterdir())
        if sum(-(-tokens // self.limit) for tokens in state.tokens.values()) > files:
            return False
        sizes = {
            file: count * self.dtype.itemsize
            for split in SPLITS
            for file, count in self.shards(split, state.tokens[split])
        }
        sizes |= {self.work / SEEN: 8 * state.seen} if state.seen else {}
        return all(file.is_file() and file.stat().st_size >= size for file, size in sizes.items())

    def restore(self, state: State) -> None:
        """Remove all tokens and digests beyond those counted by the state."""
        tokens = self.tokens = dict(state.tokens)
        kept = {file: count for split in SPLITS for file, count in self.shards(split, tokens[split])}
        for file in chain.from_iterable(self.folder.glob(f"{split}-*.bin") for split in SPLITS):
            if file in kept:
                os.truncate(file, kept[file] * self.dtype.itemsize)
            else:
                file.unlink()
        if (self.work / SEEN).exists():
            os.truncate(self.work / SEEN, 8 * state.seen)

    def seen(self) -> set[int]:
        """The digests stored by `remember`."""
        file = self.work / SEEN
        return set(np.fromfile(file, "<u8").tolist()) if file.exists() else set()

    def remember(self, digest: int) -> None:
        if SEEN not in self._open:
            self._open[SEEN] = (self.work / SEEN).open("ab")
        self._open[SEEN].write(digest.to_bytes(8, "little"))

    def append(self, split: str, ids: np.ndarray) -> None:
        ids = ids.astype(self.dtype)
        while len(ids):
            k, used = divmod(self.tokens[split], self.limit)
            if split not in self._open:
                self._open[split] = self.file(split, k).open("ab")
            piece = ids[: self.limit - used]
            self._open[split].write(piece.tobytes())
            self.tokens[split] += len(piece)
            ids = ids[len(piece) :]
            if self.tokens[split] % self.limit == 0:
                _sync(self._open.pop(split))

    def read(self, split: str, start: int, count: int) -> np.ndarray:
        """Read at most `count` token IDs of a split from position `start` on, from one shard."""
        k, used = divmod(start, self.limit)
        return np.fromfile(
            self.file(split, k), self.dtype, min(count, self.limit - used), offset=used * self.dtype.itemsize
        )

    def close(self) -> None:
        """Flush all files to disk and close them."""
        while self._open:
            _sync(self._open.popitem()[1])


def prepare(
    sources: Sequence[str],
    tokenizer: str | Path = "gpt2",
    out: str | Path | None = None,
    *,
    val_fraction: float | None = None,
    shard_tokens: int = SHARD_TOKENS,
    threads: int | None = None,
    text_key: str = "text",
    delimiter: str = "",
    encoding: str = "",
    drop_wikipedia: bool = False,
    min_bytes: int = 0,
    drop_duplicates: bool = False,
    special_tokens: bool = False,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Create the data set `out` (by default data/NAME of the first source) from `sources`. Returns its folder.

    Files are written to OUT.partial; its folder `data` is renamed to `out` when it is complete. After an interruption,
    the same call resumes from the journal in OUT.partial. An existing `out` is an error unless `fresh` is true; then it
    is renamed first.

    val_fraction    fraction of the text for validation; None for the default of the data set.
    shard_tokens    maximum number of tokens per file.
    threads         number of tokenizer threads; None for one per core.
    text_key        the key or column that contains the text.
    delimiter       delimiter of .csv and .tsv files: one character, or "tab"; "" detects it from the header.
    encoding        encoding of the files that are not UTF-8.
    special_tokens  encode the text of a special or added token as that token instead of as plain text.

    See Filters for drop_wikipedia, min_bytes and drop_duplicates. Raises ValueError or OSError with a one-line message
    for an invalid argument or source, or a full disk.
    """
    if not sources:
        raise ValueError("sources: none given; expected files, folders, '-', or a named data set such as 'pydoc'")
    if val_fraction is None:
        val_fraction = VAL_FRACTIONS.get(sources[0], VAL_FRACTION)
    delimiter = "\t" if delimiter in ("tab", "\\t") else delimiter
    filters = Filters(drop_wikipedia, min_bytes, drop_duplicates)
    _check_arguments(sources, val_fraction, shard_tokens, threads, delimiter, encoding, filters)
    out = Path(out) if out is not None else default_out(sources[0])
    _check_new(out, fresh)
    begin = time.perf_counter()
    vocabulary = Tokenizer.load(tokenizer)
    if special_tokens and not vocabulary.added:
        raise ValueError(f"--special-tokens: the tokenizer {vocabulary.name} has no special tokens")
    found = find_sources(sources, text_key, say, delimiter, encoding)
    job = Job.of(found, vocabulary, filters, val_fraction, shard_tokens, special_tokens)
    partial = out.with_name(out.name + ".partial")
    make_folder(partial)
    with Lock(partial / LOCK, str(out)), naming(partial):
        _check_new(out, fresh)  # another process may have created it in the meantime
        shards = Shards(partial, token_dtype(vocabulary.vocab_size), shard_tokens)
        state = _load_journal(shards, job, say)
        shards.restore(state)
        _make(job, threads or usable_threads(), state, shards, say)
        if not state.documents:
            shutil.rmtree(partial)
            more = (
                f", except in the documents that were dropped ({_describe_dropped(state.dropped)})"
                if state.dropped
                else ""
            )
            raise ValueError(f"sources {' '.join(sources)}: no text found{more}")
        _move(out, shards, say)
    _print_summary(out, state, filters, time.perf_counter() - begin, say)
    return out


@dataclass(frozen=True)
class Job:
    """The inputs of a data set.

    record  the inputs as JSON, for the journal. It differs if a source or an option has changed.
    """

    sources: list[Source]
    tokenizer: Tokenizer
    filters: Filters
    val_fraction: float
    special_tokens: bool
    record: JsonObject

    @staticmethod
    def of(
        sources: list[Source],
        tokenizer: Tokenizer,
        filters: Filters,
        val_fraction: float,
        shard_tokens: int,
        special_tokens: bool,
    ) -> Job:
        record = {
            "format": FORMAT,
            "sources": [source.identity() for source in sources],
            "filters": asdict(filters),
            "tokenizer": tokenizer.describe(),
            "val_fraction": val_fraction,
            "shard_tokens": shard_tokens,
            **({"special_tokens": True} if special_tokens else {}),  # (omitted if false, as in earlier versions)
        }
        return Job(sources, tokenizer, filters, val_fraction, special_tokens, record)


def _check_arguments(
    sources: Sequence[str],
    val_fraction: float,
    shard_tokens: int,
    threads: int | None,
    delimiter: str,
    encoding: str,
    filters: Filters,
) -> None:
    """Raise ValueError for an invalid argument of `prepare`."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val-fraction is {val_fraction}; expected 0 < fraction < 1")
    for option, value in (("--shard-tokens", shard_tokens), ("--threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}; expected at least 1")
    if filters.min_bytes < 0:
        raise ValueError(f"--min-bytes is {filters.min_bytes}; expected at least 0")
    if len(delimiter) > 1 or delimiter in ('"', "\n", "\r"):
        raise ValueError(f"--delimiter is {delimiter!r}; expected one character, or tab")
    _check_encoding(encoding)
    if "-" in sources and filters != NO_FILTERS:
        raise ValueError("source -: filters read a document twice, and stdin can be read only once; save it to a file")


def _make(job: Job, threads: int, state: State, shards: Shards, say: Callable[[str], None]) -> None:
    """Write all files of the data set to the folder of the shards, if the sources contain any text."""
    for hub_set in HUB_SETS.values():
        if any(isinstance(source, HubParquet) and source.repo == hub_set.repo for source in job.sources):
            say(
                f"{hub_set.repo} at revision {hub_set.revision[:7]}: {len(hub_set.files)} files, about "
                f"{hub_set.download / 1e9:.1f} GB in total; they are streamed, and only their tokens are kept"
            )
    sizes = [source.text_size() for source in job.sources]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    _estimate(job, total, threads, state, shards, say)
    split = choose_split(job.sources, job.filters, job.val_fraction)
    _write_tokens(job, total, split, threads, state, shards)
    _fill_validation(job, state, shards)
    if state.documents:
        _write_manifest(job, split, state, shards)


def _move(out: Path, shards: Shards, say: Callable[[str], None]) -> None:
    """Rename the complete data set to `out`."""
    if os.path.lexists(out):
        say(f"{out}: renamed to {out.rename(free_name(out, separator='.'))}")
    shards.folder.rename(out)
    shutil.rmtree(shards.work, ignore_errors=True)


def _print_summary(out: Path, state: State, filters: Filters, seconds: float, say: Callable[[str], None]) -> None:
    tokens = sum(state.tokens.values())
    say(
        f"{out}: {state.documents:,} documents, {state.tokens['train']:,} training and {state.tokens['val']:,} "
        f"validation tokens, {state.bytes / tokens:.2f} bytes per token, {seconds:.1f} s"
        + (f"; dropped {_describe_dropped(state.dropped)}" if filters != NO_FILTERS else "")
    )


def _check_new(out: Path, fresh: bool) -> None:
    if os.path.lexists(out) and not fresh:
        raise FileExistsError(f"{out}: already exists; choose another --out, or use --fresh to rename it")


def _check_encoding(name: str) -> None:
    """Raise ValueError unless the name is "" or that of an encoding known to Python."""
    try:
        codecs.lookup(name or "utf-8")
        "".encode(name or "utf-8")
    except (LookupError, ValueError):
        raise ValueError(
            f"--encoding {name}: unknown; expected a name that Python knows, such as cp1252, utf-16 or shift_jis"
        ) from None


def _describe_dropped(dropped: dict[str, int]) -> str:
    return ", ".join(f"{dropped[name]:,} {name}" for name in sorted(dropped)) or "no document"


def default_out(source: str) -> Path:
    """The default folder data/NAME for a source."""
    path = Path(source).resolve()
    return Path("data") / ("stdin" if source == "-" else path.name if path.is_dir() else unpacked_name(path).stem)


def _estimate(
    job: Job,
    total: int | None,
    threads: int,
    state: State,
    shards: Shards,
    say: Callable[[str], None],
) -> None:
    """Print an estimate of the disk space and time for a large job, with `total` bytes of text, from its first parts.

    Raises ValueError if the disk clearly does not have enough space.
    """
    left = (total or 0) - state.bytes
    if left < ESTIMATE_BYTES:
        return
    parts = list(islice(read_parts(job.sources, state.cursor), threads * BATCH_PARTS))
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        tokens = sum(pool.map(lambda part: len(job.tokenizer.encode(part.data.decode())), parts))
        seconds = time.perf_counter() - begin
    share = left / max(1, sum(len(part.data) for part in parts))
    need, free = tokens * share * shards.dtype.itemsize, shutil.disk_usage(shards.folder).free
    say(
        f"{shards.work}: about {float(f'{tokens * share:.2g}'):,.0f} tokens: {need / 1e9:.2f} GB of the "
        f"{free / 1e9:.2f} GB free, and {timedelta(seconds=round(seconds * share))} at "
        f"{left / 1e6 / (seconds * share):.1f} MB of text per second on {threads} threads, if the source is fast enough"
    )
    if 0.9 * need > free:
        raise ValueError(f"{shards.work}: not enough disk space; free some space, or choose another disk with --out")


def _load_journal(shards: Shards, job: Job, say: Callable[[str], None]) -> State:
    """The state of an earlier, interrupted run of the same job, or the initial state."""
    partial, file = shards.work, shards.work / JOURNAL
    if not file.exists():
        return State()
    try:
        journal = read_json(file)
        state = State.of(journal.get("state"), len(job.sources))
    except (ValueError, TypeError) as error:
        say(f"{error if str(file) in str(error) else f'{file}: {error}'}; starting over")
        return State()
    if ["-"] in job.record["sources"]:
        say(f"{partial}: stdin cannot be read again; starting over")
        return State()
    if journal.get("job") != job.record:
        say(f"{partial}: the sources or options have changed since the interruption; starting over")
        return State()
    if not shards.contain(state):
        say(f"{partial}: shards are missing or truncated; starting over")
        return State()
    say(f"{partial}: resuming after {state.documents:,} documents and {sum(state.tokens.values()):,} tokens")
    return state


def _save_journal(job: Job, state: State, shards: Shards) -> None:
    shards.close()
    state.tokens = dict(shards.tokens)
    with atomic_write(shards.work / JOURNAL) as partial:
        write_json(partial, {"job": job.record, "state": asdict(state)})


def _write_tokens(
    job: Job, total: int | None, split: HashSplit | ExactSplit, threads: int, state: State, shards: Shards
) -> None:
    """Read, split and tokenize all text after the state's cursor, and append it to the shards. Tokenization runs in
    threads, since tiktoken releases the GIL."""
    tokenizer = job.tokenizer
    end_of_text = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], np.int64)

    def tokenize(part: Part) -> list[tuple[str, np.ndarray]]:
        pieces = enumerate(split.pieces(part.data))
        return [
            (side, tokenizer.encode(text.decode(), job.special_tokens, part.continues or i > 0))
            for i, (side, text) in pieces
        ]

    def tokenize_parts(parts: list[Part]) -> list[list[tuple[str, np.ndarray]]]:
        return [tokenize(part) for part in parts]

    unread = read_parts(job.sources, state.cursor, job.filters, shards.seen(), split.part_bytes)
    journaled = state.bytes
    with (
        tqdm(total=total, initial=state.bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        for parts, encoded in _in_order(pool, tokenize_parts, unread, 2 * threads + BATCHES_AHEAD):
            for part, pieces in zip(parts, encoded, strict=True):
                if part.dropped:
                    state.dropped[part.dropped] = state.dropped.get(part.dropped, 0) + 1
                    continue
                if part.digest is not None:
                    shards.remember(part.digest)
                    state.seen += 1
                for side, ids in pieces:
                    if state.side not in (None, side):
                        shards.append(str(state.side), end_of_text)
                    shards.append(side, ids)
                    state.side = side
                if part.ends:
                    shards.append(str(state.side), end_of_text)
                    state.side = None
                state.documents += part.ends
                state.bytes += len(part.data)
                bar.update(len(part.data))
            state.cursor = list(parts[-1].cursor)
            if state.bytes - journaled >= JOURNAL_BYTES:
                _save_journal(job, state, shards)
                journaled = state.bytes
    state.cursor = [len(job.sources), 0, 0]
    _save_journal(job, state, shards)


def split_of(data: bytes, val_fraction: float) -> str:
    """The split of a part: "val" if the first 8 bytes of its SHA-256 are below val_fraction * 2**64, else "train"."""
    return SPLITS[int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < val_fraction * 2**64]


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[list[Part]], T], parts: Iterator[Part], ahead: int
) -> Iterator[tuple[list[Part], T]]:
    """Yield (batch, function(batch)) for batches of `parts`, in order, with at most `ahead` batches in memory."""
    waiting: deque[tuple[list[Part], Future[T]]] = deque()
    batch = list(islice(parts, BATCH_PARTS))
    while batch or waiting:
        if batch:
            waiting.append((batch, pool.submit(function, batch)))
            batch = list(islice(parts, BATCH_PARTS))
        if not batch or len(waiting) == ahead:
            done, future = waiting.popleft()
            yield done, future.result()


def _fill_validation(job: Job, state: State, shards: Shards) -> None:
    """If a split is empty, move its fraction of the tokens to it from the end of the other split.

    The journal is written after the copy and before the truncation, so that an interruption loses nothing.
    """
    for empty, full, share in (("val", "train", job.val_fraction), ("train", "val", 1 - job.val_fraction)):
        if shards.tokens[empty] or shards.tokens[full] < 2:
            continue
        total = shards.tokens[full]
        kept = total - min(max(1, round(total * share)), total - 1)
        start = kept
        while start < total:
            ids = shards.read(full, start, 1 << 20)
            shards.append(empty, ids)
            start += len(ids)
        shards.close()
        shards.tokens[full] = kept
        _save_journal(job, state, shards)
        shards.restore(state)


def _write_manifest(job: Job, split: HashSplit | ExactSplit, state: State, shards: Shards) -> None:
    job.tokenizer.save(shards.folder)
    manifest = {
        "format": FORMAT,
        "tokenizer": job.tokenizer.describe(),
        "dtype": shards.dtype.name,
        "documents": state.documents,
        "dropped": {"filters": asdict(job.filters), "documents": state.dropped},
        "bytes": state.bytes,
        "tokens": shards.tokens,
        "split_rule": {
            "val_fraction": job.val_fraction,
            "text": split.rule,
        },
        "end_of_text": "after each document, and where the next part of a document is in the other split",
        **{name: value for name, value in job.record.items() if name == "special_tokens"},
        "sources": [{"source": str(source), "bytes": source.size()} for source in job.sources],
        "shards": [
            {"file": file.name, "split": split, "tokens": tokens, "sha256": file_sha256(file)}
            for split in SPLITS
            for file, tokens in shards.shards(split, shards.tokens[split])
        ],
    }
    with atomic_write(shards.folder / MANIFEST) as partial:
        write_json(partial, manifest)


def _sync(stream: BinaryIO) -> None:
    """Flush a file to disk and close it."""
    with stream:
        stream.flush()
        os.fsync(stream.fileno())


def command_line() -> Parser:
    parser = Parser(
        console.script("prepare"),
        "Turn text into a token data set for train.py. After an interruption, the same command resumes.",
        "SOURCE...",
        familiar=familiar_options.PREPARE,
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a file (text, .jsonl, .csv, .tsv, .parquet; all but the last also as .gz or .zst), a folder of such "
        "files, - for stdin, or a named data set: " + ", ".join(NAMES),
    )
    group.add_argument(
        "--text-key",
        "--text-column",
        default="text",
        metavar="NAME",
        help="the key (.jsonl) or column (.csv, .tsv, .parquet) that contains the text",
    )
    group.add_argument(
        "--delimiter",
        default="",
        metavar="CHARACTER",
        help="delimiter of .csv and .tsv files: a character, or tab [default: detected from the header]",
    )
    group.add_argument(
        "--encoding",
        default="",
        metavar="NAME",
        help="encoding of files that are not UTF-8, such as cp1252 or utf-16 [default: none; such files are rejected]",
    )
    group = parser.add_argument_group("filters")
    group.add_argument("--drop-wikipedia", action="store_true", help="drop documents from Wikipedia")
    group.add_argument("--min-bytes", type=int, default=0, metavar="BYTES", help="drop shorter documents")
    group.add_argument("--drop-duplicates", action="store_true", help="drop repeated documents")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder of the data set [default: data/NAME of the first source]"
    )
    group.add_argument("--fresh", action="store_true", help="first rename an existing data set of this name")
    group.add_argument("--tokenizer", default="gpt2", metavar="NAME", help="gpt2, bytes, a .tiktoken file, or a folder")
    group.add_argument(
        "--special-tokens",
        action="store_true",
        help="encode special tokens in the text, such as <|endoftext|>, as single tokens instead of plain text",
    )
    group.add_argument(
        "--val-fraction",
        type=float,
        metavar="X",
        help=f"fraction of the text for validation [default: {VAL_FRACTION}; "
        + ", ".join(f"{name}: {fraction}" for name, fraction in VAL_FRACTIONS.items())
        + "]",
    )
    group.add_argument(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="TOKENS",
        help="maximum number of tokens per file",
    )
    group = parser.add_argument_group("computation")
    group.add_argument("--threads", type=int, metavar="N", help="number of tokenizer threads [default: one per core]")
    return parser


@console.command(console.script_name("prepare"))
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 1 if the data set was not created."""
    parser = command_line()
    given = sys.argv[1:] if arguments is None else arguments
    options = vars(parser.parse_args(given))
    if "" in given:
        parser.error("an argument is empty")
    repeatable = "-" not in options["sources"]
    with console.on_interrupt("the same command resumes" if repeatable else "stdin cannot be read again; start over"):
        out = prepare(**options, say=console.say_if_possible)
    name = out.name if out.resolve() == (Path("data") / out.name).resolve() else out
    context = min(TokenDataset.open(out, split).tokens for split in SPLITS) - 1
    shorter = f" --block-size {context}" if 0 < context < GPT2Config.preset("nano").n_positions else ""
    command = f"{console.script('train')} --data {shlex.quote(str(name))} --out-dir out-{shlex.quote(out.name)}"
    console.say_if_possible(f"next: {command}{shorter}")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
