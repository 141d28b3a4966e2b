"""data/prepare.py: shards do not depend on threads or interruptions, and errors are one line."""

import base64
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data import prepare as module
from data.prepare import PART_BYTES, main, prepare, read_parts, split_of
from data.sources import find_sources
from gpt2.tokenizer import Tokenizer
from gpt2.training.dataset import MANIFEST, SPLITS, TokenDataset

ROOT = Path(__file__).resolve().parents[2]
BYTES = Tokenizer.load("bytes")
ALL_TRAIN = 1e-15  # a fraction so small that validation gets only the last token; train + val is the text


def silent(line):
    pass


def make(sources, out, tokenizer="bytes", **options):
    return prepare([str(source) for source in sources], tokenizer, out, say=silent, **options)


def ids_of(folder, split):
    data = TokenDataset.open(folder, split)
    return data.read(0, data.tokens)


def stream_of(folder):
    """All ids of a data set made with ALL_TRAIN, in order."""
    return np.concatenate([ids_of(folder, split) for split in SPLITS])


def texts_of(ids):
    """The texts between end-of-text tokens."""
    pieces = np.split(ids, np.flatnonzero(ids == BYTES.end_of_text) + 1)
    assert len(pieces[-1]) == 0
    return [BYTES.decode(piece[:-1]) for piece in pieces[:-1]]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def varied_text(size, seed=0):
    """A text with short and long lines, runs of spaces and newlines, and characters of one to four bytes."""
    rng = np.random.default_rng(seed)
    words = ["the", "naïve", "日本語", "🙂", "x" * 50, "don't", "1234", "--", "\t", "  ", " \n", "\n\n\n", "\r\n", "\n"]
    out, length = [], 0
    while length < size:
        piece = words[rng.integers(len(words))] + (" " if rng.random() < 0.8 else "")
        out.append(piece)
        length += len(piece.encode())
    return "".join(out)


def write_sources(folder):
    """Write sources of several kinds, about 600 kB; some documents have many parts."""
    folder.mkdir()
    (folder / "a.txt").write_text(varied_text(250_000, 1), encoding="utf-8")
    (folder / "b.md").write_text(varied_text(3_000, 2), encoding="utf-8")
    lines = [json.dumps({"text": varied_text(size, size)}) for size in (10, 40_000, 2_000, 90_000, 16_384)]
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (folder / "d").mkdir()
    (folder / "d" / "e.txt").write_text(varied_text(120_000, 3), encoding="utf-8")
    return folder


# The contents of the shards.


def test_documents_in_order_with_end_of_text_after_each(tmp_path):
    texts = {"b.txt": "second\n", "a.md": "first", "sub/c.jsonl": None, "sub/d": "no extension"}
    for name, text in texts.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        lines = '{"text": "l1 \\u00e9"}\n\n  {"x": 1, "text": "l2"}  \n{"text": ""}\n{"text": "l3"}'
        (tmp_path / "in" / name).write_text(text or lines, encoding="utf-8")
    out = make([tmp_path / "in"], tmp_path / "out", val_fraction=ALL_TRAIN)
    assert texts_of(stream_of(out)) == ["first", "second\n", "l1 é", "l2", "l3", "no extension"]
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["documents"] == 6
    assert manifest["tokens"] == {split: TokenDataset.open(out, split).tokens for split in SPLITS}
    assert manifest["tokens"]["val"] == 1
    assert Tokenizer.load(out).fingerprint == manifest["tokenizer"]["fingerprint"] == BYTES.fingerprint
    assert sorted(file.name for file in out.iterdir()) == [
        "manifest.json",
        "train-00000.bin",
        "val-00000.bin",
        "vocabulary.json",
    ]
    assert not (tmp_path / "out.partial").exists()


def test_hidden_files_are_ignored_and_non_text_files_are_listed(tmp_path):
    for name, data in {
        ".hidden.txt": b"hidden",
        ".git/a.txt": b"hidden",
        "a.txt": b"text",
        "b.png": b"\x89PNG\0",
        "c.json": b"{}",
        "d.svg": b"<svg/>",
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    messages = []
    prepare([str(tmp_path / "in")], "bytes", tmp_path / "out", val_fraction=ALL_TRAIN, say=messages.append)
    assert texts_of(stream_of(tmp_path / "out")) == ["text"]
    assert messages[0] == f"{tmp_path / 'in'}: skipped 3 files that are not text: b.png, c.json, d.svg"


def test_byte_order_mark_is_removed_and_line_ends_are_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "j"}\r\n')
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf" + b"x" * 3 * PART_BYTES)
    out = make(
        [tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt", "d.txt")], tmp_path / "out", val_fraction=1e-15
    )
    assert texts_of(stream_of(out)) == ["a\r\nb\r\n", "j", "x" * 3 * PART_BYTES]


def test_text_key_and_lone_surrogates(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x\\ud800y"}\n{"body": "\\ud83d\\ude42"}\n')
    out = make([tmp_path / "a.jsonl"], tmp_path / "out", text_key="body", val_fraction=ALL_TRAIN)
    assert texts_of(stream_of(out)) == ["x\ufffdy", "🙂"]


def test_splitting_into_parts_does_not_change_the_tokens(gpt2_files, tmp_path):
    text = varied_text(400_000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    out = make([tmp_path / "a.txt"], tmp_path / "out", "gpt2", val_fraction=ALL_TRAIN)
    assert np.array_equal(stream_of(out), [*Tokenizer.load("gpt2").encode(text), 50256])


@pytest.mark.parametrize("size", [1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 5 * PART_BYTES + 7])
@pytest.mark.parametrize("unit", ["a", "é", "日", "🙂", "\n", " ", "word ", "line\n", "a\n\n \n"])
def test_parts_join_to_the_text_and_reading_continues_at_each_cursor(tmp_path, unit, size):
    text = (unit * size).encode()[:size].decode(errors="ignore")
    if not text:
        return
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "end"}))
    sources = find_sources([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], "text", silent)
    parts = list(read_parts(sources, [0, 0, 0]))
    assert all(0 < len(part.data) <= PART_BYTES for part in parts)
    assert sum(part.ends for part in parts) == 3
    assert b"".join(part.data for part in parts).decode() == 2 * text + "end"
    for i, part in enumerate(parts):
        assert list(read_parts(sources, part.cursor)) == parts[i + 1 :]


