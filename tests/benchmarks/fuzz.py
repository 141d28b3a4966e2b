"""Test every reader with damaged and malicious files: python tests/benchmarks/fuzz.py [--cases 10000] [--seed 0]

Each case takes a valid input (a model file of some format, a data set, a tokenizer, a checkpoint, a skipped step, text
in one of the formats of data/sources.py, a journal, a task file, options in TOML), changes one of its files, and reads
it. The outcome is correct if the reader raises a ValueError or OSError with one line that names the file or its folder,
or returns a valid result: shapes as in the config, ids within the vocabulary, text that can be encoded. The outcome is
wrong if the reader raises any other exception, if it takes more than 2 seconds of CPU time or 1 GB of memory (the
system kills the process), or if it executes, imports, writes or connects to anything (an audit hook detects this).

Prints a table; the exit status is 1 if any outcome was wrong. A case depends only on the seed and its number:
--first 4711 --cases 1 repeats case 4711. --targets limits the kinds of input.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import gzip
import hashlib
import importlib.util
import json
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for a repository that is not installed

from data.prepare import NO_FILTERS, Job, Shards, State, choose_split, prepare, read_parts  # noqa: E402
from data.prepare import _load_journal as load_journal  # noqa: E402
from data.prepare import _save_journal as save_journal  # noqa: E402
from data.sources import find_sources  # noqa: E402
from gpt2 import GPT2, GPT2Config, Tokenizer  # noqa: E402
from gpt2.convert import convert  # noqa: E402
from gpt2.formats import model_file, torch_file  # noqa: E402
from gpt2.formats.stored import Stored  # noqa: E402
from gpt2.replay import load_model  # noqa: E402
from gpt2.training import bad_step  # noqa: E402
from gpt2.training.dataset import SPLITS, TokenDataset  # noqa: E402
from gpt2.training.options import _read_toml as read_options  # noqa: E402
from gpt2.training.options import validate_options  # noqa: E402
from gpt2.training.run import Progress, RunFolder, RunOptions, read_log  # noqa: E402
from gpt2.training.tasks import TASKS, load_items  # noqa: E402
from tinygrad2 import Key, optim  # noqa: E402
from tinygrad2.checkpoint import save_arrays  # noqa: E402

SECONDS, MEMORY = 2, 1 << 30  # limits of a case: CPU time, and memory in addition to the program's own
WAIT = 60  # seconds until a case that waits for something is killed
LONGEST = 1000  # maximum number of characters in an error message
CONFIG = GPT2Config(vocab_size=257, n_positions=8, n_embd=4, n_layer=2, n_head=2)
TEXT = "It was 7 o'clock, naïve 🙂\n\tand then"

# Actions that no reader needs, by Python's event names (see "Audit events table" in Python's documentation).
FORBIDDEN = {
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate", "os.chmod", "os.putenv"),
    *("shutil.rmtree", "shutil.move", "shutil.copyfile", "socket.connect", "socket.bind", "ctypes.dlopen"),
    *("compile", "exec", "import", "marshal.loads", "pickle.find_class", "code.__new__"),
}
ODD_NUMBERS = (
    *(0, 1, -1, 2, 3, 127, 128, 255, 256, 257, 65535, 65536, 2**24),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**61 - 1, 2**63 - 1),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "x" * 3000, "../../../../etc/passwd", "/etc/passwd", "a\nb\x1b[2J", "\0", "\ud800"),
    *(ODD_NUMBERS, *ODD_NUMBERS, 0.5, -0.5, 1e308, float("nan"), float("inf"), 10**400, [], {}, [[]], {"a": 1}, ["x"]),
)
NEST = b")" + b"q\x00h\x00h\x00\x86" * 60  # 2**60 tuples
HOSTILE = (
    b"cos\nsystem\n(X\x0d\x00\x00\x00touch /tmp/xytR",
    b"cbuiltins\neval\n(X\x03\x00\x00\x001+1tR",
    b"c__builtin__\nexec\n(X\x04\x00\x00\x00passtR",
    b"X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93X\x04\x00\x00\x00true\x85R",
    b"(ios\nsystem\n",
    b"ccopyreg\n_reconstructor\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"c__main__\nGPTConfig\n)\x81",
    *(b"r\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f", b"\x82\x01", b"h\x00", b"}", b"]", b")", b"(", b"N", b"0", b"2"),
    *(b"R", b"b", b"Q", b"t", b"u", b"e", b"s", b"a", b"\x85", b"\x86", b"\x81", b"\x93", b"\x94", b"K\x00"),
    b"J\xff\xff\xff\xff",
    b"V\\u0041\n",  # pickletools loads a codec for this
    NEST + b"X\x01\x00\x00\x00a\x93",  # a name that is not text
    b"X\x01\x00\x00\x00a" + NEST + b"\x93",
    NEST + b"Q",
    b"}" + NEST + b"Ns",
    b"}(" + b"".join(b"\x8a\x09" + (i * (2**61 - 1)).to_bytes(9, "little") + b"N" for i in range(1, 2000)) + b"u",
)


@dataclass(frozen=True)
class Target:
    """One kind of input: the files that may be changed, and the function that reads it. `read` raises AssertionError
    for an invalid result.

    allowed  actions in FORBIDDEN that this reader needs.
    """

    files: tuple[str, ...]
    read: Callable[[Path], None]
    allowed: tuple[str, ...] = ()


def read_model(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        model = GPT2.from_pretrained(folder / name if name else folder)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        assert shapes == dict(model.config.shapes())
        assert all(parameter.data.dtype == np.float32 for parameter in model.parameters())

    return read


def read_dataset(folder: Path) -> None:
    for split in SPLITS:
        data = TokenDataset.open(folder, split)
        ids = data.read(0, data.tokens)
        assert len(ids) == data.tokens > 0
        assert ids.max() < data.vocab_size
        tokens, targets = data.batch([0, data.windows(4) - 1], 4)
        assert tokens.shape == targets.shape == (2, 4)
        assert len(data.fingerprint) == 64
    read_tokenizer(folder)


def read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(TEXT)
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT
    assert len(tokenizer.fingerprint) == 64


def read_characters(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    text = tokenizer.decode(range(tokenizer.vocab_size))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def read_bad_step(folder: Path) -> None:
    step = bad_step.read(folder / "bad-step-4")
    load_model(folder / "bad-step-4", step, "cpu", "float32")
    assert step.batches
    assert all(batch.tokens.shape == batch.targets.shape for batch in step.batches)
    assert step.step >= 0


def read_run(folder: Path) -> None:
    run = RunFolder(folder)
    saved = run.resume(lambda line: None)
    assert saved is not None
    model = GPT2.from_pretrained(saved.folder)
    run.load_optimizer(saved, optim.AdamW(model))
    assert all(isinstance(row["step"], int) for row in read_log(folder / "log.jsonl"))


def read_source(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        (source,) = find_sources([str(folder / name)], "text", lambda line: None)
        found = choose_split([source], NO_FILTERS, 0.1)
        size = 0
        for part in read_parts([source], (0, 0, 0), NO_FILTERS, None, found.part_bytes):
            assert part.data.decode()
            size += len(part.data)
        assert size < 100 << 20

    return read


def read_journal(folder: Path) -> None:
    """An interrupted preparation resumes or starts over, with the same result."""
    sources = find_sources([str(folder / "text.txt")], "text", lambda line: None)
    job = Job.of(sources, Tokenizer.load("bytes"), NO_FILTERS, 0.1, 100_000_000, False)
    shards = Shards(folder / "out.partial", np.dtype("<u2"), 100_000_000)
    state = load_journal(shards, job, lambda line: None)
    list(read_parts(sources, state.cursor))


def read_task(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        for item in load_items(TASKS[name], folder / f"{name}.jsonl"):
            assert isinstance(item.context, str)
            assert 0 <= item.label < len(item.endings)
            assert all(isinstance(ending, str) for ending in item.endings)

    return read


def read_toml(folder: Path) -> None:
    validate_options(read_options(folder / "options.toml"))


def read_training(folder: Path) -> None:
    """The optimizer state in a nanoGPT checkpoint."""
    state = model_file.read_training(model_file.open_model(folder / "ckpt.pt"))
    assert state.step >= 0
    for name, stored in state.moments.items():
        assert stored.read().shape == dict(CONFIG.shapes())[name.partition(".")[2]]


TARGETS = {
    "safetensors": Target(("model.safetensors",), read_model("")),
    "config": Target(("config.json",), read_model("")),
    "shards": Target(("model.safetensors.index.json", "part-1.safetensors", "part-2.safetensors"), read_model("")),
    "nanogpt": Target(("ckpt.pt",), read_model("ckpt.pt")),
    "build-nanogpt": Target(("model.pt",), read_model("model.pt")),
    "torch 1.5": Target(("pytorch_model.bin",), read_model("")),
    "llmc": Target(("model.bin",), read_model("model.bin")),
    "llmc bfloat16": Target(("model.bin",), read_model("model.bin")),
    "dataset": Target(("manifest.json", "vocabulary.json", "train-00000.bin", "val-00000.bin"), read_dataset),
    "vocabulary": Target(("vocabulary.json", "vocabulary.tiktoken"), read_tokenizer),
    "vocab.json": Target(("vocab.json", "merges.txt"), read_tokenizer),
    "tokenizer.json": Target(("tokenizer.json",), read_tokenizer),
    "checkpoint": Target(
        ("ckpt-000003/trainer.json", "ckpt-000003/manifest.json", "ckpt-000003/optimizer.safetensors", "log.jsonl"),
        read_run,
    ),
    "training": Target(("ckpt.pt",), read_training),
    "bad step": Target(
        ("bad-step-4/step.json", "bad-step-4/batch.safetensors", "bad-step-4/manifest.json"), read_bad_step
    ),
    "characters": Target(("meta.pkl",), read_characters),
    "json lines": Target(("text.jsonl",), read_source("text.jsonl")),
    "json lines.gz": Target(("text.jsonl.gz",), read_source("text.jsonl.gz")),
    "csv": Target(("text.csv",), read_source("text.csv")),
    "csv.gz": Target(("text.csv.gz",), read_source("text.csv.gz")),
    "text.gz": Target(("text.txt.gz",), read_source("text.txt.gz")),
    "journal": Target(("out.partial/journal.json",), read_journal, ("os.mkdir",)),
    "hellaswag": Target(("hellaswag.jsonl",), read_task("hellaswag")),
    "lambada": Target(("lambada.jsonl",), read_task("lambada")),
    "toml": Target(("options.toml",), read_toml),
    "parquet": Target(("text.parquet",), read_source("text.parquet")),
    "json lines.zst": Target(("text.jsonl.zst",), read_source("text.jsonl.zst")),
}
READABLE = [
    name for name in TARGETS if name not in ("parquet", "json lines.zst") or importlib.util.find_spec("pyarrow")
]


def make_originals(folder: Path) -> None:
    """Create a valid input of each kind, in a folder named after the target."""
    model = GPT2(CONFIG, seed=1)
    model.save_pretrained(folder / "safetensors")
    shutil.copytree(folder / "safetensors", folder / "config")
    arrays = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    stored = {name: Stored(a.shape, "float32", lambda a=a: a) for name, a in arrays.items()}

    shards = folder / "shards"
    model.save_pretrained(shards)
    (shards / "model.safetensors").unlink()
    places = {name: f"part-{1 + i % 2}.safetensors" for i, name in enumerate(arrays)}
    for part in set(places.values()):
        save_arrays(shards / part, {name: arrays[name] for name in arrays if places[name] == part})
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    for name in ("nanogpt", "build-nanogpt", "llmc", "llmc bfloat16"):
        (folder / name).mkdir()
    convert(folder / "safetensors", folder / "nanogpt" / "ckpt.pt", "pt")
    convert(folder / "safetensors", folder / "llmc" / "model.bin", "llmc")
    convert(folder / "safetensors", folder / "llmc bfloat16" / "model.bin", "llmc", "bfloat16")
    sizes = {"block_size": 8, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 4}
    gpt_config = b"c__main__\nGPTConfig\n)\x81" + pickle.dumps(sizes, 2)[2:-1] + b"b"
    torch_file.write_pickle(folder / "build-nanogpt" / "model.pt", {"model": stored, "config": "HERE", "step": 3})
    rewrite_zip(folder / "build-nanogpt" / "model.pt", lambda p: p.replace(b"X\x04\x00\x00\x00HERE", gpt_config))

    old = folder / "torch 1.5"
    model.save_pretrained(old)
    (old / "model.safetensors").unlink()
    convert(folder / "safetensors", old / "new.pt", "pt")
    to_legacy(old / "new.pt", old / "pytorch_model.bin")

    (folder / "text.txt").write_text(TEXT * 200, encoding="utf-8")
    prepare([str(folder / "text.txt")], "bytes", folder / "dataset")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b" the": 258, b"ve": 259}
    lines = "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in ranks.items())
    (folder / "own.tiktoken").write_text(lines)
    tokenizer = Tokenizer.load(folder / "own.tiktoken")
    tokenizer.save(folder / "vocabulary")
    (folder / "vocab.json").mkdir()
    tokenizer.save_hugging_face(folder / "vocab.json", 8)
    (folder / "tokenizer.json").mkdir()
    merges = (folder / "vocab.json" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    bpe = {"type": "BPE", "vocab": json.loads((folder / "vocab.json" / "vocab.json").read_text()), "merges": merges}
    marks = [{"id": 260, "content": "<|endoftext|>", "special": True}]
    whole = {"added_tokens": marks, "normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}, "model": bpe}
    (folder / "tokenizer.json" / "tokenizer.json").write_text(json.dumps(whole))

    optimizer = optim.AdamW(model)
    (folder / "checkpoint").mkdir()
    row = {"step": 3, "loss": 4.5, "lr": 0.001}
    (folder / "checkpoint" / "log.jsonl").write_text("".join(json.dumps({**row, "step": i}) + "\n" for i in range(4)))
    progress = Progress(3, 24, 192, 1.5, {"step": 3, "val_loss": 4.25})
    run_options = RunOptions({"seed": 1}, {})
    RunFolder(folder / "checkpoint").save(model, optimizer, Tokenizer.load("bytes"), progress, run_options, "data")
    make_sources(folder)
    make_training(folder, model)


def make_training(folder: Path, model: GPT2) -> None:
    """Create a nanoGPT checkpoint with optimizer state, a skipped step, nanoGPT's character set, and TOML options."""
    for name in ("training", "bad step", "characters", "toml"):
        (folder / name).mkdir()
    run = folder / "checkpoint" / "ckpt-000003"
    convert(run, folder / "training" / "ckpt.pt", "pt")
    tokens = np.arange(16, dtype=np.int64).reshape(2, 8)
    options = {"seed": 1, "recompute": "none", "dtype": "float32", "head_rows": None}
    batch = bad_step.Batch(Key(1, 3, 0), tokens, tokens + 1)
    bad_step.BadStep(4, None, None, 1e-3, options, [batch]).write(folder / "bad step", model, Tokenizer.load("bytes"))
    characters = sorted(set(TEXT))
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": {}}
    (folder / "characters" / "meta.pkl").write_bytes(pickle.dumps(meta, 4))
    lines = ('preset = "nano"', "max-iters = 5", "learning_rate = 1e-3", "nesterov = false", 'data = "x"', "seed = 3")
    (folder / "toml" / "options.toml").write_text("\n".join(lines) + "\n")


