"""Malicious input to data/prepare.py: it rejects small files that expand to large data with a one-line error, using
little time and memory, and starts over if the journal is damaged."""

import gzip
import json
import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from data.prepare import JOURNAL, NO_FILTERS, Job, State, main
from data.sources import find_sources
from gpt2.tokenizer import Tokenizer

MEMORY, SECONDS = 500 << 20, 2  # limits: bytes in addition to this process's memory, and CPU time
PIECES = 255 << 20  # uncompressed bytes


def run_limited(arguments, output):
    """Run the command in a child process. Returns its exit status, CPU seconds, peak memory in bytes, and output."""
    pid = os.fork()
    if not pid:
        status = 99
        with suppress(BaseException):
            sys.stdout = sys.stderr = output.open("w")
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which includes the parent's
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), used + (2 << 30)))
            status = main(arguments)
            peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
            output.with_suffix(".peak").write_text(peak.split()[1])
        os._exit(status)
    _, status, used = os.wait4(pid, 0)
    peak = output.with_suffix(".peak")
    memory = int(peak.read_text()) << 10 if peak.exists() else MEMORY * 10
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, memory, output.read_text()


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def compressed(name, *pieces):
    """A function that writes a gzip file; each piece is (bytes, number of repetitions)."""

    def make(folder):
        with gzip.open(folder / name, "wb", 1) as file:
            for piece, count in pieces:
                block = piece * max(1, (1 << 20) // len(piece))
                for _ in range(max(1, count * len(piece) // len(block)) if count > 1 else 0):
                    file.write(block)
                if count == 1:
                    file.write(piece)
        return name

    return make


def parquet(values, size):
    def make(folder):
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        table = arrow.table({"text": arrow.array(["a" * size] * values, arrow.large_string())})
        parquet.write_table(table, folder / "a.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30)
        assert (folder / "a.parquet").stat().st_size < 20_000
        return "a.parquet"

    return make


HOSTILE = {
    "a line of lists": (
        compressed("a.jsonl.gz", (b'{"text":"x","a":[', 1), (b"[],", PIECES // 3)),
        "longer than 32 MiB",
    ),
    "lists within the limit": (
        compressed("a.jsonl.gz", (b'{"text":"x","a":[', 1), (b"[],", 8 << 20), (b"[]]}\n", 1)),
        "line 1: .*more than 1,048,576 brackets, commas and colons",
    ),
    "a line of text": (compressed("a.jsonl.gz", (b'{"text":"', 1), (b"x", PIECES)), "longer than 32 MiB"),
    "a line of fields": (compressed("a.csv.gz", (b"text,b\n", 1), (b"ab,", PIECES // 3)), "longer than 32 MiB"),
    "fields within the limit": (
        compressed("a.csv.gz", (b"text,b\n", 1), (b"ab,", 8 << 20), (b"ab\n", 1)),
        "line 2: a record of more than 32 MiB, or of more than 1,048,576 fields and lines",
    ),
    "a header of fields": (compressed("a.csv.gz", (b"ab,", 300_000), (b"ab\n", 1)), "and .* more"),
    "a record of many lines": (
        compressed("a.csv.gz", (b"text,b\n", 1), (b'"a\n",', PIECES // 5)),
        "line 2: a record of",
    ),
    "a field of many lines": (
        compressed("a.csv.gz", (b'text,b\n"', 1), (b"a\n", PIECES // 2)),
        "line 2: a record of .* is there an unclosed quote",
    ),
    "a large page": (parquet(20, 90 << 20), "a page of 94,371,8.. bytes; expected at most 33,554,432"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.extras("pyarrow")] * (name == "a large page")) for name in HOSTILE]
)
def test_a_small_file_with_a_large_record_is_rejected(tmp_path, case):
    make, message = HOSTILE[case]
    file = tmp_path / make(tmp_path)
    assert file.stat().st_size < 4 << 20
    before = resident()
    status, seconds, memory, output = run_limited(
        [str(file), "--tokenizer", "bytes", "--out", str(tmp_path / "out")], tmp_path / "output"
    )
    assert status == 1, output
    assert output.startswith(f"data/prepare.py: error: {file}: ")
    assert output.count("\n") == 1
    assert len(output) < 1000
    assert re.search(message, output), output
    assert seconds < SECONDS
    assert memory - before < MEMORY


@pytest.mark.extras("pyarrow")
def test_a_large_dictionary_is_not_repeated_in_memory(tmp_path):
    """The file has twenty identical rows of 4 MiB, stored as one dictionary value."""
    file = tmp_path / parquet(20, 4 << 20)(tmp_path)
    texts = [
        document.open().read()
        for source in find_sources([str(file)], "text", print)
        for document in source.documents(0)
    ]
    assert list(map(len, texts)) == [4 << 20] * 20


def journal_of(folder):
    job = Job.of(find_sources([str(folder / "text.txt")], "text", print), Tokenizer.load("bytes"), *JOB)
    return job.record


JOB = (NO_FILTERS, 0.05, 100_000_000, False)
GOOD = {
    "cursor": [0, 0, 0],
    "side": None,
    "documents": 0,
    "bytes": 0,
    "tokens": {"train": 0, "val": 0},
    "dropped": {},
    "seen": 0,
}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b'{"job": {', b"[]", bytes(200), b"{}", b"null", b'{"job": 1, "state": 2}', b"[" * 100_000),
        *(
            {**GOOD, **change}
            for change in (
                {"x": 1},
                {"tokens": {"train": -5, "val": 0}},
                {"tokens": {"train": 10**12, "val": 0}},
                {"tokens": {}},
                {"tokens": []},
                {"cursor": [99, 0, 0]},
                {"cursor": "abc"},
                {"cursor": [0, 0, -1]},
                {"cursor": [0, 0, 10**30]},
                {"side": "x"},
                {"dropped": {"short": 0.5}},
                {"bytes": True},
                {"seen": 2**62},
            )
        ),
        {},
        None,
    ],
)
def test_preparation_starts_over_if_the_journal_is_damaged(tmp_path, capsys, content):
    (tmp_path / "text.txt").write_text("some words\n" * 1000)
    (tmp_path / "out.partial").mkdir()
    state = (
        content if isinstance(content, bytes) else json.dumps({"job": journal_of(tmp_path), "state": content}).encode()
    )
    (tmp_path / "out.partial" / JOURNAL).write_bytes(state)
    assert main([str(tmp_path / "text.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(str(tmp_path / "out.partial"))
    assert first.endswith("starting over")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["bytes"] == 11_000


def test_a_journal_position_after_the_end_of_the_text_is_an_error(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some words\n" * 1000)
    (tmp_path / "out.partial").mkdir()
    state = {**GOOD, "cursor": [0, 0, 10**15]}
    (tmp_path / "out.partial" / JOURNAL).write_text(json.dumps({"job": journal_of(tmp_path), "state": state}))
    assert main([str(tmp_path / "text.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "text.txt: the file is damaged or truncated (it ends before byte 1,000,000,000,000,000 of the text" in error
    assert error.count("\n") == 1


def test_a_valid_journal_state_is_read():
    assert State.of(GOOD, 1) == State()
