"""data/sources.py: reading each format from any position, one-line errors for damaged files, and a local hub."""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from data import sources as module
from data.prepare import main, prepare, read_parts
from data.sources import HUB_SETS, Texts, find_sources, pydoc_corpus
from gpt2.tokenizer import Tokenizer
from gpt2.training.dataset import MANIFEST, SPLITS, TokenDataset

ROOT = Path(__file__).resolve().parents[2]
with_pyarrow = pytest.mark.extras("pyarrow")
with_hub = pytest.mark.extras("huggingface_hub", "pyarrow")
ALL_TRAIN = 1e-15  # a fraction so small that validation gets only the last token; train + val is the text


def silent(line):
    pass


def texts_of(folder):
    """The documents of a data set made with ALL_TRAIN and the tokenizer "bytes", in order."""
    data = [TokenDataset.open(folder, split) for split in SPLITS]
    ids = np.concatenate([split.read(0, split.tokens) for split in data])
    return Tokenizer.load("bytes").decode(ids).split("<|endoftext|>")[:-1]


def documents_of(path, start=0, text_key="text"):
    (source,) = find_sources([str(path)], text_key, silent)
    return [(document.open().read().decode(), document.url) for document in source.documents(start)]


def varied_documents(count, seed=0):
    """Texts with quotes, commas, newlines and characters of one to four bytes. Some are empty; some are longer
    than a part."""
    rng = np.random.default_rng(seed)
    pieces = ["the ", "naïve ", "日本語", "🙂", '"', ",", "\n", "\r\n", "a" * 300, " ", "'"]
    lengths = rng.choice([0, 1, 10, 100, 1000], size=count)
    return ["".join(rng.choice(pieces, size=length).tolist()) for length in lengths]


def write_json_lines(path, texts):
    path.write_text("".join(json.dumps({"url": f"http://x/{i}", "text": text}) + "\n" for i, text in enumerate(texts)))


def write_csv(path, texts):
    with path.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["id", "text", "url"])
        rows.writerows([i, text, f"http://x/{i}"] for i, text in enumerate(texts))


def write_parquet(path, texts, rows=7, **options):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"id": range(len(texts)), "text": texts, "url": [f"http://x/{i}" for i in range(len(texts))]})
    parquet.write_table(table, path, row_group_size=rows, **options)