def make_sources(folder: Path) -> None:
    """Create data sources of each format, task files, and an interrupted preparation."""
    texts = [f"{TEXT} {i}" for i in range(50)]
    lines = "".join(
        json.dumps({"text": text, "url": "https://example.org", "n": i}) + "\n" for i, text in enumerate(texts)
    )
    table = "text,url\n" + "".join('"{}","{}"\n'.format(text.replace('"', '""'), i) for i, text in enumerate(texts))
    contents = {
        "json lines": ("text.jsonl", lines),
        "csv": ("text.csv", table),
        "text.gz": ("text.txt.gz", "".join(texts)),
    }
    contents |= {"json lines.gz": ("text.jsonl.gz", lines), "csv.gz": ("text.csv.gz", table)}
    question = {"ctx": "a b", "endings": ["c", "d", "e", "f"], "label": 2}
    contents |= {"hellaswag": ("hellaswag.jsonl", (json.dumps(question) + "\n") * 5)}
    contents |= {"lambada": ("lambada.jsonl", (json.dumps({"text": "one two three"}) + "\n") * 5)}
    for name, (file, text) in contents.items():
        (folder / name).mkdir()
        data = text.encode()
        (folder / name / file).write_bytes(gzip.compress(data) if file.endswith(".gz") else data)
    if "parquet" in READABLE:
        import pyarrow
        import pyarrow.parquet

        (folder / "parquet").mkdir()
        pyarrow.parquet.write_table(
            pyarrow.table({"text": texts}), folder / "parquet" / "text.parquet", compression="zstd"
        )
        (folder / "json lines.zst").mkdir()
        with pyarrow.output_stream(folder / "json lines.zst" / "text.jsonl.zst", compression="zstd") as stream:
            stream.write(lines.encode())
    partial = folder / "journal" / "out.partial"
    partial.mkdir(parents=True)
    (folder / "journal" / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    sources = find_sources([str(folder / "journal" / "text.txt")], "text", lambda line: None)
    job = Job.of(sources, Tokenizer.load("bytes"), NO_FILTERS, 0.1, 100_000_000, False)
    shards = Shards(partial, np.dtype("<u2"), 100_000_000)
    shards.append("train", np.arange(100))
    shards.append("val", np.arange(20))
    save_journal(job, State([0, 0, 120], "train", 0, 120), shards)


def to_legacy(new: Path, old: Path) -> None:
    """Convert a PyTorch zip file to the pickles that PyTorch wrote before 1.6, with only the model's tensors."""
    with zipfile.ZipFile(new) as file:
        program = file.read("archive/data.pkl")
        memory = {name.rpartition("/")[2]: file.read(name) for name in file.namelist() if "/data/" in name}
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    keys = list(memory)
    tail = b"".join(struct.pack("<q", len(memory[key]) // 4) + memory[key] for key in keys)
    pickled = b"".join(pickle.dumps(value, 2) for value in head) + program + pickle.dumps(keys, 2)
    old.write_bytes(pickled + tail)


# Changes


def change(rng: random.Random, file: Path, other: bytes) -> None:
    """Change a file in a way specific to its format, byte by byte, or both."""
    structured = {
        ".json": change_json,
        ".jsonl": change_json,
        ".safetensors": change_header,
        ".pt": change_pickle,
        ".pkl": change_plain_pickle,
        ".csv": change_table,
        ".toml": change_options,
        ".gz": change_compressed,
    }
    if file.suffix in structured and rng.random() < 0.6:
        structured[file.suffix](rng, file)
        if rng.random() < 0.8:
            return
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change_bytes(rng, content, other)
    file.write_bytes(content)


def change_bytes(rng: random.Random, content: bytearray, other: bytes) -> None:
    """Make one change. Half of the changes are in the first 2,048 bytes, where headers are."""
    where = rng.randrange(min(len(content), 2048) if rng.random() < 0.5 else len(content)) if content else 0
    length = min(rng.choice((1, 2, 4, 8, 64, 1024)), len(content))
    match rng.randrange(9):
        case 0 if content:
            content[where] ^= 1 << rng.randrange(8)
        case 1 if content:
            content[where] = rng.randrange(256)
        case 2:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(ODD_NUMBERS) + rng.choice((-1, 0, 0, 0, 1))
            content[where : where + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
        case 3:
            del content[where : where + length]
        case 4:
            content[where:where] = content[where : where + length]
        case 5:
            content[where:where] = rng.randbytes(length)
        case 6:
            del content[where:]
        case 7:
            start = rng.randrange(len(other))
            content[where : where + length] = other[start : start + length]
        case _:
            digits = list(re.finditer(rb"\d+", bytes(content[:4096])))
            if digits:
                found = rng.choice(digits)
                content[found.start() : found.end()] = str(rng.choice(ODD_NUMBERS)).encode()


def change_compressed(rng: random.Random, file: Path) -> None:
    """Change the text in a gzip-compressed file, or replace it by a large one."""
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder) / file.stem
        inner.write_bytes(gzip.decompress(file.read_bytes()))
        if rng.random() < 0.1:
            piece = rng.choice((b"[],", b"{},", b"ab,", b'"a\n",', b"a\n", b"x", b'{"":0},'))
            start = {".jsonl": b'{"text":"x","a":[', ".csv": b"text,b\n"}.get(inner.suffix, b"")
            inner.write_bytes(start + piece * (rng.choice((1, 40, 64)) * (1 << 20) // len(piece)))
        else:
            change(rng, inner, b"x" * 2000)
        file.write_bytes(gzip.compress(inner.read_bytes(), 1))


def change_table(rng: random.Random, file: Path) -> None:
    """Insert quotes, delimiters or newlines into a CSV file, or replace text with them."""
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 2, 4))):
        where = rng.randrange(len(content) + 1)
        content[where : where + rng.choice((0, 1, 30))] = rng.choice(
            (b'"', b",", b"\n", b"\r", b"\0", b'""', b";", b"," * 3000)
        )
    file.write_bytes(content)


def change_options(rng: random.Random, file: Path) -> None:
    """Replace a line of a TOML file."""
    lines = file.read_text().splitlines()
    value = rng.choice(
        ("[" * 50_000, "nan", "-inf", "9" * 5000, '"\\u001b[2J"', "[]", "{}", "1979-05-27", "''", "true", "-1")
    )
    key = rng.choice(
        ("seed", "preset", "data", "learning_rate", '"\\u001b[2J"', "x" * 3000, ".".join(["a"] * 20_000), "keep")
    )
    lines[rng.randrange(len(lines))] = rng.choice((f"{key} = {value}", f"[{key}]", key, value))
    file.write_text("\n".join(lines))


def change_plain_pickle(rng: random.Random, file: Path) -> None:
    file.write_bytes(changed_pickle(rng, file.read_bytes()))


def change_json(rng: random.Random, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    i = rng.randrange(len(lines))
    lines[i] = changed_json(rng, lines[i])
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")


def changed_json(rng: random.Random, text: str) -> str:
    """Replace a value, a key or the entire document, occasionally with a value nested too deeply for a parser."""
    tree = {"": json.loads(text)}
    places = list(nodes(tree))
    for _ in range(rng.choice((1, 1, 2))):
        parent, key = rng.choice(places)
        try:
            match rng.randrange(5):
                case 0 if parent is not tree:
                    del parent[key]
                case 1 if isinstance(parent, dict):
                    parent[rng.choice([str(rng.choice(ODD_VALUES))[:50], *parent])] = parent.pop(key)
                case 2:
                    parent[key] = "DEEP"
                case _:
                    parent[key] = rng.choice(ODD_VALUES)
        except (KeyError, IndexError):  # the first change removed it
            pass
    deep = rng.choice(
        ("[" * 100_000, "[" * 500 + "]" * 500, '{"a":' * 5000, "[" + "[]," * 100_000 + "[]]", "-" + "9" * 5000)
    )
    return json.dumps(tree.get("", {}), ensure_ascii=rng.random() < 0.9).replace('"DEEP"', deep)


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from nodes(value)


def change_header(rng: random.Random, file: Path) -> None:
    """Change the header of a safetensors file: its length and its JSON."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = changed_json(rng, content[8 : 8 + length].decode()).encode(errors="replace")
    claimed = len(header) if rng.random() < 0.95 else rng.choice(ODD_NUMBERS) % (1 << 64)
    file.write_bytes(claimed.to_bytes(8, "little") + header + content[8 + length :])


def change_pickle(rng: random.Random, file: Path) -> None:
    rewrite_zip(file, lambda program: changed_pickle(rng, program), rng)


def changed_pickle(rng: random.Random, program: bytes) -> bytes:
    """Insert, remove, repeat and replace opcodes, and change bytes."""
    starts = [position for _, _, position in pickletools.genops(program)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        i = rng.randrange(1, len(starts))
        j = min(i + rng.choice((1, 1, 2, 5, 40)), len(starts) - 1)
        start, stop = starts[i], starts[j]
        part = rng.choice(
            (
                rng.choice(HOSTILE) + program[start:stop],
                rng.choice(HOSTILE),
                b"",
                program[start:stop] * 2,
                program[start:stop] * rng.choice((1, 300)),
                b"J" + struct.pack("<i", rng.choice(ODD_NUMBERS) % 2**31 - rng.choice((0, 2**31))),
                b"\x8a\x08" + struct.pack("<q", rng.choice(ODD_NUMBERS)),
                b"\x8b" + struct.pack("<i", 1 << 17) + b"\x7f" * (1 << 17),
                b")" + b"q\x00h\x00h\x00\x86" * 60,
            )
        )
        program = program[:start] + part + program[stop:]
        try:
            starts = [position for _, _, position in pickletools.genops(program)]
        except ValueError:  # the bytes are no longer valid opcodes
            break
    if rng.random() < 0.3:
        damaged = bytearray(program)
        change_bytes(rng, damaged, program)
        return bytes(damaged)
    return program


def rewrite_zip(file: Path, edit: Callable[[bytes], bytes], rng: random.Random | None = None) -> None:
    """Rewrite the archive with a modified pickle and correct checksums. Sometimes compress it, or duplicate, delete,
    extend or rename an entry."""
    with zipfile.ZipFile(file) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    kind = zipfile.ZIP_STORED
    if rng is not None:
        i = rng.randrange(len(entries))
        match rng.randrange(20):
            case 0:
                kind = zipfile.ZIP_DEFLATED
            case 1:
                entries.append((f"other/{entries[i][0].partition('/')[2]}", entries[i][1]))
            case 2:
                del entries[i]
            case 3:
                entries[i] = (entries[i][0], entries[i][1] + rng.randbytes(4))
            case 4:
                entries[i] = (rng.choice(("../x", "/etc/passwd", "archive/data/x", "a" * 70)), entries[i][1])
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in entries:
            archive.writestr(name, edit(content) if name.endswith("data.pkl") else content)
    file.write_bytes(buffer.getvalue())


def restore_checksums(rng: random.Random, name: str, folder: Path, file: Path) -> None:
    """In most cases, update the checksum and size of the changed file, so that the code after these checks runs too."""
    if rng.random() < 0.2 or file.name == "manifest.json":
        return
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    size = file.stat().st_size
    if name == "dataset":
        manifest = json.loads((folder / "manifest.json").read_text())
        for entry in manifest["shards"]:
            if entry["file"] == file.name:
                entry.update(sha256=sha, tokens=size // 2)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    elif name in ("checkpoint", "bad step") and file.name != "log.jsonl":
        manifest = json.loads((file.parent / "manifest.json").read_text())
        manifest["files"][file.name] = {"bytes": size, "sha256": sha}
        (file.parent / "manifest.json").write_text(json.dumps(manifest))


# Cases


def make_case(originals: Path, folder: Path, seed: int, number: int) -> str:
    """Write the input of a case to `folder`. Returns the name of the target."""
    name = list(TARGETS)[number % len(TARGETS)]
    rng = random.Random(f"{seed}:{number}")
    shutil.copytree(originals / name, folder)
    file = folder / rng.choice(TARGETS[name].files)
    other = rng.choice([path for path in originals.rglob("*") if path.is_file() and path.stat().st_size])
    change(rng, file, other.read_bytes())
    restore_checksums(rng, name, folder, file)
    return name


def run_cases(originals: Path, seed: int, first: int, count: int, targets: list[str]) -> None:
    """Print a line of JSON per case: its number, target, outcome (rejected, read or wrong) and message."""
    seen: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        written = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if (event in FORBIDDEN and event not in TARGETS[name].allowed) or written:
            seen.append(f"{event} {arguments!r}"[:200])

    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        codecs.lookup(encoding)
    for name in READABLE:
        TARGETS[name].read(originals / name)  # import the modules that are imported on first use
    sys.addaudithook(watch)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in range(first, first + count):
        if list(TARGETS)[number % len(TARGETS)] not in targets:
            continue
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            folder = Path(scratch) / "case"
            name = make_case(originals, folder, seed, number)
            print(json.dumps([number, name, "started", ""]), flush=True)
            seen.clear()
            signal.setitimer(signal.ITIMER_REAL, WAIT)  # the signal kills the process, even if it hangs
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            watching = True
            try:
                TARGETS[name].read(folder)
                outcome, said = "read", ""
            except (ValueError, OSError) as error:
                said = str(error)
                named = str(folder) in said and "\n" not in said and len(said) <= LONGEST
                outcome = "rejected" if named else "wrong"
            except BaseException as error:
                outcome, said = "wrong", f"{type(error).__name__}: {error}"
            watching = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if seen:
                outcome, said = "wrong", f"{seen[0]}; {said}"
            print(json.dumps([number, name, outcome, said.replace(scratch, "")[: LONGEST + 100]]), flush=True)


def fuzz(
    seed: int, first: int, count: int, targets: str = ",".join(READABLE)
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Run the cases. Returns the number of outcomes of each kind for each target, and a line for each wrong case."""
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in TARGETS}
    wrong = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        originals = Path(folder)
        make_originals(originals)
        with tqdm(total=count, unit=" cases", disable=None) as progress:
            end = first + count
            while first < end:
                command = [sys.executable, __file__, "--worker", folder, "--seed", str(seed)]
                command += ["--first", str(first), "--cases", str(end - first), "--targets", targets]
                worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                assert worker.stdout is not None
                number, name, outcome = first, "?", ""
                for line in worker.stdout:
                    number, name, outcome, said = json.loads(line)
                    if outcome != "started":
                        outcomes[name][outcome] += 1
                        progress.update()
                        if outcome == "wrong":
                            wrong.append(f"case {number} ({name}): {said}")
                code = worker.wait()
                if code:  # the worker was killed during a case; the next worker starts with the next case
                    if outcome != "started":
                        raise RuntimeError(f"the worker failed outside of a case, with status {code}")
                    outcomes[name]["wrong"] += 1
                    progress.update()
                    ended = signal.Signals(-code).name if code < 0 else f"status {code}"
                    wrong.append(f"case {number} ({name}): killed by {ended} (SIGPROF: over {SECONDS} s of CPU time)")
                first = number + 1
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="number of cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--targets", default=",".join(READABLE), help="kinds of input (default: all)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run_cases(options.worker, options.seed, options.first, options.cases, options.targets.split(","))
        return 0
    started = time.perf_counter()
    outcomes, wrong = fuzz(options.seed, options.first, options.cases, options.targets)
    print(f"{'input':16}{'cases':>8}{'rejected':>9}{'read':>8}{'wrong':>8}")
    for name, counts in outcomes.items():
        print(f"{name:16}{counts.total():8}{counts['rejected']:9}{counts['read']:8}{counts['wrong']:8}")
    for line in wrong:
        print(f"WRONG {line}")
    seconds = time.perf_counter() - started
    print(f"{sum(c.total() for c in outcomes.values()):,} cases in {seconds:.0f} s, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
