"""Data for the evaluation tests: a small model, data sets with two tokenizers, and files for both tasks."""

import base64
import json

from data.prepare import prepare
from gpt2 import GPT2, GPT2Config, Tokenizer

TEXT = "".join(f"{i} times {j} is {i * j}; ab, abba and a cab.\n\n" for i in range(30) for j in range(12))


def make_model(vocab_size, seed: int | None = 1):
    return GPT2(GPT2Config(vocab_size=vocab_size, n_positions=16, n_embd=16, n_layer=1, n_head=2), seed=seed)


def make_folder(folder):
    """Write a model, data sets with two tokenizers, and files for both tasks into the folder. Returns the folder."""
    lines = (json.dumps({"text": text}) + "\n" for text in TEXT.split("\n\n"))
    (folder / "text.jsonl").write_text("".join(lines))
    prepare([str(folder / "text.jsonl")], "bytes", folder / "data" / "text", val_fraction=0.3)
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab"]
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    (folder / "ab.tiktoken").write_text("".join(lines))
    prepare([str(folder / "text.jsonl")], str(folder / "ab.tiktoken"), folder / "data" / "pairs", val_fraction=0.3)
    make_model(257).save_pretrained(folder / "model")
    Tokenizer.load("bytes").save(folder / "model")
    items = [{"ctx": f"{i} times", "endings": ["2", f"{i} is", "ab", "a"], "label": i % 4} for i in range(7)]
    (folder / "h.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "l.jsonl").write_text("".join(json.dumps({"text": f"ab, abba and {i} cabs"}) + "\n" for i in range(5)))
    return folder