def test_parts_end_before_whitespace(tmp_path):
    (tmp_path / "a.txt").write_text("some words \n\n" * 3000)
    (tmp_path / "b.txt").write_text("some words " * 3000)
    parts = list(read_parts(find_sources([str(tmp_path / "a.txt")], "text", silent), [0, 0, 0]))
    assert all(part.data.endswith(b"words") and len(part.data) > PART_BYTES - 20 for part in parts[:-1])
    assert all(part.data.startswith(b" \n\nsome") for part in parts[1:])
    parts = list(read_parts(find_sources([str(tmp_path / "b.txt")], "text", silent), [0, 0, 0]))
    assert all(part.data.startswith(b" ") for part in parts[1:])


# The two splits.


def test_equal_parts_are_never_in_both_splits(tmp_path):
    lines = [json.dumps({"text": f"document {i % 700}"}) for i in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out = make([tmp_path / "a.jsonl"], tmp_path / "out", val_fraction=0.1)
    train, val = (texts_of(ids_of(out, split)) for split in SPLITS)
    assert len(train) + len(val) == 2000
    assert not set(train) & set(val)
    assert 0.07 < len(val) / 2000 < 0.13
    assert [split_of(text.encode(), 0.1) for text in val] == ["val"] * len(val)


def test_end_of_text_follows_each_run_of_parts_in_one_split(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SMALL_TEXT", 0)
    (tmp_path / "a.txt").write_text(varied_text(600_000), encoding="utf-8", newline="")
    out = make([tmp_path / "a.txt"], tmp_path / "out", val_fraction=0.3)
    runs = []
    for part in read_parts(find_sources([str(tmp_path / "a.txt")], "text", silent), [0, 0, 0]):
        side = split_of(part.data, 0.3)
        if not runs or runs[-1][0] != side:
            runs.append((side, b""))
        runs[-1] = (side, runs[-1][1] + part.data)
    assert len(runs) > 5
    for split in SPLITS:
        assert texts_of(ids_of(out, split)) == [text.decode() for side, text in runs if side == split]


@pytest.mark.parametrize("fraction", [ALL_TRAIN, 0.25, 1 - 1e-12])
@pytest.mark.parametrize("shard_tokens", [7, 1000])
def test_neither_split_is_empty(tmp_path, monkeypatch, fraction, shard_tokens):
    """The text has a single part, which belongs to one split; the other split gets its fraction of the tokens."""
    monkeypatch.setattr(module, "SMALL_TEXT", 0)
    (tmp_path / "a.txt").write_text("a" * 99)
    out = make([tmp_path / "a.txt"], tmp_path / "out", val_fraction=fraction, shard_tokens=shard_tokens)
    tokens = {split: TokenDataset.open(out, split).tokens for split in SPLITS}
    assert tokens["train"] + tokens["val"] == 100
    assert tokens["val"] == {ALL_TRAIN: 1, 0.25: 25}.get(fraction, 99)
    order = SPLITS if split_of(b"a" * 99, fraction) == "train" else SPLITS[::-1]
    joined = np.concatenate([ids_of(out, split) for split in order])
    assert texts_of(joined) == ["a" * 99]


@pytest.mark.parametrize("shard_tokens", [1000, 4096, 10**9])
def test_shards_have_at_most_shard_tokens_tokens(tmp_path, shard_tokens):
    out = make([write_sources(tmp_path / "in")], tmp_path / "out", shard_tokens=shard_tokens)
    whole = make([tmp_path / "in"], tmp_path / "whole")
    shards = json.loads((out / MANIFEST).read_text())["shards"]
    for split in SPLITS:
        counts = [shard["tokens"] for shard in shards if shard["split"] == split]
        assert all(count == shard_tokens for count in counts[:-1])
        assert 0 < counts[-1] <= shard_tokens
        assert np.array_equal(ids_of(out, split), ids_of(whole, split))


def test_a_large_vocabulary_is_stored_as_uint32(tmp_path):
    pairs = {bytes([a, b]): 256 + 256 * a + b for a in range(256) for b in range(256)}
    singles = {bytes([b]): b for b in range(256)}
    file = tmp_path / "pairs.tiktoken"
    file.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for t, i in (singles | pairs).items()))
    (tmp_path / "a.txt").write_text("zzzz yy")
    out = make([tmp_path / "a.txt"], tmp_path / "out", file, val_fraction=ALL_TRAIN)
    assert json.loads((out / MANIFEST).read_text())["dtype"] == "uint32"
    assert Tokenizer.load(out).decode(stream_of(out)) == "zzzz yy<|endoftext|>"
    assert stream_of(out).max() == 65792


