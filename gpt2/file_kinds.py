"""Identify files and folders that are not models: Git LFS pointers, web pages, models of other programs, ...

A file that is named like a model does not always contain one: a clone without git-lfs contains pointers, and a download
may be a web page.
"""

from __future__ import annotations

import io
import json
import re
import stat
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2.console import script_name
from tinygrad2.checkpoint import JSON_BYTES

FILES_INSIDE = 100  # maximum number of files in subfolders to identify
DIRECTORY_BYTES = 1 << 20  # maximum for a zip archive's central directory; GPT-2 XL with its optimizer has 0.2 MB
START_BYTES = 512  # number of bytes read from the start of a file to identify its kind
PICKLE_START = re.compile(rb"\x80(?!\x02\x8a\x0a)[\2-\5]")  # excluding legacy torch.save files
ZIP_START = b"PK\x03\x04"
TRANSFORMERS = "load it with transformers and save it as safetensors: model.save_pretrained(FOLDER)"
LFS = "a Git LFS pointer, not the file itself; fetch the file with git lfs install && git lfs pull, in its folder"
PICKLE = "a Python pickle that torch.save did not write; save model.state_dict() with torch.save instead"
WEB_PAGE = "an HTML page, not the file itself; download it again from its `resolve` link (not `blob`), or log in"

# Kinds by the first bytes.
STARTS = (
    (b"version https://git-lfs.github.com/spec/", LFS),
    (b"GGUF", "a llama.cpp GGUF file, which is not supported; use the model's safetensors"),
    (b"ggml", "a llama.cpp GGML file, which is not supported; use the model's safetensors"),
    (b"lmgg", "a llama.cpp GGML file, which is not supported; use the model's safetensors"),
    (b"tjgg", "a llama.cpp GGML file, which is not supported; use the model's safetensors"),
    (b"\x89HDF\r\n\x1a\n", f"a TensorFlow or Keras HDF5 file, which is not supported; {TRANSFORMERS}"),
    (b"\x93NUMPY", "a NumPy array, not a model"),
    (b"\x1f\x8b", "a file compressed with gzip; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "a file compressed with zstd; decompress it first"),
    (b"BZh", "a file compressed with bzip2; decompress it first"),
    (b"\xfd7zXZ\x00", "a file compressed with xz; decompress it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"%PDF", "a PDF document, not a model"),
    (b"PAR1", f"a Parquet table, not a model; {script_name('prepare')} reads it"),
)
# Kinds by the end of the file name, for formats without distinctive first bytes.
ENDINGS = (
    (".gguf", dict(STARTS)[b"GGUF"]),
    (".llamafile", "a llamafile of llama.cpp, which is not supported; use the model's safetensors"),
    (".onnx", "an ONNX model, which is not supported; use the model's safetensors or pytorch_model.bin"),
    (".msgpack", f"a Flax model, which is not supported; {TRANSFORMERS}"),
    (".h5", dict(STARTS)[b"\x89HDF\r\n\x1a\n"]),
    (".keras", "a Keras model, which is not supported"),
    (".tflite", "a TensorFlow Lite model, which is not supported"),
    (".ckpt.index", "a part of a TensorFlow checkpoint, which is not supported"),
    (".ckpt.meta", "a part of a TensorFlow checkpoint, which is not supported"),
    ("saved_model.pb", "a TensorFlow SavedModel, which is not supported"),
    (".ot", "a rust-bert model, which is not supported; use the model's safetensors or pytorch_model.bin"),
    (".mlmodel", "a Core ML model, which is not supported"),
    (
        ".distcp",
        "a part of a PyTorch distributed checkpoint (FSDP); merge its parts: "
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt",
    ),
    *((end, "an unfinished download; download it again") for end in (".incomplete", ".crdownload", ".part", ".aria2")),
)
OPENAI_FOLDER = (
    "a TensorFlow checkpoint, as written by OpenAI and gpt-2-simple, which is not supported; use gpt2, gpt2-medium, "
    "gpt2-large or gpt2-xl for OpenAI's weights, or convert your own with transformers "
    "(convert_gpt2_original_tf_checkpoint_to_pytorch)"
)
DEEPSPEED_FOLDER = "a DeepSpeed checkpoint; merge its parts: python zero_to_fp32.py . MODEL, in this folder"
SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+(\.safetensors|\.bin)")
WEIGHTS_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
STATE_OF_TRAINERS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "encoder.json", "vocabulary.json", "merges.txt", "vocab.bpe")


def kind_of(file: Path) -> str:
    """The kind of a file that is neither a model nor JSON, and advice, such as "an HTML page, ...; download it again".
    Returns "" if the kind is unknown."""
    with file.open("rb") as opened:
        start = opened.read(START_BYTES)
    if start.startswith(ZIP_START):
        return _kind_of_zip(file)
    return _kind_of_start(start, file.name)


def _kind_of_start(start: bytes, name: str) -> str:
    if not start:
        return "an empty file, without a header; the download or the copy was interrupted"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return WEB_PAGE
    if text.startswith(b"<?xml") and b"<net name=" in text:
        return "an OpenVINO model, which is not supported; use the model's safetensors"
    if text.startswith(b"<?xml"):
        return "an XML document, perhaps a server's error message, not the file itself; download it again"
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    found = next((kind for begin, kind in STARTS if start.startswith(begin)), "")
    if found:
        return found
    if b"TransformerDecoderSpec" in start[:64]:
        return "a CTranslate2 model, which is not supported; use the model's safetensors"
    if PICKLE_START.match(start) and name.endswith(WEIGHTS_ENDINGS):
        return PICKLE
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite model, which is not supported"
    if start[:1] == b"\x08" and start[2:3] == b"\x12" and (b"onnx" in start or b"pytorch" in start):
        return dict(ENDINGS)[".onnx"]
    if ".ckpt.data-" in name or ".ckpt-" in name:
        return "a part of a TensorFlow checkpoint, which is not supported"
    return next((kind for end, kind in ENDINGS if name.lower().endswith(end)), "")


def text_in(file: Path) -> str:
    """The start of a file's text; "" if the file is not plain text. The text may be a server's error message, saved in
    place of the file."""
    with file.open("rb") as opened:
        start = opened.read(START_BYTES)
    is_text = bool(start) and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)
    return printable(start.decode("ascii").strip()) if is_text else ""


