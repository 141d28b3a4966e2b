"""The speed of tokenization in data/prepare.py, compared with tiktoken's own threads: `python
tests/benchmarks/tokenizing.py [MB]`.

Both tokenize the same JSON lines with GPT-2's vocabulary on all cores, in turn, for a few rounds. prepare() reads,
parses, splits, hashes and tokenizes the texts, and writes shards to the disk; tiktoken's encode_ordinary_batch takes
the texts from memory and returns lists. Prints both rates, their medians and the ratio; the exit status is 1 if the
ratio is below 0.8.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # instead of this folder

import tiktoken  # noqa: E402

from data.prepare import prepare  # noqa: E402
from data.sources import pydoc_corpus  # noqa: E402

ROUNDS, LEAST = 5, 0.8
DOCUMENT_CHARS = 5000  # the mean length in OpenWebText


def documents(size: int) -> list[str]:
    """Python's documentation, repeated up to `size` bytes and split into documents of about the size of a web page."""
    text = "\n\n".join(pydoc_corpus())
    pages = [text[i : i + DOCUMENT_CHARS] for i in range(0, len(text), DOCUMENT_CHARS)]
    return pages * (1 + size // len(text))


def main() -> int:
    texts = documents(int(float(sys.argv[1]) * 1e6) if len(sys.argv) > 1 else 20_000_000)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    cores = os.cpu_count() or 1
    encoding = tiktoken.get_encoding("gpt2")
    ours, theirs = [], []
    print(f"{len(texts):,} documents, {megabytes:.1f} MB, {cores} threads; MB of text per second", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts.jsonl"
        with source.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        for i in range(ROUNDS):
            begin = time.perf_counter()
            encoding.encode_ordinary_batch(texts, num_threads=cores)
            theirs.append(megabytes / (time.perf_counter() - begin))
            begin = time.perf_counter()
            prepare([str(source)], "gpt2", Path(folder) / f"out-{i}", threads=cores, say=lambda line: None)
            ours.append(megabytes / (time.perf_counter() - begin))
            print(f"  encode_ordinary_batch {theirs[-1]:6.2f}   prepare {ours[-1]:6.2f}", flush=True)
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(
        f"medians: encode_ordinary_batch {statistics.median(theirs):.2f}, prepare {statistics.median(ours):.2f}; "
        f"ratio {ratio:.2f} (required: {LEAST})"
    )
    return 0 if ratio >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