# Filters.

ARTICLE = "Cats\nFrom Wikipedia, the free encyclopedia\nThe cat is a small animal."
FILTERED = [  # (text, URL, reason for dropping it; "" if it is kept, None if it is empty)
    ("a first text, long enough", "", ""),
    ("short", "", "short"),
    ("from the site itself, long", "https://en.wikipedia.org/wiki/Cat", "wikipedia"),
    ("from a site named alike", "https://notwikipedia.org/Cat", ""),
    ("from another one like it", "https://wikipedia.org.example/Cat", ""),
    (ARTICLE, "", "wikipedia"),
    ("x" * 5000 + ARTICLE, "", ""),
    ("a first text, long enough", "http://x", "duplicate"),
    ("", "", None),
    ("", "", None),
    ("\ufeffa first text, long enough", "", "duplicate"),
    ("a first text, long enough\n", "", ""),
    ("é" * 3 * PART_BYTES, "", ""),
    ("é" * 3 * PART_BYTES, "", "duplicate"),
    ("the last one, not a copy", "http://[", ""),
]
ALL_FILTERS = {"drop_wikipedia": True, "min_bytes": 10, "drop_duplicates": True}


def write_filtered(folder):
    folder.mkdir()
    lines = [json.dumps({"text": text, "url": url}) for text, url, _ in FILTERED]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text("a first text, long enough")
    (folder / "c.txt").write_text(varied_text(100_000), encoding="utf-8", newline="")
    (folder / "d.txt").write_text(varied_text(100_000), encoding="utf-8", newline="")
    return folder


def test_filters_drop_documents_and_count_them(tmp_path):
    messages = []
    sources = [str(write_filtered(tmp_path / "in"))]
    out = prepare(sources, "bytes", tmp_path / "out", val_fraction=ALL_TRAIN, say=messages.append, **ALL_FILTERS)
    kept = [text for text, _, reason in FILTERED if reason == ""]
    assert texts_of(stream_of(out)) == [*kept, (tmp_path / "in" / "c.txt").read_bytes().decode()]
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["documents"] == len(kept) + 1
    assert manifest["dropped"] == {"filters": ALL_FILTERS, "documents": {"duplicate": 5, "short": 1, "wikipedia": 2}}
    assert messages[-1].endswith("; dropped 5 duplicate, 1 short, 2 wikipedia")
    assert sorted(file.name for file in out.iterdir()) == [
        MANIFEST,
        "train-00000.bin",
        "val-00000.bin",
        "vocabulary.json",
    ]


def test_filters_are_off_by_default(tmp_path):
    out = make([write_filtered(tmp_path / "in")], tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["documents"] == len(FILTERED) - 2 + 3
    assert manifest["dropped"]["documents"] == {}


@pytest.mark.parametrize("option", ALL_FILTERS)
def test_each_filter_alone(tmp_path, option):
    out = make([write_filtered(tmp_path / "in")], tmp_path / "out", **{option: ALL_FILTERS[option]})
    reason = {"drop_wikipedia": "wikipedia", "min_bytes": "short", "drop_duplicates": "duplicate"}[option]
    expected = {"wikipedia": 2, "short": 1, "duplicate": 5}[reason]
    assert json.loads((out / MANIFEST).read_text())["dropped"]["documents"] == {reason: expected}


def test_dropping_all_documents_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match=r"no text found, except in the documents that were dropped \(1 short\)"):
        make([tmp_path / "a.txt"], tmp_path / "out", min_bytes=10)


# Estimates.


