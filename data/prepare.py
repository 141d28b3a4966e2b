"""Text to a token data set: `python data/prepare.py SOURCE... [--tokenizer gpt2|bytes|PATH] [--out data/NAME]`.

A source is `pydoc` (the documentation inside every Python), a text file in UTF-8, a .jsonl file (one document a line),
a folder of such files, or `-` (stdin). The result is what gpt2/dataset.py reads, byte for byte the same whatever the
number of threads and however often the work was interrupted.

A document is taken in parts of at most 16 KiB, so that memory stays bounded. A part ends before the white space around
its last line end: GPT-2's pattern never joins a character and white space after it, so the tokens are those of the
uncut text. (Without a line end it ends before the last white space, and without that, at 16 KiB, within a word.) The
SHA-256 of its text decides on which side a part goes, so that equal parts never stand in both. End-of-text follows
wherever the text that comes next in a split is not its continuation: after each document, and where the side changes.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import shlex
import shutil
import sys
import sysconfig
import time
import tokenize
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from gpt2.dataset import FORMAT, MANIFEST, SPLITS, file_sha256, token_dtype
from gpt2.options import Parser
from gpt2.tokenizer import Tokenizer
from tinygrad2.checkpoint import Lock

PART_BYTES = 16 << 10
BATCH_PARTS = 32  # parts per task of a thread
JOURNAL_BYTES = 16 << 20  # source bytes between two entries of the journal: what an interruption loses at most
LINE_BYTES = 256 << 20  # a JSON line is read whole, so it has a limit
SHARD_TOKENS = 100_000_000
BOM = b"\xef\xbb\xbf"
JOURNAL, LOCK = "journal.json", "lock"
JSON_LINES = (".jsonl", ".ndjson")
NOT_TEXT = (".json", ".tiktoken")  # nor is a file with a zero byte near its beginning
STDLIB_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "__pycache__"}


# Sources. `documents(start)` yields (position after the document, its bytes) from the document at position `start` on.


@dataclass(frozen=True)
class TextFile:
    """One file, one document; position 0 is the document and 1 the end."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def size(self) -> int:
        return self.path.stat().st_size

    def identity(self) -> list[Any]:
        return [str(self.path.resolve()), self.size(), self.path.stat().st_mtime_ns]

    def documents(self, start: int) -> Iterator[tuple[int, BinaryIO]]:
        if start == 0:
            with self.path.open("rb") as stream:
                yield 1, stream


@dataclass(frozen=True)
class JsonLines(TextFile):
    """One line, one document: a JSON object's string under `key`. A position is a byte offset in the file."""

    key: str

    def documents(self, start: int) -> Iterator[tuple[int, BinaryIO]]:
        with self.path.open("rb") as stream:
            stream.seek(start)
            while line := stream.readline(LINE_BYTES + 1):
                if len(line) > LINE_BYTES:
                    raise ValueError(
                        f"{self.path}: byte {start}: the line is longer than {LINE_BYTES >> 20} MiB; split it"
                    )
                begin, start = start, stream.tell()
                if line.strip(BOM + b" \t\r\n"):
                    yield start, io.BytesIO(self._text(line, begin))

    def _text(self, line: bytes, begin: int) -> bytes:
        try:
            text = json.loads(line.removeprefix(BOM))[self.key]
            if not isinstance(text, str):
                raise TypeError(f"{self.key!r} is of type {type(text).__name__}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{self.path}: line {_line_number(self.path, begin)}: expected a JSON object with a string under "
                f"{self.key!r} (--text-key), got {line[:40]!r} ({reason})"
            ) from None
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()  # lone surrogates: U+FFFD


@dataclass(frozen=True)
class Stdin:
    """All of stdin, one document. It cannot be read again, so there is no going on after an interruption."""

    def __str__(self) -> str:
        return "-"

    def size(self) -> None:
        """Unknown."""

    def identity(self) -> list[Any]:
        return ["-"]

    def documents(self, start: int) -> Iterator[tuple[int, BinaryIO]]:
        if start == 0:
            if sys.stdin is None:
                raise ValueError("-: stdin is closed; pipe the text in, or name a file")
            yield 1, sys.stdin.buffer


@dataclass(frozen=True)
class Pydoc:
    """The embedded corpus; a position is the number of documents before it."""

    say: Callable[[str], None]

    def __str__(self) -> str:
        return "pydoc"

    @cached_property
    def texts(self) -> list[str]:
        return pydoc_corpus(self.say)

    def size(self) -> int:
        return sum(len(text.encode()) for text in self.texts)

    def identity(self) -> list[Any]:
        return ["pydoc", hashlib.sha256("\0".join(self.texts).encode()).hexdigest()]

    def documents(self, start: int) -> Iterator[tuple[int, BinaryIO]]:
        for i, text in enumerate(self.texts[start:], start + 1):
            yield i, io.BytesIO(text.encode())