class _Bounded(io.BufferedReader):
    """A file that rejects reads of more than `limit` bytes."""

    limit = DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.limit:
            raise ValueError(f"its central directory has {size:,} bytes; expected at most {self.limit:,}")
        return super().read(size)


@contextmanager
def open_zip(file: Path) -> Iterator[zipfile.ZipFile]:
    """Open the archive in a file. Raises ValueError if its central directory, which zipfile reads as a whole, is too
    large."""
    with _Bounded(file.open("rb", buffering=0)) as stream, zipfile.ZipFile(stream) as archive:
        stream.limit = sys.maxsize
        yield archive


def _kind_of_zip(file: Path) -> str:
    """The kind of a zip archive; "" if it was written by torch.save (it has data.pkl) or is damaged."""
    try:
        with open_zip(file) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
                return "a TorchScript archive (torch.jit.save), which is not supported; save model.state_dict() instead"
            if any(name.rpartition("/")[2] == "data.pkl" for name in names):
                return ""
            if "model.weights.h5" in names:
                return "a Keras model, which is not supported"
            if any(name.endswith(".npy") for name in names):
                return "a NumPy .npz archive, not a model"
            for name in names[:100]:
                if not name.endswith("/"):
                    with archive.open(name) as entry:
                        kind = _kind_of_start(entry.read(START_BYTES), name)
                    if kind:
                        return f"a zip archive in which {printable(name)} is {kind}"
            models = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", "config.json"))]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError):
        return ""
    return f"a zip archive with {printable(models[0])}; unpack it first" if models else ""


def kind_of_folder(folder: Path) -> str:
    """The kind of a folder without a model, and advice; "" if the kind is unknown."""
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        base = _base_of(folder / "adapter_config.json")
        return (
            f"an adapter (peft, LoRA){base}, not a complete model; merge it with its base model: "
            "PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)"
        )
    if any(name.startswith("model.ckpt.") or ".ckpt-" in name for name in names) or "hparams.json" in names:
        return OPENAI_FOLDER
    if "zero_to_fp32.py" in names:
        return DEEPSPEED_FOLDER
    for name in names:
        if (folder / name).is_file() and (kind := kind_of(folder / name)):
            return f"a folder in which {printable(name)} is {kind}"
    for name in names:
        inside = folder / name
        if inside.is_dir() and any((inside / file).is_file() for file in ("config.json", "model.safetensors")):
            return f"a folder with a model in {printable(name)}/; use {inside}"
    return _kind_of_contents(folder, names)


def _kind_of_contents(folder: Path, names: list[str]) -> str:
    """The kind of a folder in which no file's kind is known and no subfolder is a model."""
    weights = [name for name in names if name.endswith(WEIGHTS_ENDINGS)]
    other = [name for name in weights if not name.startswith(STATE_OF_TRAINERS)]
    if found := next(filter(None, map(SHARD.fullmatch, names)), None):
        index = "".join(found.groups()) + ".index.json"
        return f"a folder with the shards of a model but without their index; add {index}"
    if other:
        return f"a folder with {printable(other[0])}; use {folder / other[0]}"
    snapshots = sorted((folder / "snapshots").glob("*/config.json"))
    if snapshots:
        return f"a folder of the Hugging Face cache; use {snapshots[-1].parent}"
    if any(name in names for name in TOKENIZER_FILES):
        return "a folder with a tokenizer only; the weights (model.safetensors or pytorch_model.bin) are missing"
    if weights:
        return f"a folder with {printable(weights[0])}, the state of a trainer; the weights are missing"
    for file in sorted(folder.glob("*/*"))[:FILES_INSIDE]:
        if file.is_file() and (kind := kind_of(file)):
            return f"a folder whose {printable(str(file.relative_to(folder)))} is {kind}"
    return ""


def _base_of(file: Path) -> str:
    try:
        base = read_json(file)["base_model_name_or_path"]
        return f" of {printable(base)}" if isinstance(base, str) else ""
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def read_json(file: Path, limit: int = JSON_BYTES) -> Any:
    """The contents of a JSON file written by people or other programs. The encoding may be UTF-8, UTF-16 or UTF-32,
    with or without a byte-order mark.

    Raises FileNotFoundError, and ValueError if the file is not valid JSON, is too deeply nested, or has more than
    `limit` bytes. The message of the ValueError does not name the file.
    """
    status = file.stat()
    if stat.S_ISREG(status.st_mode) and status.st_size > limit:
        raise ValueError(f"it has {status.st_size:,} bytes; expected at most {limit:,}")
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("it is not a regular file")
    content = file.read_bytes()
    try:
        return json.loads(content.decode(json.detect_encoding(content)))
    except (ValueError, RecursionError) as error:
        kind = _kind_of_start(content[:START_BYTES], file.name)
        raise ValueError(f"it is {kind}" if kind else f"it is not valid JSON ({error})") from None


def printable(text: str) -> str:
    """The first 80 characters of `text`, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:80])