def write_zst(path, data, pieces=2):
    """Write several frames one after the other, like the concatenated outputs of several runs of zstd."""
    import pyarrow as pa

    with path.open("wb") as stream:
        for i in range(pieces):
            packed = pa.BufferOutputStream()
            with pa.CompressedOutputStream(packed, "zstd") as frame:
                frame.write(data[i * len(data) // pieces : (i + 1) * len(data) // pieces])
            stream.write(packed.getvalue())


WRITERS = {".jsonl": write_json_lines, ".csv": write_csv, ".parquet": write_parquet}


def write(folder, name, texts):
    """Write the texts to a file in the format given by its extensions."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    if path.suffix in WRITERS:
        WRITERS[path.suffix](path, texts)
        return path
    plain = write(folder, path.stem, texts)
    data = plain.read_bytes()
    plain.unlink()
    if path.suffix == ".gz":
        half = len(data) // 2
        path.write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    else:
        write_zst(path, data)
    return path


FORMATS = ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.csv.zst"]


def parameters(names):
    """Test parameters for the file names; those of Parquet and Zstandard files require pyarrow."""
    return [pytest.param(name, marks=with_pyarrow if name.endswith((".parquet", ".zst")) else ()) for name in names]


# Formats.


@pytest.mark.parametrize("name", parameters(FORMATS))
def test_documents_and_their_urls(tmp_path, name):
    texts = varied_documents(40)
    path = write(tmp_path, name, texts)
    assert documents_of(path) == [(text, f"http://x/{i}") for i, text in enumerate(texts)]


@pytest.mark.parametrize("name", parameters(FORMATS))
def test_reading_continues_at_each_cursor(tmp_path, name):
    texts = varied_documents(25, seed=1)
    sources = find_sources([str(write(tmp_path, name, texts))], "text", silent)
    parts = list(read_parts(sources, [0, 0, 0]))
    assert sum(part.ends for part in parts) == sum(map(bool, texts)) < len(texts)
    assert len(parts) > len(texts)
    assert b"".join(part.data for part in parts).decode() == "".join(texts)
    for i, part in enumerate(parts):
        assert list(read_parts(sources, part.cursor)) == parts[i + 1 :]


@pytest.mark.parametrize("name", parameters(["a.txt.gz", "a.txt.zst"]))
def test_compressed_text(tmp_path, name):
    text = "".join(varied_documents(30, seed=2))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    data = (tmp_path / "a.txt").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data)) if name.endswith(".gz") else write_zst(tmp_path / name, data)
    plain, packed = ([*read_parts(find_sources([str(tmp_path / n)], "", silent), [0, 0, 0])] for n in ("a.txt", name))
    assert len(plain) > 10
    assert packed == plain
    (source,) = find_sources([str(tmp_path / name)], "text", silent)
    assert list(read_parts([source], plain[4].cursor)) == plain[5:]


@with_pyarrow
def test_parquet_with_one_row_group_and_with_nulls(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    texts = varied_documents(300, seed=3)
    write_parquet(tmp_path / "one_group.parquet", texts, rows=1000, compression="zstd")
    assert [text for text, _ in documents_of(tmp_path / "one_group.parquet")] == texts
    values = pa.array(["a", None, "b"], pa.large_string())
    parquet.write_table(pa.table({"body": values}), tmp_path / "nulls.parquet")
    assert documents_of(tmp_path / "nulls.parquet", text_key="body") == [("a", ""), ("b", "")]
    assert documents_of(tmp_path / "nulls.parquet", 1, text_key="body") == [("b", "")]


def test_csv_with_a_byte_order_mark_and_empty_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext\r\none\r\n\r\n"two\r\nlines"\r\nthree')
    assert [text for text, _ in documents_of(tmp_path / "a.csv")] == ["one", "two\r\nlines", "three"]


@with_pyarrow
@pytest.mark.parametrize(
    ("name", "delimiter", "option"),
    [
        ("a.csv", ";", ""),
        ("a.csv", "\t", ""),
        ("a.csv", "|", ""),
        ("a.tsv", "\t", ""),
        ("a.tsv", ",", ","),
        ("a.csv", "~", "~"),
        ("a.csv", "\t", "tab"),
    ],
)
def test_delimiters(tmp_path, name, delimiter, option):
    texts = [text for text in varied_documents(60) if text] + ["a;b", "a\tb", "c|d", "e,f"]
    with (tmp_path / name).open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, delimiter=delimiter)
        rows.writerow(["id", "with, a comma", "text"])
        rows.writerows([i, ",;", text] for i, text in enumerate(texts))
    out = prepare([str(tmp_path / name)], "bytes", tmp_path / "out", val_fraction=ALL_TRAIN, delimiter=option)
    assert texts_of(out) == texts


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "shift_jis", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz"])
def test_encodings(tmp_path, encoding, name):
    letters = "日本語" if encoding == "shift_jis" else "naïve é"
    text = f"{letters} some text\n" * 3000
    content = {
        "a.txt": text,
        "a.jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n",
        "a.csv": f'id;text\n1;"{text}"\n',
    }[name.removesuffix(".gz")].encode(encoding)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (folder / "z.txt").write_text("plain UTF-8: naïve 日本語")
    out = prepare([str(folder)], "bytes", tmp_path / "out", val_fraction=ALL_TRAIN, encoding=encoding)
    assert texts_of(out) == [text, "plain UTF-8: naïve 日本語"]


def test_stdin_in_another_encoding(tmp_path):
    command = [sys.executable, ROOT / "data" / "prepare.py", "-", "--tokenizer", "bytes", "--out", tmp_path / "out"]
    text = "naïve\n" * 1000
    done = subprocess.run([*command, "--encoding", "cp1252"], input=text.encode("cp1252"), capture_output=True)
    assert done.returncode == 0, done.stderr
    found = "".join(text_of_split(tmp_path / "out", split) for split in SPLITS)
    assert sorted(found) == sorted(text)


def text_of_split(folder, split):
    data = TokenDataset.open(folder, split)
    return Tokenizer.load("bytes").decode(data.read(0, data.tokens)).replace("<|endoftext|>", "")


def test_binary_files_do_not_look_like_text_in_utf16():
    rng = np.random.default_rng(0)
    assert module.looks_like_utf16("plain text".encode("utf-16"))
    assert module.looks_like_utf16("plain text".encode("utf-16-be"))
    assert not module.looks_like_utf16(rng.integers(0, 256, 4096, dtype=np.uint8).tobytes())
    assert not module.looks_like_utf16(rng.integers(0, 256, 2048).astype("<u2").tobytes())
    assert not module.looks_like_utf16(np.zeros(4096, np.uint8).tobytes())
    assert not module.looks_like_utf16(b"\x93NUMPY\x01\x00v\x00{'descr': '<i4'}")
    assert not module.looks_like_utf16(b"plain text")


@with_pyarrow
def test_a_folder_with_all_formats(tmp_path):
    for i, name in enumerate(FORMATS):
        write(tmp_path / "in", f"{i}{name}", [f"{name} {k}" for k in range(3)])
    (tmp_path / "in" / "z.npy").write_bytes(b"\x93NUMPY\0")
    messages = []
    options = {"val_fraction": ALL_TRAIN, "say": messages.append}
    out = prepare([str(tmp_path / "in")], "bytes", tmp_path / "out", **options)
    assert texts_of(out) == [f"{name} {k}" for name in FORMATS for k in range(3)]
    assert messages[0].endswith("skipped 1 files that are not text: z.npy")


def test_text_column_option_and_default_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(Path("plain.csv"), [])
    Path("book.csv.gz").write_bytes(gzip.compress(b"id,body\n1,one\n2,two\n"))
    arguments = ["book.csv.gz", "--text-column", "body", "--tokenizer", "bytes", "--val-fraction", str(ALL_TRAIN)]
    assert main(arguments) == 0
    assert texts_of(Path("data/book")) == ["one", "two"]


@pytest.mark.parametrize("name", parameters(FORMATS))
def test_text_size_is_approximately_correct(tmp_path, name):
    texts = varied_documents(400, seed=4)
    (source,) = find_sources([str(write(tmp_path, name, texts))], "text", silent)
    assert source.text_size() == pytest.approx(sum(len(text.encode()) for text in texts), rel=0.5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="requires /proc, for the peak memory of a process")
@pytest.mark.slow
@pytest.mark.parametrize("name", parameters(["a.parquet", "a.jsonl.gz", "a.csv.zst"]))
def test_memory_does_not_grow_with_the_input(tmp_path, name):
    """The peak memory for 36 MB of text equals that for 12 MB, apart from allocator noise."""
    code = (
        "import re, sys; from data.prepare import prepare;"
        "prepare([sys.argv[1]], 'bytes', sys.argv[2], threads=2);"
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) >> 10)"
    )
    peaks = []
    for megabytes in (12, 36):
        rng = np.random.default_rng(5)
        texts = [rng.integers(97, 123, 2000, dtype=np.uint8).tobytes().decode() for _ in range(500 * megabytes)]
        if name.endswith(".parquet"):
            write(tmp_path, name, [])
            write_parquet(tmp_path / name, texts, rows=10**6)  # a single row group, as some programs write
        else:
            write(tmp_path, name, texts)
        command = [sys.executable, "-c", code, tmp_path / name, tmp_path / str(megabytes)]
        env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # Arrow's own pool keeps freed memory
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=env)
        peaks.append(int(done.stdout.split()[-1]))
        assert TokenDataset.open(tmp_path / str(megabytes), "train").tokens > megabytes * 900_000
    assert peaks[1] < peaks[0] + 16, peaks


# Damage.


def damaged(name, data):
    """A function that writes a file with this name and content."""

    def make(folder):
        (folder / name).write_bytes(data)
        return folder / name

    return make


def truncated(name, keep=2 / 3):
    def make(folder):
        path = write(folder, name, varied_documents(50, seed=6))
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        return path

    return make


def flipped(name):
    def make(folder):
        path = write(folder, name, [text + str(i) for i, text in enumerate(varied_documents(50, seed=7))])
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 255
        path.write_bytes(data)
        return path

    return make


def wrong_column_type(folder):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": [1, 2]}), folder / "a.parquet")
    return folder / "a.parquet"


def missing_column(folder):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"id": [1], "body": ["x"]}), folder / "a.parquet")
    return folder / "a.parquet"


def row_not_utf8(folder):
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"ok\xffx")]
    )
    parquet.write_table(pa.table({"text": text}), folder / "a.parquet")
    return folder / "a.parquet"


DAMAGE = [
    (truncated("a.jsonl.gz"), "a.jsonl.gz: the file is damaged or truncated (Compressed file ended"),
    (truncated("a.jsonl.zst"), "a.jsonl.zst: the file is damaged or truncated (Truncated compressed stream)"),
    (truncated("a.parquet"), "a.parquet: the file is damaged or truncated (Parquet magic bytes not found"),
    (flipped("a.csv.gz"), "a.csv.gz: the file is damaged or truncated ("),
    (damaged("b.gz", b"\x1f\x8b\0"), "b.gz: the file is damaged or truncated ("),
    (damaged("b.txt.zst", b"text"), "b.txt.zst: the file is damaged or truncated ("),
    (damaged("b.bin.gz", gzip.compress(b"\0\1")), "b.bin.gz: not text; expected text in UTF-8, JSON lines"),
    (truncated("a.parquet", keep=0), "a.parquet: the file is damaged or truncated ("),
    (wrong_column_type, "a.parquet: the column 'text' has the type int64; expected string (--text-column)"),
    (missing_column, "a.parquet: no column 'text' (--text-column); the columns are 'id', 'body'"),
    (row_not_utf8, "a.parquet: row 2: byte 0 is not UTF-8 (0xff)"),
    (damaged("a.csv", b"id,body\n1,x\n"), "a.csv: no column 'text' (--text-column); the columns are 'id', 'body'"),
    (damaged("a.csv", b"text,b\nx,1\n\ny,2,3\n"), "a.csv: line 4: not valid CSV (3 fields, the header has 2)"),
    (damaged("a.csv", b'text\nx\n"y\nz\n'), "a.csv: line 4: not valid CSV (unexpected end of data)"),
    (damaged("a.csv", b'text\n"x"y\n'), "a.csv: line 2: not valid CSV ("),
    (damaged("a.csv", b"text\nok\nx\xff\n"), "a.csv: byte 9 is not UTF-8 (0xff)"),
    (damaged("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{}\n')), "a.jsonl.gz: line 2: expected a JSON object"),
]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            make, message, id=message[:50], marks=with_pyarrow if re.match(r"\S+\.(parquet|zst):", message) else ()
        )
        for make, message in DAMAGE
    ],
)
def test_a_damaged_file_prints_one_line(tmp_path, capsys, make, message):
    path = make(tmp_path)
    assert main([str(path), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("data/prepare.py: error: ")
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow"), ("a.txt.zst", "pyarrow")])
def test_the_error_for_a_missing_library_names_it(tmp_path, monkeypatch, capsys, name, library):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, library, None)
    assert main([str(tmp_path / name), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"data/prepare.py: error: {tmp_path / name}: reading it needs {library}; install it with "
        'pip install -e ".[data]"\n'
    )


def test_an_overlong_line_is_rejected_before_it_is_read_completely(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "RECORD_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n' + '{"text": "' + "x" * 2000)
    assert main([str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 1
    assert "a.jsonl: byte 15: the line is longer than 0 MiB; split it" in capsys.readouterr().err


# A local hub.


class Hub(ThreadingHTTPServer):
    """Responds like the Hugging Face hub: lists the files of a revision and, after a redirect, serves byte ranges.

    files     contents by path.
    requests  (path, first byte, last byte) of every request for a file.
    failure   called with the number of the request for a file; returns "cut" (the connection breaks halfway), an HTTP
              status, or None.
    """

    daemon_threads = True

    def __init__(self, repo, revision, files):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repo, self.revision, self.files = repo, revision, files
        self.requests = []
        self.failure = lambda n: None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):  # http.server requires this name
        hub = self.server
        path = unquote(self.path.split("?")[0])
        if path == f"/api/datasets/{hub.repo}/revision/{hub.revision}":
            self.reply(200, json.dumps({"_id": "0", "id": hub.repo, "sha": hub.revision}).encode())
        elif path.startswith(f"/api/datasets/{hub.repo}/tree/{hub.revision}/"):
            folder = path.removeprefix(f"/api/datasets/{hub.repo}/tree/{hub.revision}/")
            listed = [
                {"type": "file", "oid": "0" * 40, "size": len(data), "path": name}
                for name, data in hub.files.items()
                if name.startswith(folder + "/")
            ]
            self.reply(200, json.dumps(listed).encode())
        elif path.startswith(f"/datasets/{hub.repo}/resolve/{hub.revision}/"):
            name = path.removeprefix(f"/datasets/{hub.repo}/resolve/{hub.revision}/")
            self.reply(302, b"", {"Location": f"{hub.url}/cdn/{name}"})
        elif path.startswith("/cdn/"):
            self.send_file(path.removeprefix("/cdn/"))
        else:
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})

    def send_file(self, name):
        hub = self.server
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        hub.requests.append((name, first, last))
        failure = hub.failure(len(hub.requests))
        data = hub.files[name][first : last + 1]
        if failure == "cut":
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        elif failure:
            self.reply(failure, b"")
        else:
            self.reply(206, data, {"Content-Range": f"bytes {first}-{last}/{len(hub.files[name])}"})

    def reply(self, status, data, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(tmp_path):
    """A hub that serves a smaller fineweb-edu: 14 files with 20 documents each."""
    hub_set = HUB_SETS["fineweb-edu"]
    files = {}
    for i, name in enumerate(hub_set.files):
        texts = [f"file {i} document {k} " + "word " * 500 for k in range(20)]
        write_parquet(tmp_path / "one.parquet", texts, rows=5, compression="none")
        files[name] = (tmp_path / "one.parquet").read_bytes()
    with running(Hub(hub_set.repo, hub_set.revision, files)) as server:
        yield server


def prepare_in_process(endpoint, tmp_path, *arguments, code=""):
    """Run data/prepare.py in a separate process, because huggingface_hub reads the address when it is imported."""
    small = "s = p.HUB_SETS; s.update({k: dataclasses.replace(v, text=500_000) for k, v in s.items()});"
    imports = "import dataclasses, sys; from data import prepare as p, sources;"
    code = f"{imports} {small} {code}\nsys.exit(p.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments, "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def expected_fineweb():
    return [f"file {i} document {k} " + "word " * 500 for i in range(14) for k in range(20)]


@with_hub
def test_a_data_set_is_streamed_from_the_hub(hub, tmp_path):
    hub.failure = {3: "cut"}.get
    done = prepare_in_process(hub.url, tmp_path, "fineweb-edu", "--val-fraction", str(ALL_TRAIN))
    assert done.returncode == 0, done.stderr
    assert texts_of(tmp_path / "out") == expected_fineweb()
    assert done.stdout.splitlines()[0] == (
        "HuggingFaceFW/fineweb-edu at revision 87f0914: 14 files, about 28.5 GB in total; they are streamed, and only "
        "their tokens are kept"
    )
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    named = [entry["source"] for entry in manifest["sources"]]
    assert named[0] == f"HuggingFaceFW/fineweb-edu@{HUB_SETS['fineweb-edu'].revision}/sample/10BT/000_00000.parquet"
    assert len(named) == 14
    assert not list((tmp_path / "home").rglob("*.parquet"))


@with_hub
def test_an_interrupted_download_resumes_where_it_stopped(hub, tmp_path):
    """The hub returns errors in the middle of file 9, while 20 parts (one and a half files) wait for the threads."""
    hub.failure = lambda n: (
        403 if "009_" in hub.requests[-1][0] and hub.requests[-1][1] in range(20_000, 40_000) else None
    )
    small = "p.JOURNAL_BYTES = 1; p.BATCH_PARTS = 1; sources.HUB_BLOCK_BYTES = 1 << 12"
    options = ("fineweb-edu", "--val-fraction", "0.2", "--threads", "2")
    first = prepare_in_process(hub.url, tmp_path, *options, code=small)
    assert first.returncode == 1
    (line,) = first.stderr.splitlines()
    assert line.startswith(
        f"data/prepare.py: error: {hub.repo}@{hub.revision}/sample/10BT/009_00000.parquet: cannot be read"
    )
    assert line.endswith("; repeat the command later to resume")
    before = len(hub.requests)
    hub.failure = lambda n: None
    second = prepare_in_process(hub.url, tmp_path, *options, code=small)
    assert second.returncode == 0, second.stderr
    assert "resuming after 1" in second.stdout
    again = hub.requests[before:]
    assert {name[12:15] for name, *_ in again} == {"007", "008", "009", "010", "011", "012", "013"}
    file_7 = "sample/10BT/007_00000.parquet"
    assert sum(last - first for name, first, last in again if name == file_7) < 0.9 * len(hub.files[file_7])
    (tmp_path / "out").rename(tmp_path / "resumed")
    assert prepare_in_process(hub.url, tmp_path, *options).returncode == 0
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes()


@with_hub
def test_a_missing_revision_and_an_unreachable_hub_print_one_line(hub, tmp_path):
    done = prepare_in_process(hub.url, tmp_path, "openwebtext")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "plain_text/train-00000-of-00080.parquet: cannot be read from the hub (" in line
    done = prepare_in_process("http://127.0.0.1:1", tmp_path, "openwebtext")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "cannot be read from the hub (" in line


def test_named_hub_data_sets():
    for name, hub_set in HUB_SETS.items():
        sources = find_sources([name], "ignored", silent)
        assert len({str(source) for source in sources}) == len(hub_set.files)
        assert sum(source.text_size() for source in sources) == pytest.approx(hub_set.text)
        assert all(re.fullmatch(r"[0-9a-f]{40}", source.revision) for source in sources)


# Shakespeare, and the corpus from pydoc.


class ShakespeareHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.text)))
        self.end_headers()
        self.wfile.write(self.server.text[: self.server.sent])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def play(monkeypatch):
    with running(ThreadingHTTPServer(("127.0.0.1", 0), ShakespeareHandler)) as server:
        server.text, server.sent = b"First Citizen:\n" * 5000, 10**9
        monkeypatch.setattr(module, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        monkeypatch.setattr(module, "SHAKESPEARE_SHA256", hashlib.sha256(server.text).hexdigest())
        yield server


def test_shakespeare(play, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["shakespeare", "--tokenizer", "bytes"]) == 0
    manifest = json.loads(Path("data/shakespeare", MANIFEST).read_text())
    assert manifest["bytes"] == len(play.text)
    assert manifest["documents"] == 1
    assert manifest["split_rule"]["val_fraction"] == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda play: setattr(play, "sent", 100), "returned 100 bytes with a wrong checksum; try again"),
        (lambda play: setattr(play, "text", b"other"), "returned 5 bytes with a wrong checksum; try again"),
        (lambda play: play.socket.close(), "could not be downloaded (<urlopen error "),
    ],
)
def test_shakespeare_errors(play, tmp_path, monkeypatch, capsys, change, message):
    if "urlopen" in message:
        monkeypatch.setattr(module, "SHAKESPEARE_URL", "http://127.0.0.1:1/input.txt")
    else:
        change(play)
    assert main(["shakespeare", "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_pydoc_corpus():
    texts = pydoc_corpus()
    assert 1_000_000 < sum(map(len, texts)) < 5_000_000
    assert len(set(texts)) == len(texts) > 300
    assert any("Common operations on Posix pathnames." in text for text in texts)
    assert texts == pydoc_corpus()


@pytest.mark.slow
def test_pydoc_corpus_imports_no_modules():
    code = (
        "import sys, sysconfig; from data.sources import pydoc_corpus; sysconfig.get_paths();"
        "before = set(sys.modules); pydoc_corpus(); print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"pydoc_data", "pydoc_data.topics"}


def test_pydoc_without_topics(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    messages = []
    texts = pydoc_corpus(messages.append)
    assert messages == ["pydoc: this Python has no pydoc_data.topics; using only the docstrings"]
    assert sum(map(len, texts)) > 500_000


def test_pydoc_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "pydoc_corpus", lambda say: ["one", "two " * 9000, "three"])
    out = prepare(["pydoc"], "bytes", tmp_path / "out", val_fraction=ALL_TRAIN, say=silent)
    assert texts_of(out) == ["one", "two " * 9000, "three"]


def test_texts_are_created_once():
    made = []
    source = Texts("name", lambda: made.append(1) or ["é", "b"])
    assert source.size() == source.text_size() == 3
    assert [document.open().read() for document in source.documents(1)] == [b"b"]
    assert isinstance(source.documents(0).__next__().open(), io.BytesIO)
    assert made == [1]