Source = TextFile | Stdin | Pydoc


def pydoc_corpus(say: Callable[[str], None] = print) -> list[str]:
    """The language reference's topics, and the docstrings of each module of the standard library: about 2 MB.

    One document per topic and per module. Modules are parsed, never imported; what is said twice is kept once.
    """
    documents = []
    try:
        from pydoc_data.topics import topics

        documents += [topics[name].strip() + "\n" for name in sorted(topics)]
    except ImportError:
        say("pydoc: this Python has no pydoc_data.topics; taking the docstrings only")
    seen: set[str] = set()
    for file in sorted(_stdlib_files(Path(sysconfig.get_paths()["stdlib"]))):
        docstrings = dict.fromkeys(text for text in _docstrings(file) if text not in seen)
        seen.update(docstrings)
        if docstrings:
            documents.append("\n\n".join(docstrings) + "\n")
    return list(dict.fromkeys(documents))


def _stdlib_files(stdlib: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(stdlib):
        folders[:] = [name for name in folders if name not in STDLIB_SKIPPED]
        yield from (Path(folder) / name for name in files if name.endswith(".py"))


def _docstrings(file: Path) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, in the order of the file."""
    try:
        with tokenize.open(file) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's code
            tree = ast.parse(stream.read())
    except (SyntaxError, UnicodeDecodeError):  # files kept for other versions of Python
        return
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if text:
                yield text.encode("utf-8", "replace").decode()  # a lone surrogate is no UTF-8
        todo += [child for child in reversed(list(ast.iter_child_nodes(node))) if isinstance(child, ast.stmt)]


def find_sources(names: Sequence[str], text_key: str, say: Callable[[str], None]) -> list[Source]:
    """The sources that the command line names, folders replaced by the files in them (sorted, hidden ones left out)."""
    sources: list[Source] = []
    for name in names:
        path = Path(name)
        if name == "pydoc":
            sources.append(Pydoc(say))
        elif name == "-":
            if "-" in map(str, sources):
                raise ValueError("source -: stdin is named twice; it can be read once")
            sources.append(Stdin())
        elif path.is_dir():
            found, skipped = _files_in(path)
            if not found:
                raise ValueError(f"source {path}: the folder has no text, Markdown or .jsonl file")
            if skipped:
                some = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
                say(f"{path}: skipped {len(skipped)} files that are no text: {some}")
            sources += [_file_source(file, text_key) for file in found]
        elif not path.exists():
            raise FileNotFoundError(f"source {name}: there is no such file or folder (nor is it 'pydoc' or '-')")
        elif not path.is_file():
            raise ValueError(f"source {name}: it is no regular file; pipe it into stdin and name '-'")
        elif not _is_text(path):
            raise ValueError(f"source {name}: it is no text; expected text in UTF-8 or JSON lines (.jsonl)")
        else:
            sources.append(_file_source(path, text_key))
    return sources


def _file_source(path: Path, text_key: str) -> TextFile:
    return JsonLines(path, text_key) if path.suffix.lower() in JSON_LINES else TextFile(path)


def _files_in(folder: Path) -> tuple[list[Path], list[str]]:
    found, skipped = [], []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent) / name for name in files if not name.startswith(".")):
            if not path.is_file() or not _is_text(path):
                skipped.append(str(path.relative_to(folder)))
            else:
                found.append(path)
    return sorted(found), sorted(skipped)


def _is_text(path: Path) -> bool:
    with path.open("rb") as stream:
        return path.suffix.lower() not in NOT_TEXT and b"\0" not in stream.read(4096)


def _line_number(path: Path, offset: int) -> int:
    with path.open("rb") as stream:
        blocks = iter(lambda: stream.read(min(1 << 20, offset - stream.tell())), b"")
        return 1 + sum(block.count(b"\n") for block in blocks)


# Parts.


@dataclass(frozen=True)
class Part:
    """A piece of a document, and the cursor (source, position of the document, byte offset in it) of what follows."""

    data: bytes
    ends: bool  # the document
    cursor: tuple[int, int, int]


def read_parts(sources: Sequence[Source], cursor: Sequence[int]) -> Iterator[Part]:
    """Every part from `cursor` on."""
    first, position, offset = cursor
    for k, source in enumerate(sources[first:], first):
        for after, stream in source.documents(position):
            for data, following, ends in _cut(stream, offset, str(source)):
                yield Part(data, ends, (k, after, 0) if ends else (k, position, following))
            position, offset = after, 0
        position = 0


def _cut(stream: BinaryIO, offset: int, name: str) -> Iterator[tuple[bytes, int, bool]]:
    """(part, the offset after it, whether it is the last) of one document from byte `offset` on; a BOM is left out."""
    if offset:
        stream.seek(offset)
        data = b""
    else:
        data = stream.read(len(BOM))
        if data == BOM:
            data, offset = b"", len(BOM)
    while True:
        data += stream.read(PART_BYTES + 1 - len(data))
        if not data:
            return  # only an empty document
        if len(data) <= PART_BYTES:
            _decode(data, offset, name)
            yield data, offset + len(data), True
            return
        end = PART_BYTES
        while end > PART_BYTES - 3 and data[end] & 0xC0 == 0x80:  # within a character
            end -= 1
        text = _decode(data[:end], offset, name)
        part = text[: _cut_point(text)].encode()
        offset += len(part)
        yield part, offset, False
        data = data[len(part) :]


def _decode(data: bytes, offset: int, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {offset + error.start} is no UTF-8 (0x{data[error.start]:02x}); expected text in UTF-8, "
            f"convert it, for example with iconv"
        ) from None


def _cut_point(text: str) -> int:
    """Where a part that is not the document's last ends."""
    at_line_end = len(text[: text.rfind("\n") + 1].rstrip())
    if at_line_end:
        return at_line_end
    words = text.rsplit(maxsplit=1)  # [all but the last word, the last word]
    return len(words[0]) if len(words) == 2 else len(text)


# The job.


@dataclass
class State:
    """How far the work is: all that the journal holds besides the job. Shards are cut at shard_tokens, so the counts of
    tokens say exactly which bytes of which shards belong to it; what else stands there came later and is dropped."""

    cursor: list[int] = field(default_factory=lambda: [0, 0, 0])
    side: str | None = None  # of the last part, within a document
    documents: int = 0
    bytes: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))