def test_a_large_job_starts_with_an_estimate(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(varied_text(300_000), encoding="utf-8", newline="")
    size = (tmp_path / "a.txt").stat().st_size
    monkeypatch.setattr(module, "ESTIMATE_BYTES", size)
    messages = []
    prepare([str(tmp_path / "a.txt")], "bytes", tmp_path / "out", say=messages.append, threads=2)
    tokens, need, free = re.fullmatch(
        rf"{tmp_path}/out.partial: about ([\d,]+) tokens: (\d+\.\d\d) GB of the (\d+\.\d\d) GB free, and "
        r"\d+:\d\d:\d\d at \d+\.\d MB of text per second on 2 threads, if the source is fast enough",
        messages[0],
    ).groups()
    assert int(tokens.replace(",", "")) == float(f"{size:.2g}")
    assert float(need) == round(2 * size / 1e9, 2)
    assert float(free) > 0


def test_lack_of_disk_space_is_reported_before_the_work_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("text " * 20_000)
    monkeypatch.setattr(module, "ESTIMATE_BYTES", 1)
    usage = type(shutil.disk_usage("/"))(total=10**6, used=10**6 - 150_000, free=150_000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(module, "_write_tokens", lambda *_: pytest.fail("work was started"))
    assert main([str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"data/prepare.py: error: {tmp_path / 'out.partial'}: not enough disk space; free some space, or choose "
        "another disk with --out\n"
    )


# Shards have the same bytes with any number of threads, and after interruptions.


def test_number_of_threads_does_not_change_the_shards(tmp_path):
    write_sources(tmp_path / "in")
    expected = contents(make([tmp_path / "in"], tmp_path / "one", threads=1))
    assert contents(make([tmp_path / "in"], tmp_path / "five", threads=5)) == expected


@pytest.mark.parametrize("calls", [7, *(pytest.param(calls, marks=pytest.mark.slow) for calls in (1, 2, 30, 44))])
@pytest.mark.parametrize("filters", [{}, ALL_FILTERS], ids=["no filters", "filters"])
def test_interruptions_do_not_change_the_shards(tmp_path, monkeypatch, calls, filters):
    """The preparation is interrupted repeatedly, after a number of appends, until it completes."""
    write_sources(tmp_path / "in")
    write_filtered(tmp_path / "in" / "filtered")
    options = {"shard_tokens": 30_000, "val_fraction": 0.2, "threads": 2, **filters}
    expected = contents(make([tmp_path / "in"], tmp_path / "expected", **options))
    monkeypatch.setattr(module, "JOURNAL_BYTES", 1)
    monkeypatch.setattr(module, "BATCH_PARTS", 1)
    append, left = module.Shards.append, calls

    def failing(self, split, ids):
        nonlocal left
        left -= 1
        if left < 0:
            append(self, split, ids[: len(ids) // 2])
            raise KeyboardInterrupt
        append(self, split, ids)

    monkeypatch.setattr(module.Shards, "append", failing)
    interruptions = 0
    for _ in range(60):
        left = calls + interruptions  # one more append each time, so that it completes
        try:
            make([tmp_path / "in"], tmp_path / "out", **options)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert not (tmp_path / "out").exists()
    assert interruptions > 0
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("where", ["append", "_save_journal", "restore", "_write_manifest"])
@pytest.mark.parametrize("fraction", [0.25, 1 - 1e-12])
def test_interruption_while_the_splits_are_filled(tmp_path, monkeypatch, where, fraction):
    monkeypatch.setattr(module, "SMALL_TEXT", 0)
    (tmp_path / "a.txt").write_text("abcde" * 20)
    options = {"val_fraction": fraction, "shard_tokens": 9}
    expected = contents(make([tmp_path / "a.txt"], tmp_path / "expected", **options))
    owner = module.Shards if where in ("append", "restore") else module
    appends = 4 if fraction < 0.5 else 2  # the text, end-of-text, and pieces that fill the other split
    original = getattr(owner, where)
    left = {"append": appends, "_save_journal": 1, "restore": 1, "_write_manifest": 0}[where]

    def failing(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, failing)
        with pytest.raises(KeyboardInterrupt):
            make([tmp_path / "a.txt"], tmp_path / "out", **options)
    messages = []
    prepare([str(tmp_path / "a.txt")], "bytes", tmp_path / "out", say=messages.append, **options)
    assert "resuming after 1 documents" in messages[0]
    assert contents(tmp_path / "out") == expected


def interrupted(tmp_path, monkeypatch, **options):
    """Create OUT.partial as an interrupted preparation leaves it."""
    monkeypatch.setattr(module, "JOURNAL_BYTES", 1)
    monkeypatch.setattr(module, "BATCH_PARTS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_fill_validation", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make([tmp_path / "in"], tmp_path / "out", **options)


def test_preparation_starts_over_if_a_source_changed(tmp_path, monkeypatch):
    write_sources(tmp_path / "in")
    interrupted(tmp_path, monkeypatch)
    (tmp_path / "in" / "b.md").write_text("changed")
    messages = []
    prepare([str(tmp_path / "in")], "bytes", tmp_path / "out", say=messages.append)
    assert messages[0].endswith("the sources or options have changed since the interruption; starting over")
    assert contents(tmp_path / "out") == contents(make([tmp_path / "in"], tmp_path / "expected"))


def test_preparation_starts_over_if_an_option_changed(tmp_path, monkeypatch):
    write_sources(tmp_path / "in")
    interrupted(tmp_path, monkeypatch, shard_tokens=5000)
    out = make([tmp_path / "in"], tmp_path / "out")
    assert contents(out) == contents(make([tmp_path / "in"], tmp_path / "expected"))


def test_preparation_starts_over_if_a_shard_is_truncated(tmp_path, monkeypatch):
    write_sources(tmp_path / "in")
    interrupted(tmp_path, monkeypatch)
    os.truncate(tmp_path / "out.partial" / "data" / "train-00000.bin", 100)
    messages = []
    prepare([str(tmp_path / "in")], "bytes", tmp_path / "out", say=messages.append)
    assert "shards are missing or truncated; starting over" in messages[0]
    assert contents(tmp_path / "out") == contents(make([tmp_path / "in"], tmp_path / "expected"))


def start(code, *arguments, **options):
    """Start a Python process that runs `code`; data.prepare is imported as `p`."""
    # (If this process ignores SIGINT, as background jobs of a shell do, its child processes inherit that.)
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); " + (
        "from data import prepare as p; " + code
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
def test_control_c_prints_one_line_and_the_same_command_resumes(tmp_path):
    (tmp_path / "a.txt").write_text(varied_text(200_000) * 300, encoding="utf-8", newline="")
    arguments = [tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "out"]
    process = start("p.JOURNAL_BYTES = 1 << 18; sys.exit(p.main(sys.argv[1:]))", *arguments, "--threads", 1)
    while not (tmp_path / "out.partial" / "journal.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == "data/prepare.py: interrupted; the same command resumes"
    assert not (tmp_path / "out").exists()
    messages = []
    prepare([str(tmp_path / "a.txt")], "bytes", tmp_path / "out", say=messages.append)
    assert "resuming after 0 documents and" in messages[0]
    assert contents(tmp_path / "out") == contents(make([tmp_path / "a.txt"], tmp_path / "expected"))


def test_a_full_disk_prints_one_line_and_the_same_command_resumes(tmp_path):
    (tmp_path / "a.txt").write_text(varied_text(400_000), encoding="utf-8", newline="")
    arguments = [tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "out"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    process = start("sys.exit(p.main(sys.argv[1:]))", *arguments, preexec_fn=limit)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors == f"data/prepare.py: error: {tmp_path / 'out.partial'}: File too large\n"
    assert contents(make([tmp_path / "a.txt"], tmp_path / "out")) == contents(
        make([tmp_path / "a.txt"], tmp_path / "expected")
    )


def test_the_script_finds_its_modules(tmp_path):
    """The package is not installed, and the script runs in another folder."""
    (tmp_path / "a.txt").write_text("text")
    code = (
        "import runpy, sys; sys.path[0] = sys.argv[1] + '/data'; runpy.run_path(sys.argv.pop(1) + '/data/prepare.py', "
    )
    command = [sys.executable, "-S", "-c", code + "run_name='__main__')", ROOT, "a.txt", "--tokenizer", "bytes"]
    site = str(Path(np.__file__).parents[1])
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": site}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "a" / MANIFEST).exists()


def test_prepare_runs_in_a_spawned_process(tmp_path):
    write_sources(tmp_path / "in")
    process = multiprocessing.get_context("spawn").Process(
        target=prepare, args=([str(tmp_path / "in")], "bytes", tmp_path / "out")
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert contents(tmp_path / "out") == contents(make([tmp_path / "in"], tmp_path / "expected"))


@pytest.mark.parametrize("unit", [b"no line end ", b"line\n"])
def test_memory_is_bounded(tmp_path, unit):
    with (tmp_path / "a.txt").open("wb") as stream:
        for _ in range(40):
            stream.write(unit * ((1 << 20) // len(unit)))
    tracemalloc.start()
    try:
        make([tmp_path / "a.txt"], tmp_path / "out", threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(TokenDataset.open(tmp_path / "out", split).tokens for split in SPLITS) > 39 << 20
    assert peak < 20 << 20


# Stdin.


def test_stdin(tmp_path):
    text = varied_text(100_000)
    process = start(
        "sys.exit(p.main(sys.argv[1:]))",
        *("-", "--tokenizer", "bytes", "--val-fraction", ALL_TRAIN),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        encoding="utf-8",
    )
    output, _ = process.communicate(text, timeout=30)
    assert process.returncode == 0
    assert output.splitlines()[-1] == "next: python train.py --data stdin --out-dir out-stdin"
    assert "".join(texts_of(stream_of(tmp_path / "data" / "stdin"))) == text


def test_stdin_starts_over_after_an_interruption(tmp_path, monkeypatch):
    def set_stdin(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        set_stdin(b"before")
        with pytest.raises(KeyboardInterrupt):
            make(["-"], tmp_path / "out")
    set_stdin(b"after")
    messages = []
    prepare(["-"], "bytes", tmp_path / "out", val_fraction=ALL_TRAIN, say=messages.append)
    assert messages[0].endswith("stdin cannot be read again; starting over")
    assert texts_of(stream_of(tmp_path / "out")) == ["after"]


# The command line.


def test_summary_and_training_command_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("some text\n" * 100)
    assert main(["my.txt", "--tokenizer", "bytes", "--val-fraction", "0.1"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"data/my: 1 documents, 902 training and 100 validation tokens, 1\.00 bytes per token, \d+\.\d s", output[0]
    )
    assert output[1] == "next: python train.py --data my --out-dir out-my"
    Path("in.d").mkdir()
    Path("in.d/a").write_text("text")
    assert main(["in.d", "--tokenizer", "bytes"]) == 0
    assert Path("data/in.d/manifest.json").is_file()


def test_existing_data_set_is_rejected_or_renamed(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("old text")
    arguments = [str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    old = contents(tmp_path / "out")
    (tmp_path / "a.txt").write_text("new text")
    capsys.readouterr()
    assert main(arguments) == 1
    assert capsys.readouterr().err == (
        f"data/prepare.py: error: {tmp_path / 'out'}: already exists; choose another --out, or use --fresh to "
        "rename it\n"
    )
    assert main([*arguments, "--fresh"]) == 0
    assert main([*arguments, "--fresh"]) == 0
    assert contents(tmp_path / "out.1") == old
    assert contents(tmp_path / "out.2") == contents(tmp_path / "out") != old


@pytest.mark.parametrize("closed", ["|", ">"])
def test_an_output_error_does_not_stop_the_preparation(tmp_path, closed):
    (tmp_path / "a.txt").write_text("some text\n" * 200)
    command = f"{sys.executable} {ROOT}/data/prepare.py a.txt --fresh --tokenizer bytes --out set "
    command += "| true; exit ${PIPESTATUS[0]}" if closed == "|" else "> /dev/full"
    for _ in range(2):  # the second run renames the existing set, and prints that before the new set is complete
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "set" / MANIFEST).is_file()


def test_training_command_for_a_tiny_set_has_a_block_size_that_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n" * 30)
    assert main(["a.txt", "--tokenizer", "bytes", "--out", "tiny"]) == 0
    size = min(TokenDataset.open(Path("tiny"), split).tokens for split in SPLITS) - 1
    assert 0 < size < 64
    end = f"next: python train.py --data tiny --out-dir out-tiny --block-size {size}\n"
    assert capsys.readouterr().out.endswith(end)


def test_a_second_process_with_the_same_out_is_rejected(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out.partial").mkdir()
    lock = tmp_path / "out.partial" / "lock"
    code = "p.Lock(p.Path(sys.argv[1]), 'out').acquire(); print(flush=True); input()"
    other = start(code, lock, stdin=subprocess.PIPE)
    other.stdout.readline()
    try:
        with pytest.raises(ValueError, match=rf"lock: process {other.pid} on .* is using {tmp_path / 'out'}"):
            make([tmp_path / "a.txt"], tmp_path / "out")
    finally:
        other.kill()
        other.communicate()
    assert lock.exists()
    make([tmp_path / "a.txt"], tmp_path / "out")  # the lock of a process that is no longer running is taken over
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_a_data_set_is_complete_if_the_process_is_killed_after_the_last_rename(tmp_path):
    (tmp_path / "a.txt").write_text(varied_text(2000))
    code = (
        "import os; p.shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), 9)\n"
        "p.prepare([sys.argv[1]], 'bytes', sys.argv[2])"
    )
    assert start(code, tmp_path / "a.txt", tmp_path / "out").wait(30) == -signal.SIGKILL
    assert contents(tmp_path / "out") == contents(make([tmp_path / "a.txt"], tmp_path / "expected"))


BAD = [  # files by name, arguments, part of the error message
    ({}, ["nothing.txt"], "source nothing.txt: no such file or folder"),
    ({"a.txt": b""}, ["a.txt"], "sources a.txt: no text found"),
    ({"d/b.png": b"\0"}, ["d"], "source d: no text, Markdown, .jsonl, .csv, .tsv or .parquet file in this folder"),
    ({"a.json": b"{}"}, ["a.json"], "source a.json: not text; expected text in UTF-8, JSON lines"),
    ({"a.txt": b"ok\n" * 9000 + b"\xe9t\xe9"}, ["a.txt"], "a.txt: byte 27000 is not UTF-8 (0xe9)"),
    ({"a.txt": b"ok \xf0\x9f\x99"}, ["a.txt"], "a.txt: byte 3 is not UTF-8 (0xf0)"),
    ({"a.txt": b"\xbf" * 40000}, ["a.txt"], "a.txt: byte 0 is not UTF-8 (0xbf)"),
    ({"a.txt": "text".encode("utf-16")}, ["a.txt"], "a.txt: UTF-16, not UTF-8; specify the --encoding, such as cp1252"),
    ({"a.txt": "some text".encode("utf-16-be")}, ["a.txt"], "a.txt: UTF-16, not UTF-8"),
    (
        {"a.txt": b"\xe9", "b.txt": b"b"},
        ["a.txt", "b.txt", "--encoding", "utf-32"],
        "byte 0 is not UTF-32 (0xe9); specify an",
    ),
    ({"a.txt": b"a"}, ["a.txt", "--encoding", "latin-0"], "--encoding latin-0: unknown; expected a name that Python"),
    ({"a.txt": b"a"}, ["a.txt", "--encoding", "base64"], "--encoding base64: unknown; expected a name that Python"),
    ({"a.csv": b"text"}, ["a.csv", "--delimiter", ";;"], "--delimiter is ';;'; expected one character, or tab"),
    ({"a.csv": b"id;txt\n1;a\n"}, ["a.csv"], "a.csv: no column 'text' (--text-column); the columns are 'id', 'txt'"),
    (
        {"d/a.txt": b"\xe9", "d/b.txt": b"ok", "d/c.txt": "text".encode("utf-16"), "d/e.jsonl": b'{"text": "\xe9"}'},
        ["d"],
        "3 of 4 files are not UTF-8: d/a.txt (byte 0 is not UTF-8 (0xe9)), d/c.txt (UTF-16, not UTF-8), d/e.jsonl (",
    ),
    ({"a.jsonl": b'{"text": "a"}\n\nnot json\n'}, ["a.jsonl"], "a.jsonl: line 3: expected a JSON object"),
    ({"a.jsonl": b'{"txt": "a"}'}, ["a.jsonl"], "a.jsonl: line 1: expected a JSON object with a string under 'text'"),
    ({"a.jsonl": b'{"text": 5}'}, ["a.jsonl"], "'text' has type int"),
    ({"a.jsonl": b'"text"'}, ["a.jsonl"], "a.jsonl: line 1: expected a JSON object"),
    ({"a.jsonl": b'{"text": "\xff"}'}, ["a.jsonl"], "a.jsonl: byte 10 is not UTF-8 (0xff)"),
    ({"a.txt": b"a"}, ["a.txt", "--tokenizer", "gpt5"], "tokenizer 'gpt5' is unknown; choose bytes, gpt2"),
    ({"a.txt": b"a"}, ["a.txt", "--val-fraction", "1"], "--val-fraction is 1.0; expected 0 < fraction < 1"),
    ({"a.txt": b"a"}, ["a.txt", "--val-fraction", "nan"], "--val-fraction is nan; expected 0 < fraction < 1"),
    ({"a.txt": b"a"}, ["a.txt", "--shard-tokens", "0"], "--shard-tokens is 0; expected at least 1"),
    ({"a.txt": b"a"}, ["a.txt", "--threads", "0"], "--threads is 0; expected at least 1"),
    ({"a.txt": b"a"}, ["a.txt", "--out", "a.txt/x"], "a.txt/x.partial: Not a directory"),
    ({"a.txt": b"a"}, ["a.txt", "--min-bytes", "-1"], "--min-bytes is -1; expected at least 0"),
    ({}, ["-", "-"], "source -: stdin is listed twice"),
    (
        {},
        ["-", "--drop-duplicates"],
        "source -: filters read a document twice, and stdin can be read only once",
    ),
]


@pytest.mark.parametrize(("files", "arguments", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_errors_print_one_line(tmp_path, monkeypatch, capsys, files, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, data in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
    assert main(["--tokenizer", "bytes", *arguments]) == 1
    output, errors = capsys.readouterr()
    assert errors.startswith("data/prepare.py: error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not output
    assert not list(Path(".").glob("data/*/manifest.json"))


@pytest.mark.parametrize("arguments", [[], [""], ["a", "--out", ""], ["a", "--nonsense"], ["a", "--threads", "x"]])
def test_usage_errors_print_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data/prepare.py: error: ")
    assert "--help lists the options" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write to read-only folders")
def test_a_read_only_folder_is_an_error(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir(mode=0o500)
    assert main([str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "out" / "x")]) == 1
    assert capsys.readouterr().err == f"data/prepare.py: error: {tmp_path / 'out' / 'x.partial'}: Permission denied\n"


def test_no_sources_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="sources: none given"):
        make([], tmp_path / "out")


def with_added_token(folder):
    BYTES.save_hugging_face(folder, 64)
    (folder / "added_tokens.json").write_text('{"<|user|>": 257}')
    return folder


# Small texts


def splits_of(folder):
    """The text of each split, without end-of-text tokens."""
    return {split: "".join(texts_of(ids_of(folder, split))) for split in SPLITS}


def small_texts():
    rng = np.random.default_rng(5)
    words = ["der", "Fluss", "house", "größer", "日本語", "and", "x" * 30]
    for size in (3_000, 20_000, 100_000, 289_000, 900_000):
        text = ""
        while len(text.encode()) < size:
            text += " ".join(rng.choice(words, rng.integers(3, 80))) + "\n" * int(rng.integers(1, 3))
        yield pytest.param(text, id=f"{size} bytes")
    yield pytest.param("word " * 40_000, id="one line")
    yield pytest.param("日本語の文章です。" * 5_000, id="no whitespace")


@pytest.mark.parametrize("fraction", [0.05, 0.2])
@pytest.mark.parametrize("text", list(small_texts()))
def test_the_validation_split_of_a_small_text_has_the_requested_fraction(tmp_path, text, fraction):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = splits_of(make([tmp_path / "a.txt"], tmp_path / "out", val_fraction=fraction))
    sizes = {split: len(part.encode()) for split, part in found.items()}
    assert sum(sizes.values()) == len(text.encode())
    assert sizes["val"] == pytest.approx(fraction * len(text.encode()), rel=0.1)
    assert "\ufffd" not in found["val"] + found["train"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "the last of them is cut there" in manifest["split_rule"]["text"]


def test_equal_documents_of_a_small_text_are_in_the_same_split(tmp_path):
    documents = [f"document {i % 40} of forty different ones, several times" for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    out = make([tmp_path / "a.jsonl"], tmp_path / "out", val_fraction=0.1)
    train, val = (set(texts_of(ids_of(out, split))) for split in SPLITS)
    assert not train & val
    size = len("".join(splits_of(out)["val"]))
    assert size == pytest.approx(0.1 * len("".join(documents)), rel=0.1)


def test_a_text_above_a_million_bytes_is_split_by_hashes_of_its_parts(tmp_path):
    (tmp_path / "a.txt").write_text(varied_text(1_100_000), encoding="utf-8", newline="")
    out = make([tmp_path / "a.txt"], tmp_path / "out")
    parts = read_parts(find_sources([str(tmp_path / "a.txt")], "text", silent), [0, 0, 0])
    expected = "".join(part.data.decode() for part in parts if split_of(part.data, 0.05) == "val")
    assert splits_of(out)["val"] == expected


@pytest.mark.parametrize("calls", [1, 20, 60])
def test_an_interruption_does_not_change_the_split_of_a_small_text(tmp_path, monkeypatch, calls):
    (tmp_path / "a.txt").write_text(varied_text(200_000), encoding="utf-8", newline="")
    expected = contents(make([tmp_path / "a.txt"], tmp_path / "expected"))
    monkeypatch.setattr(module, "JOURNAL_BYTES", 1)
    monkeypatch.setattr(module, "BATCH_PARTS", 1)
    original, left = module.Shards.append, calls
    with monkeypatch.context() as patch:

        def failing(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return original(*arguments)

        patch.setattr(module.Shards, "append", failing)
        with pytest.raises(KeyboardInterrupt):
            make([tmp_path / "a.txt"], tmp_path / "out")
    assert contents(make([tmp_path / "a.txt"], tmp_path / "out")) == expected


def test_stdin_is_split_like_a_file(tmp_path):
    text = varied_text(150_000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    make([tmp_path / "a.txt"], tmp_path / "file")
    command = [sys.executable, ROOT / "data" / "prepare.py", "-", "--tokenizer", "bytes", "--out", tmp_path / "stdin"]
    subprocess.run(command, input=text.encode(), check=True, capture_output=True)
    assert splits_of(tmp_path / "stdin") == splits_of(tmp_path / "file")


@pytest.mark.parametrize("special_tokens", [False, True])
def test_special_tokens_are_plain_text_by_default(special_tokens, tmp_path):
    (tmp_path / "tok").mkdir()
    tokenizer = Tokenizer.load(with_added_token(tmp_path / "tok"))
    text = "a<|user|>b<|endoftext|>c"
    (tmp_path / "a.txt").write_text(text)
    make([tmp_path / "a.txt"], tmp_path / "out", tmp_path / "tok", special_tokens=special_tokens, val_fraction=0.01)
    ids = stream_of(tmp_path / "out")
    expected = tokenizer.encode(text, special_tokens).tolist()
    assert sorted(ids) == sorted([*expected, tokenizer.end_of_text])
    assert (257 in ids) == special_tokens
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest.get("special_tokens", False) == special_tokens
    assert TokenDataset.open(tmp_path / "out", "train").tokenizer().added == tokenizer.added


def test_a_character_vocabulary_has_no_end_of_text_or_special_tokens(tmp_path):
    import pickle

    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate("\nabc"))}))
    (tmp_path / "a.txt").write_text("abc\n" * 9)
    make([tmp_path / "a.txt"], tmp_path / "out", tmp_path / "meta.pkl", val_fraction=0.2)
    assert len(stream_of(tmp_path / "out")) == 36
    with pytest.raises(ValueError, match=r"--special-tokens: the tokenizer .* has no special tokens"):
        make([tmp_path / "a.txt"], tmp_path / "b", tmp_path / "meta.pkl", special_tokens=True)
    (tmp_path / "b.txt").write_text("abd")
    with pytest.raises(ValueError, match="'d' is not in the vocabulary of 4 characters"):
        make([tmp_path / "b.txt"], tmp_path / "b", tmp_path / "meta.pkl")


@pytest.mark.extras("tokenizers")
def test_a_prefix_space_is_added_before_a_document_but_not_before_its_parts(tmp_path):
    (tmp_path / "tok").mkdir()
    Tokenizer.load("bytes").save_hugging_face(tmp_path / "tok", 64)
    config = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": True}))
    text = "word\n" * (3 * PART_BYTES // 5)
    (tmp_path / "a.txt").write_text(text)
    make([tmp_path / "a.txt"], tmp_path / "out", tmp_path / "tok", val_fraction=1e-9)
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert tokenizer.decode(ids_of(tmp_path / "out", "train")).startswith(" word\nword")
    assert b"".join(tokenizer.decode_bytes([i]) for s in SPLITS for i in ids_of(tmp_path / "out", s)).count(b" ") == 1
