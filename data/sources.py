"""Sources of documents: files, named data sets, the documentation that comes with Python, and stdin.

The suffix of a file determines its format: .jsonl and .ndjson (one JSON object per line), .csv and .tsv (with a
header), or .parquet. Any other file is a single document of plain text. All formats but .parquet can be compressed as
.gz or .zst. Reading .zst and .parquet requires pyarrow, and data sets on the Hugging Face Hub require huggingface_hub
(both are in the extra "data"). For text that is not UTF-8, the encoding must be specified.
"""

from __future__ import annotations

import ast
import codecs
import csv
import gzip
import hashlib
import importlib
import io
import json
import os
import sys
import sysconfig
import tokenize
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from data.parquet_pages import page_sizes
from gpt2.console import first_line
from tinygrad2.machine import install_command

if TYPE_CHECKING:
    import pyarrow.parquet

BOM = b"\xef\xbb\xbf"
RECORD_BYTES = 32 << 20  # maximum size of a JSON line, a CSV record or a Parquet page, which are held in memory
RECORD_ITEMS = 1 << 20  # maximum number of values, fields or lines per record; each takes up to 100 bytes of memory
SAMPLE_BYTES = 1 << 20  # bytes of text that are decompressed to estimate the size of a compressed file's text
ROWS = 64  # rows of a Parquet file per read
HUB_BLOCK_BYTES = 16 << 20  # minimum size of a request to the hub
HEAD_BYTES = 4 << 20  # bytes of stdin that are kept, so that a small text can be read twice
JSON_LINES, CSV, TSV, PARQUET, COMPRESSED = (".jsonl", ".ndjson"), ".csv", ".tsv", ".parquet", (".gz", ".zst")
NOT_TEXT = (".json", ".svg", ".tiktoken")  # and binary files; see _is_readable
UTF_16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}  # tried in this order
NAMED_COLUMNS = 20  # maximum number of columns named in an error message
NAMED_FILES = 100  # maximum number of files named in an error message
STDLIB_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "__pycache__"}


Identity = list[str | int]  # identifies a source and its version


@dataclass(frozen=True)
class Document:
    """A text, in UTF-8.

    after  the position of the next document in the source.
    name   the name of the document in error messages.
    open   opens the text for reading from the beginning. It can be called more than once, except for stdin.
    url    the URL of the document, if known.
    """

    after: int
    name: str
    open: Callable[[], BinaryIO]
    url: str = ""


# Files. `documents(start)` yields the documents from position `start` on.


@dataclass(frozen=True)
class TextFile:
    """A file that is a single document. Position 0 is the document, and 1 the end."""

    path: Path
    encoding: str = field(default="utf-8", kw_only=True)

    def __str__(self) -> str:
        return str(self.path)

    def size(self) -> int | None:
        """The size of the file in bytes, if known."""
        return self.path.stat().st_size

    def text_size(self) -> int | None:
        """The approximate size of the text in bytes, if known."""
        size = self.path.stat().st_size
        if self.path.suffix.lower() not in COMPRESSED:
            return size
        with explained(self, OSError), self.path.open("rb") as raw:
            stream = _decompressed(raw, self.path)
            return len(stream.read(SAMPLE_BYTES)) * size // max(1, raw.tell())

    def identity(self) -> Identity:
        other = [] if self.encoding == "utf-8" else [self.encoding]
        return [str(self.path.resolve()), self.path.stat().st_size, self.path.stat().st_mtime_ns, *other]

    def stream(self) -> BinaryIO:
        """Open the text of the file in UTF-8, decompressed if necessary."""
        stream = opened(self.path)
        return stream if self.encoding == "utf-8" else io.BufferedReader(_Recoded(stream, self.encoding))

    def documents(self, start: int) -> Iterator[Document]:
        if start == 0:
            yield Document(1, str(self), self.stream)