class Shards:
    """The shards of both splits in a folder, as append-only lines of ids."""

    def __init__(self, folder: Path, dtype: np.dtype, limit: int):
        self.folder, self.dtype, self.limit = folder, dtype, limit
        self.tokens = dict.fromkeys(SPLITS, 0)
        self._open: dict[str, BinaryIO] = {}

    def file(self, split: str, k: int) -> Path:
        return self.folder / f"{split}-{k:05d}.bin"

    def shards(self, split: str, tokens: int) -> Iterator[tuple[Path, int]]:
        """(file, its tokens) of each shard of a split of so many tokens."""
        for k, start in enumerate(range(0, tokens, self.limit)):
            yield self.file(split, k), min(self.limit, tokens - start)

    def hold(self, tokens: dict[str, int]) -> bool:
        """Whether the folder has at least these tokens."""
        return all(
            file.is_file() and file.stat().st_size >= count * self.dtype.itemsize
            for split in SPLITS
            for file, count in self.shards(split, tokens[split])
        )

    def restore(self, tokens: dict[str, int]) -> None:
        """Drop what lies beyond these counts."""
        self.tokens = dict(tokens)
        kept = {file: count for split in SPLITS for file, count in self.shards(split, tokens[split])}
        for file in chain.from_iterable(self.folder.glob(f"{split}-*.bin") for split in SPLITS):
            if file in kept:
                os.truncate(file, kept[file] * self.dtype.itemsize)
            else:
                file.unlink()

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
        """Ids of one shard, from `start` on, at most `count`."""
        k, used = divmod(start, self.limit)
        return np.fromfile(
            self.file(split, k), self.dtype, min(count, self.limit - used), offset=used * self.dtype.itemsize
        )

    def close(self) -> None:
        """All that was appended is on the disk."""
        while self._open:
            _sync(self._open.popitem()[1])