@dataclass(frozen=True)
class JsonLines(TextFile):
    """One document per line: the string under `key` in a JSON object. A position is a byte offset in the decompressed
    file."""

    key: str

    def identity(self) -> Identity:
        return [*super().identity(), self.key]

    def documents(self, start: int) -> Iterator[Document]:
        with self.stream() as stream:
            skip(stream, start)
            for line in _lines(stream, start, str(self)):
                begin, start = start, start + len(line)
                if line.strip(BOM + b" \t\r\n"):
                    text, url = self._parse(line, begin)
                    yield Document(start, str(self), partial(io.BytesIO, text), url)

    def _parse(self, line: bytes, begin: int) -> tuple[bytes, str]:
        try:
            if len(line) > RECORD_ITEMS and sum(map(line.count, b"[{,:")) > RECORD_ITEMS:
                raise ValueError(f"more than {RECORD_ITEMS:,} brackets, commas and colons")
            value = json.loads(line.removeprefix(BOM).decode())  # (given bytes, json would guess the encoding)
            text = value[self.key]
            if not isinstance(text, str):
                raise TypeError(f"{self.key!r} has type {type(text).__name__}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{self.path}: line {_line_number(self, begin)}: expected a JSON object with a string under "
                f"{self.key!r} (--text-key), got {line[:40]!r} ({reason})"
            ) from None
        url = value.get("url", "")
        try:
            return text.encode(), str(url)
        except UnicodeEncodeError:  # lone surrogates become U+FFFD
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return whole.encode(), str(url)


@dataclass(frozen=True)
class Csv(TextFile):
    """One document per record: the field in the column with this header. Quotes inside quotes are doubled (RFC 4180). A
    position is a byte offset in the decompressed file; the header is at 0.

    delimiter  the delimiter between fields; "" means the first of DELIMITERS with which the header contains the column.
    """

    column: str
    delimiter: str = field(default="", kw_only=True)

    def identity(self) -> Identity:
        return [*super().identity(), self.column, *([self.delimiter] if self.delimiter else [])]

    def _sniff(self) -> str:
        """Detect the delimiter."""
        headers = {}
        for delimiter in (self.delimiter,) if self.delimiter else DELIMITERS:
            with self.stream() as stream:
                headers[delimiter], _ = next(self._records(stream, 0, delimiter), ([], 0))
        found = [delimiter for delimiter, header in headers.items() if self.column in header]
        if not found:
            raise ValueError(_column_error(self, self.column, max(headers.values(), key=len)))
        return found[0]

    def documents(self, start: int) -> Iterator[Document]:
        csv.field_size_limit(RECORD_BYTES)
        delimiter = self._sniff()
        with self.stream() as stream:
            header, begin = next(self._records(stream, 0, delimiter), ([], 0))
            text, url = header.index(self.column), header.index("url") if "url" in header else None
            skip(stream, start - begin)
            for record, after in self._records(stream, max(begin, start), delimiter):
                if len(record) != len(header):
                    raise self._csv_error(after, delimiter, f"{len(record)} fields, the header has {len(header)}")
                where = "" if url is None else record[url]
                yield Document(after, str(self), partial(io.BytesIO, record[text].encode()), where)

    def _records(self, stream: BinaryIO, offset: int, delimiter: str) -> Iterator[tuple[list[str], int]]:
        """Yield (record, offset after it) for each non-empty record of a stream that is at byte `offset`."""
        start, items = offset, 0  # of the record

        def lines() -> Iterator[str]:
            nonlocal offset, items
            for line in _lines(stream, offset, str(self)):
                begin, offset = offset, offset + len(line)
                items += 1 + line.count(delimiter.encode())
                if offset - start > RECORD_BYTES or items > RECORD_ITEMS:
                    raise ValueError(
                        f"{self.path}: line {_line_number(self, start)}: a record of more than {RECORD_BYTES >> 20} "
                        f"MiB, or of more than {RECORD_ITEMS:,} fields and lines; is there an unclosed quote?"
                    )
                yield decoded(line, begin, str(self)).removeprefix("" if begin else "\ufeff")

        try:
            for record in csv.reader(lines(), delimiter=delimiter, strict=True):
                start, items = offset, 0
                if record:
                    yield record, offset
        except csv.Error as error:
            raise self._csv_error(offset, delimiter, str(error)) from None

    def _csv_error(self, offset: int, delimiter: str, reason: str) -> ValueError:
        marks = DELIMITERS.get(delimiter, repr(delimiter))
        return ValueError(
            f"{self.path}: line {_line_number(self, offset - 1)}: not valid CSV ({reason}); expected as many fields "
            f"as in the header, separated by {marks}, in quotes if they contain {marks}, quotes or newlines"
        )


@dataclass(frozen=True)
class Parquet(TextFile):
    """One document per row: the string in `column`, unless it is null. A position is the number of preceding rows."""

    column: str

    def identity(self) -> Identity:
        return [*super().identity(), self.column]

    def text_size(self) -> int | None:
        with explained(self, OSError), self._open() as file:
            return sum(file.metadata.row_group(g).total_byte_size for g in range(file.num_row_groups))  # all columns

    def documents(self, start: int) -> Iterator[Document]:
        arrow = require("pyarrow", self)
        with explained(self, arrow.ArrowException, UnicodeDecodeError), self._open() as file:
            columns = [name for name in (self.column, "url") if name in file.schema_arrow.names]
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= start:
                    row += rows
                    continue
                size = self._rows_at_once(file.metadata.row_group(group), columns)
                for batch in file.iter_batches(size, row_groups=[group], columns=columns):
                    texts = batch.column(self.column).cast(arrow.large_binary()).to_pylist()
                    urls = batch.column("url").to_pylist() if "url" in columns else [""] * len(texts)
                    for text, url in zip(texts, urls, strict=True):
                        row += 1
                        if row > start and text is not None:
                            yield Document(row, f"{self}: row {row}", partial(io.BytesIO, text), str(url))

    def _rows_at_once(self, group: pyarrow.parquet.RowGroupMetaData, columns: Sequence[str]) -> int:
        """The number of rows of a group to read at once: fewer if they may be large, since a value in a dictionary page
        can be repeated in every row. Raises ValueError if a page is too large."""
        largest = 1
        with self.path.open("rb") as stream:
            for column in (group.column(i) for i in range(group.num_columns)):
                if column.path_in_schema in columns:
                    starts = [column.data_page_offset]
                    if column.dictionary_page_offset is not None:
                        starts.append(column.dictionary_page_offset)
                    with explained(self, ValueError):
                        sizes = page_sizes(stream, min(starts), column.total_compressed_size)
                        largest = max(largest, *sizes)
        if largest > RECORD_BYTES:
            raise ValueError(
                f"{self}: a page of {largest:,} bytes; expected at most {RECORD_BYTES:,}: write the table with smaller "
                "values or pages"
            )
        return max(1, min(ROWS, RECORD_BYTES // largest))

    def _file(self) -> Path | BinaryIO:
        return self.path

    def _open(self) -> pyarrow.parquet.ParquetFile:
        """Open the file and check its column. The column is read in pieces, whatever the size of the row groups."""
        arrow, parquet, types = (require(f"pyarrow{name}", self) for name in ("", ".parquet", ".types"))
        with explained(self, arrow.ArrowException, UnicodeDecodeError):
            file = parquet.ParquetFile(self._file(), buffer_size=1 << 20, pre_buffer=False)
            names = file.schema_arrow.names
        if self.column not in names:
            raise ValueError(_column_error(self, self.column, names))
        kind = file.schema_arrow.field(self.column).type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise ValueError(f"{self}: the column {self.column!r} has the type {kind}; expected string (--text-column)")
        return file


@dataclass(frozen=True)
class HubParquet(Parquet):
    """A Parquet file of a data set on the Hugging Face Hub, at a fixed revision. It is streamed and not stored; a
    resumed job downloads only the rest. HF_ENDPOINT selects another hub."""

    repo: str
    revision: str
    text_bytes: int  # approximately

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}/{self.path.as_posix()}"

    def size(self) -> None:
        """None: sizes are not requested from the hub."""

    def text_size(self) -> int:
        return self.text_bytes

    def identity(self) -> Identity:
        return [str(self), self.column]

    def documents(self, start: int) -> Iterator[Document]:
        errors = require("huggingface_hub.errors", self)
        try:
            yield from super().documents(start)
        except (errors.HTTPError, OSError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
            raise ValueError(
                f"{self}: cannot be read from the hub ({reason}); repeat the command later to resume"
            ) from None

    def _rows_at_once(self, group: pyarrow.parquet.RowGroupMetaData, columns: Sequence[str]) -> int:
        return ROWS  # no check: the files are published and their revision is fixed

    def _file(self) -> BinaryIO:
        hub = require("huggingface_hub", self).HfFileSystem()
        return hub.open(f"datasets/{self}", "rb", block_size=HUB_BLOCK_BYTES)


# Other sources.


@dataclass(frozen=True)
class Stdin:
    """stdin, as a single document. Only its first bytes can be read again, so an interrupted job starts over."""

    encoding: str = ""  # the encoding if the text is not UTF-8, or ""

    def __str__(self) -> str:
        return "-"

    @cached_property
    def _head(self) -> bytes:
        if sys.stdin is None:
            raise ValueError("-: stdin is closed; pipe the text in, or specify a file")
        return sys.stdin.buffer.read(HEAD_BYTES)

    def stream(self) -> BinaryIO:
        """Open the text in UTF-8. It can be opened again if at most HEAD_BYTES were read from the previous stream."""
        stream = io.BufferedReader(_Rejoined(self._head, sys.stdin.buffer))
        wrong = self.encoding and _not_utf8(io.BytesIO(self._head), whole=len(self._head) < HEAD_BYTES)
        return io.BufferedReader(_Recoded(stream, self.encoding)) if wrong else stream

    def size(self) -> None:
        """Unknown."""

    def text_size(self) -> None:
        """Unknown."""

    def identity(self) -> Identity:
        return ["-"]

    def documents(self, start: int) -> Iterator[Document]:
        if start == 0:
            yield Document(1, "-", self.stream)


@dataclass(frozen=True)
class Texts:
    """Texts that fit in memory. They are generated or downloaded on first use. A position is the number of preceding
    documents."""

    name: str
    make: Callable[[], list[str]]

    def __str__(self) -> str:
        return self.name

    @cached_property
    def texts(self) -> list[bytes]:
        return [text.encode() for text in self.make()]

    def size(self) -> int:
        return sum(map(len, self.texts))

    text_size = size

    def identity(self) -> Identity:
        return [self.name, hashlib.sha256(b"\0".join(self.texts)).hexdigest()]

    def documents(self, start: int) -> Iterator[Document]:
        for i, text in enumerate(self.texts[start:], start + 1):
            yield Document(i, self.name, partial(io.BytesIO, text))


Source = TextFile | Stdin | Texts


def pydoc_corpus(say: Callable[[str], None] = print) -> list[str]:
    """The topics of Python's language reference, and the docstrings of the modules of the standard library.

    There is one document per topic and per module. Modules are parsed, never imported. Repeated texts are dropped.
    """
    documents = []
    try:
        from pydoc_data.topics import topics

        documents += [topics[name].strip() + "\n" for name in sorted(topics)]
    except ImportError:
        say("pydoc: this Python has no pydoc_data.topics; using only the docstrings")
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
    """The docstrings of a module and of its classes and functions, in file order."""
    try:
        with tokenize.open(file) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about invalid escapes in these modules
            tree = ast.parse(stream.read())
    except (SyntaxError, UnicodeDecodeError):  # files for other versions of Python
        return
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if text:
                yield text.encode("utf-8", "replace").decode()  # lone surrogates cannot be encoded
        todo += [child for child in reversed(list(ast.iter_child_nodes(node))) if isinstance(child, ast.stmt)]


# Named data sets.


@dataclass(frozen=True)
class HubSet:
    """A published data set: Parquet files with a column "text", at a fixed revision.

    download      approximate size of the files in bytes.
    text          approximate size of their text in bytes.
    val_fraction  fraction for validation, as in nanoGPT (openwebtext) or build-nanogpt and llm.c (fineweb-edu).
    """

    repo: str
    revision: str
    files: tuple[str, ...]
    download: int
    text: int
    val_fraction: float

    def sources(self) -> list[Source]:
        each = self.text // len(self.files)
        return [HubParquet(Path(name), "text", self.repo, self.revision, each) for name in self.files]


HUB_SETS = {
    # 8,013,769 documents, 9.04e9 GPT-2 tokens, according to nanoGPT's data/openwebtext/readme.md.
    "openwebtext": HubSet(
        "Skylion007/openwebtext",
        "b4325f019c648b1641a1784748667e8b74e5e064",
        tuple(f"plain_text/train-{i:05d}-of-00080.parquet" for i in range(80)),
        24_300_000_000,
        39_800_000_000,
        0.0005,
    ),
    # 9,672,101 documents, 9.95e9 GPT-2 tokens; build-nanogpt and llm.c use one of 100 shards for validation.
    "fineweb-edu": HubSet(
        "HuggingFaceFW/fineweb-edu",
        "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        tuple(f"sample/10BT/{i:03d}_00000.parquet" for i in range(14)),
        28_518_193_415,
        46_000_000_000,
        0.01,
    ),
}
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/"
    "data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
VAL_FRACTIONS = {name: hub_set.val_fraction for name, hub_set in HUB_SETS.items()} | {"shakespeare": 0.1}
NAMES = ("pydoc", "shakespeare", *HUB_SETS)


def shakespeare() -> list[str]:
    """Download Karpathy's "tiny Shakespeare"."""
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=60) as response:
            data = response.read(16 << 20)
    except (OSError, HTTPException) as error:
        raise ValueError(
            f"shakespeare: {SHAKESPEARE_URL} could not be downloaded ({first_line(error)}); connect to the "
            f"network and try again"
        ) from None
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError(f"shakespeare: {SHAKESPEARE_URL} returned {len(data)} bytes with a wrong checksum; try again")
    return [data.decode()]


# From names to sources.


def find_sources(
    names: Sequence[str], text_key: str, say: Callable[[str], None], delimiter: str = "", encoding: str = ""
) -> list[Source]:
    """The sources with these names. A folder is expanded to its files, sorted, excluding hidden ones.

    text_key   the key or column that contains the text.
    delimiter  the delimiter of .csv and .tsv files (see Csv).
    encoding   the encoding of files that are not UTF-8 (see with_encoding).
    """
    sources: list[Source] = []
    for name in names:
        path = Path(name)
        if name == "pydoc":
            sources.append(Texts(name, lambda: pydoc_corpus(say)))
        elif name == "shakespeare":
            sources.append(Texts(name, shakespeare))
        elif name in HUB_SETS:
            sources += HUB_SETS[name].sources()
        elif name == "-":
            if "-" in map(str, sources):
                raise ValueError("source -: stdin is listed twice, but can be read only once")
            sources.append(Stdin(encoding))
        elif path.is_dir():
            found, skipped = _files_in(path)
            if not found:
                raise ValueError(
                    f"source {path}: no text, Markdown, .jsonl, .csv, .tsv or .parquet file in this folder"
                )
            if skipped:
                some = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
                say(f"{path}: skipped {len(skipped)} files that are not text: {some}")
            sources += [_file_source(file, text_key, delimiter) for file in found]
        elif not path.exists():
            raise FileNotFoundError(
                f"source {name}: no such file or folder; expected a path, '-' (stdin), or one of {', '.join(NAMES)}"
            )
        elif not path.is_file():
            raise ValueError(f"source {name}: not a regular file; pipe it into stdin and use '-'")
        elif not _is_readable(path):
            raise ValueError(f"source {name}: not text; expected text in UTF-8, JSON lines (.jsonl), .csv or .parquet")
        else:
            sources.append(_file_source(path, text_key, delimiter))
    return with_encoding(sources, encoding)


def _file_source(path: Path, text_key: str, delimiter: str) -> TextFile:
    suffix = unpacked_name(path).suffix.lower()
    if suffix in JSON_LINES:
        return JsonLines(path, text_key)
    if suffix in (CSV, TSV):
        return Csv(path, text_key, delimiter=delimiter or ("\t" if suffix == TSV else ""))
    return Parquet(path, text_key) if suffix == PARQUET else TextFile(path)


def with_encoding(sources: Sequence[Source], encoding: str) -> list[Source]:
    """Return the sources, with `encoding` set for files that are not UTF-8. All files are read to check them.

    Raises ValueError, naming the files, if files are not UTF-8 and no encoding is given, or do not have that encoding.
    """
    found, wrong = list(sources), []
    texts = [(i, s) for i, s in enumerate(found) if isinstance(s, TextFile) and not isinstance(s, Parquet)]
    for i, source in texts:
        with explained(source, OSError), opened(source.path) as stream:
            reason = _not_utf8(stream)
        if reason and encoding:
            found[i] = replace(source, encoding=encoding)
            with explained(source, OSError), opened(source.path) as stream:
                reason = _not_in(stream, encoding)
        if reason:
            wrong.append((source, reason))
    if wrong:
        expected = (encoding or "UTF-8").upper()
        listed = ", ".join(f"{source} ({reason})" for source, reason in wrong[:NAMED_FILES])
        more = ", ..." if len(wrong) > NAMED_FILES else ""
        several = f"{len(wrong)} of {len(texts)} files are not {expected}: {listed}{more}"
        advice = "specify another --encoding" if encoding else "specify the --encoding, such as cp1252 or utf-16"
        raise ValueError(
            (several if len(wrong) > 1 else f"{wrong[0][0]}: {wrong[0][1]}")
            + f"; {advice}, or convert the text to UTF-8, for example with iconv"
        )
    return found


def _not_utf8(stream: BinaryIO, whole: bool = True) -> str:
    """Why the bytes are not UTF-8 text, or "". If not `whole`, the last character may be incomplete."""
    head = stream.read(4096)
    if looks_like_utf16(head):
        return "UTF-16, not UTF-8"
    return _not_in(stream, "utf-8", head, whole)


def _not_in(stream: BinaryIO, encoding: str, head: bytes = b"", whole: bool = True) -> str:
    """A description of the first byte in `head` and the stream that is invalid in this encoding, or ""."""
    decoder, offset, block = codecs.getincrementaldecoder(encoding)(), 0, head or stream.read(1 << 20)
    while True:
        kept = len(decoder.getstate()[0])  # number of bytes of an incomplete character before this block
        try:
            decoder.decode(block, final=whole and not block)
        except UnicodeDecodeError as error:
            at = offset - kept + error.start
            return f"byte {at} is not {encoding.upper()} (0x{error.object[error.start]:02x})"
        if not block:
            return ""
        offset, block = offset + len(block), stream.read(1 << 20)


def looks_like_utf16(head: bytes) -> bool:
    """Whether a file that starts with these bytes is UTF-16: it has a byte-order mark, or every other byte is 0."""
    if head[:2] in UTF_16:
        return True
    halves = [head[0::2], head[1::2]]
    zeros = [half.count(0) / max(1, len(half)) for half in halves]
    if min(zeros) > 0.01 or max(zeros) < 0.4:
        return False
    text = head[: len(head) // 2 * 2].decode("utf-16-le" if zeros[1] > zeros[0] else "utf-16-be", "replace")
    return sum(c.isprintable() or c in "\t\r\n" for c in text) > 0.98 * len(text)


def unpacked_name(path: Path) -> Path:
    """The path without the suffix for compression."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def _files_in(folder: Path) -> tuple[list[Path], list[str]]:
    found, skipped = [], []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent) / name for name in files if not name.startswith(".")):
            if not path.is_file() or not _is_readable(path):
                skipped.append(str(path.relative_to(folder)))
            else:
                found.append(path)
    return sorted(found), sorted(skipped)


def _is_readable(path: Path) -> bool:
    """Whether the file has a supported format. Parquet is recognized by the name, text by the first bytes."""
    suffix = unpacked_name(path).suffix.lower()
    if suffix == PARQUET:
        return suffix == path.suffix.lower()
    with explained(path, OSError), opened(path) as stream:
        head = stream.read(4096)
        return suffix not in NOT_TEXT and (b"\0" not in head or looks_like_utf16(head))


# Reading.


def opened(path: Path) -> BinaryIO:
    """Open a file, decompressed if necessary."""
    return _decompressed(path, path) if path.suffix.lower() in COMPRESSED else path.open("rb")


def _decompressed(file: Path | BinaryIO, path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    return io.BufferedReader(require("pyarrow", path).input_stream(file, compression="zstd"))


class _Recoded(io.RawIOBase):
    """A stream that converts text from an encoding to UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str):
        self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)()
        self._ready, self._ended = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = self._stream.read(1 << 16)
            self._ended = not block
            self._ready = self._decoder.decode(block, final=self._ended).encode()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Rejoined(io.RawIOBase):
    """A stream of the bytes already read from another stream, then the rest of that stream, which stays open."""

    def __init__(self, head: bytes, stream: BinaryIO):
        self._head, self._stream = io.BytesIO(head), stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head.read(len(buffer)) or self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def skip(stream: BinaryIO, count: int) -> None:
    """Skip `count` bytes of a stream, which need not be seekable. Raises EOFError if the stream is shorter."""
    left = count
    if left > 0 and stream.seekable():
        with suppress(OSError, OverflowError):  # raised for a position that no file can have
            stream.seek(left - 1, os.SEEK_CUR)
            left = 1
    while left > 0:
        block = stream.read(min(left, 1 << 20))
        if not block:
            raise EOFError(f"it ends before byte {count:,} of the text, where the preparation was interrupted")
        left -= len(block)