def prepare(
    sources: Sequence[str],
    tokenizer: str | Path = "gpt2",
    out: str | Path | None = None,
    *,
    val_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    threads: int | None = None,
    text_key: str = "text",
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Make the data set `out` (by default data/NAME of the first source) from `sources`; returns its folder.

    The work is done in OUT.partial, which is renamed when all is written. After an interruption the same call goes on
    where the journal there stands. An existing `out` is refused, or renamed away first if `fresh`.

    Raises ValueError or OSError with one line for a mistake in the arguments, in a source, or for a disk that is full.
    """
    if not sources:
        raise ValueError("sources: none is named; expected 'pydoc', files, folders or '-'")
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val-fraction is {val_fraction}; expected 0 < fraction < 1")
    for option, value in (("--shard-tokens", shard_tokens), ("--threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}; expected at least 1")
    out = Path(out) if out is not None else default_out(sources[0])
    if os.path.lexists(out) and not fresh:
        raise FileExistsError(f"{out}: it exists already; choose another --out, or give --fresh to rename it away")
    begin = time.perf_counter()
    vocabulary = Tokenizer.load(tokenizer)
    found = find_sources(sources, text_key, say)
    job = {
        "format": FORMAT,
        "sources": [[*source.identity(), text_key if isinstance(source, JsonLines) else None] for source in found],
        "tokenizer": vocabulary.describe(),
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
    }
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with Lock(partial / LOCK, str(out)) as lock:
        shards = Shards(partial, token_dtype(vocabulary.vocab_size), shard_tokens)
        state = _load_journal(shards, job, say)
        shards.restore(state.tokens)
        try:
            _write_tokens(found, vocabulary, val_fraction, threads or os.cpu_count() or 1, job, state, shards)
            _fill_validation(val_fraction, job, state, shards)
            if state.documents:
                _write_manifest(found, vocabulary, val_fraction, state, shards)
        except OSError as error:
            error.filename = error.filename or str(partial)  # write() does not say which file
            raise
        if not state.documents:
            shutil.rmtree(partial)
            raise ValueError(f"sources {' '.join(sources)}: they have no text")
        if os.path.lexists(out):
            say(f"{out}: renamed to {_rename_away(out)}")
        partial.rename(out)
        lock.file = out / LOCK
        (out / JOURNAL).unlink()
    tokens = sum(state.tokens.values())
    say(
        f"{out}: {state.documents:,} documents, {state.tokens['train']:,} training and {state.tokens['val']:,} "
        f"validation tokens, {state.bytes / tokens:.2f} bytes per token, {time.perf_counter() - begin:.1f} s"
    )
    return out


def default_out(source: str) -> Path:
    """data/NAME of a source."""
    path = Path(source).resolve()
    return Path("data") / ("stdin" if source == "-" else path.name if path.is_dir() else path.stem)


def _load_journal(shards: Shards, job: dict[str, Any], say: Callable[[str], None]) -> State:
    """Where an earlier run of the same job stopped, else the beginning."""
    partial = shards.folder
    try:
        journal = json.loads((partial / JOURNAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return State()
    if ["-", None] in job["sources"]:
        say(f"{partial}: stdin cannot be read again; starting anew")
        return State()
    if journal["job"] != job:
        say(f"{partial}: the sources or options have changed since the interruption; starting anew")
        return State()
    state = State(**journal["state"])
    if not shards.hold(state.tokens):
        say(f"{partial}: shards are missing or truncated; starting anew")
        return State()
    say(f"{partial}: going on after {state.documents:,} documents and {sum(state.tokens.values()):,} tokens")
    return state


def _save_journal(job: dict[str, Any], state: State, shards: Shards) -> None:
    shards.close()
    state.tokens = dict(shards.tokens)
    temporary = shards.folder / (JOURNAL + ".new")
    _write_synced(temporary, {"job": job, "state": asdict(state)})
    temporary.replace(shards.folder / JOURNAL)


def _write_tokens(
    sources: list[Source],
    tokenizer: Tokenizer,
    val_fraction: float,
    threads: int,
    job: dict[str, Any],
    state: State,
    shards: Shards,
) -> None:
    """Read, cut, tokenize (in threads: tiktoken releases the GIL) and append every part after the state's cursor."""
    end_of_text = np.array([tokenizer.end_of_text])

    def tokenize_parts(parts: list[Part]) -> list[tuple[str, np.ndarray]]:
        return [(side_of(part.data, val_fraction), tokenizer.encode(part.data.decode())) for part in parts]

    total = sum(source.size() or 0 for source in sources)
    journalled = state.bytes
    with (
        tqdm(total=total or None, initial=state.bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        for parts, encoded in _in_order(pool, tokenize_parts, read_parts(sources, state.cursor), 2 * threads):
            for part, (side, ids) in zip(parts, encoded, strict=True):
                if state.side not in (None, side):
                    shards.append(str(state.side), end_of_text)
                shards.append(side, ids)
                if part.ends:
                    shards.append(side, end_of_text)
                state.side = None if part.ends else side
                state.documents += part.ends
                state.bytes += len(part.data)
                bar.update(len(part.data))
            state.cursor = list(parts[-1].cursor)
            if state.bytes - journalled >= JOURNAL_BYTES:
                _save_journal(job, state, shards)
                journalled = state.bytes
    state.cursor = [len(sources), 0, 0]
    _save_journal(job, state, shards)


def side_of(data: bytes, val_fraction: float) -> str:
    """The split of a part: validation where its SHA-256, as a fraction of 2**64 in its first 8 bytes, is below."""
    return SPLITS[int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < val_fraction * 2**64]


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[list[Part]], Any], parts: Iterator[Part], ahead: int
) -> Iterator[tuple[list[Part], Any]]:
    """(batch, function(batch)) for batches of `parts`, in order, with at most `ahead` in memory."""
    waiting: deque[tuple[list[Part], Future[Any]]] = deque()
    batch = list(islice(parts, BATCH_PARTS))
    while batch or waiting:
        if batch:
            waiting.append((batch, pool.submit(function, batch)))
            batch = list(islice(parts, BATCH_PARTS))
        if not batch or len(waiting) == ahead:
            done, future = waiting.popleft()
            yield done, future.result()


def _fill_validation(val_fraction: float, job: dict[str, Any], state: State, shards: Shards) -> None:
    """Where no part was drawn for one of the splits, move its share of the tokens there, the last of the other split.

    The journal is written between the copy and the cut, so that an interruption loses nothing.
    """
    for empty, full, share in (("val", "train", val_fraction), ("train", "val", 1 - val_fraction)):
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
        shards.restore(state.tokens)


def _write_manifest(
    sources: list[Source], tokenizer: Tokenizer, val_fraction: float, state: State, shards: Shards
) -> None:
    tokenizer.save(shards.folder)
    manifest = {
        "format": FORMAT,
        "tokenizer": tokenizer.describe(),
        "dtype": shards.dtype.name,
        "documents": state.documents,
        "bytes": state.bytes,
        "tokens": shards.tokens,
        "split_rule": {
            "val_fraction": val_fraction,
            "text": f"documents are cut at line ends into parts of at most {PART_BYTES} bytes; a part is validation "
            "where the first 8 bytes of its SHA-256 are below val_fraction * 2**64; if none or all are, the last "
            "tokens change sides",
        },
        "end_of_text": "after each document, and where the next part of a document is in the other split",
        "sources": [{"source": str(source), "bytes": source.size()} for source in sources],
        "shards": [
            {"file": file.name, "split": split, "tokens": tokens, "sha256": file_sha256(file)}
            for split in SPLITS
            for file, tokens in shards.shards(split, shards.tokens[split])
        ],
    }
    _write_synced(shards.folder / MANIFEST, manifest)


def _write_synced(file: Path, value: dict[str, Any]) -> None:
    stream = file.open("wb")
    stream.write((json.dumps(value, indent=2) + "\n").encode())
    _sync(stream)


def _sync(stream: BinaryIO) -> None:
    """Close a file once its bytes are on the disk."""
    with stream:
        stream.flush()
        os.fsync(stream.fileno())


def _rename_away(folder: Path) -> Path:
    k = next(k for k in range(1, 1 << 31) if not os.path.lexists(f"{folder}.{k}"))
    return folder.rename(f"{folder}.{k}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(
        prog="data/prepare.py",
        description="Turn text into a token data set that train.py reads.",
        epilog="An interrupted preparation goes on where it stopped when the same command is given again.",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="pydoc, text files, .jsonl files, folders, or - (stdin)"
    )
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2 (default), bytes, a .tiktoken file, or a folder")
    parser.add_argument("--out", type=Path, help="the folder to make (default: data/NAME of the first source)")
    parser.add_argument(
        "--val-fraction", type=float, default=0.05, help="share of the text for validation (default: 0.05)"
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens per file at most (default: 100 million)"
    )
    parser.add_argument("--threads", type=int, help="threads that tokenize (default: one per core)")
    parser.add_argument("--text-key", default="text", help="where a JSON line has its text (default: text)")
    parser.add_argument("--fresh", action="store_true", help="rename an existing data set of this name away first")
    options = vars(parser.parse_args(arguments))
    try:
        out = prepare(**options)
    except KeyboardInterrupt:
        go_on = "stdin cannot be read again, so start over" if "-" in options["sources"] else "the same command goes on"
        print(f"\ninterrupted; {go_on}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"data/prepare.py: {_one_line(error)}", file=sys.stderr)
        return 1
    name = out.name if out.resolve() == (Path("data") / out.name).resolve() else out
    print(f"train on it: python train.py --data {shlex.quote(str(name))}")
    return 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing the data set'}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