@contextmanager
def explained(source: object, *kinds: type[Exception]) -> Iterator[None]:
    """Convert decompression errors, and errors of `kinds`, to a ValueError that names the source."""
    try:
        yield
    except (EOFError, zlib.error) + kinds as error:  # noqa: RUF005 (mypy)
        if isinstance(error, OSError) and error.strerror:
            raise  # an error of the operating system, which names the file
        raise ValueError(
            f"{source}: the file is damaged or truncated ({first_line(error)}); download or copy it again"
        ) from None


def require(module: str, source: object) -> ModuleType:
    """Import a module of an optional library. Raises ValueError, with the install command, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.split(".")[0]
        raise ValueError(f"{source}: reading it needs {library}; install it with {install_command('data')}") from None


def _column_error(source: object, column: str, names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:80]) for name in names[:NAMED_COLUMNS]) or "none"
    more = f" and {len(names) - NAMED_COLUMNS:,} more" if len(names) > NAMED_COLUMNS else ""
    return f"{source}: no column {column!r} (--text-column); the columns are {shown}{more}"


def _lines(stream: BinaryIO, offset: int, name: str) -> Iterator[bytes]:
    """Yield the remaining lines of a stream that is at byte `offset`."""
    while line := stream.readline(RECORD_BYTES + 1):
        if len(line) > RECORD_BYTES:
            raise ValueError(f"{name}: byte {offset}: the line is longer than {RECORD_BYTES >> 20} MiB; split it")
        yield line
        offset += len(line)


def decoded(data: bytes, offset: int, name: str) -> str:
    """Decode bytes at `offset` in a document. Raises ValueError with the position of the first invalid byte."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {offset + error.start} is not UTF-8 (0x{data[error.start]:02x}); convert the text to UTF-8, "
            f"for example with iconv"
        ) from None


def _line_number(source: TextFile, offset: int) -> int:
    """The number of the line that contains byte `offset` of a file's text."""
    with source.stream() as stream:
        left, number = offset, 1
        while left and (block := stream.read(min(1 << 20, left))):
            left, number = left - len(block), number + block.count(b"\n")
        return number
