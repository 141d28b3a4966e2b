"""The Hugging Face layout: a folder with config.json, and weights in model.safetensors, pytorch_model.bin or shards."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2.config import GPT2Config
from gpt2.file_kinds import read_json, text_in
from gpt2.formats.stored import Stored, naming_file
from tinygrad2 import files
from tinygrad2.checkpoint import save_arrays, write_json

CONFIG_FILE, WEIGHTS_FILE, GENERATION_FILE = "config.json", "model.safetensors", "generation_config.json"
HEADER_LIMIT = 8 << 20  # bytes of a safetensors header; GPT-2 XL's has 64 KB
INDEX_SUFFIX = ".index.json"  # ends the name of a file that lists shards
WEIGHTS_FILES = (  # the first of these that exists is read
    WEIGHTS_FILE,
    WEIGHTS_FILE + INDEX_SUFFIX,
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX_SUFFIX,
)
NUMPY_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by safetensors name


def read_config(folder: Path) -> GPT2Config:
    """The config in a folder's config.json and generation_config.json. Raises FileNotFoundError or ValueError; the
    message names the file."""
    file, generation = folder / CONFIG_FILE, folder / GENERATION_FILE
    try:
        with naming_file(file):
            values = read_json(file)
            if not isinstance(values, dict):
                raise ValueError("it is not a JSON object")
            config = GPT2Config.from_dict(values)
        if not generation.is_file():
            return config
        with naming_file(generation):
            settings = read_json(generation)
            if not isinstance(settings, dict):
                raise ValueError("it is not a JSON object")
        return replace(config, generation_config=None if settings == config.ids() else settings)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FileNotFoundError(f"{file}: no such file; a model folder has {CONFIG_FILE} and {WEIGHTS_FILE}") from None


def read_safetensors(file: Path) -> dict[str, Stored]:
    """The arrays in a .safetensors file. Raises ValueError if it is not a valid safetensors file."""
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if HEADER_LIMIT < header < file.stat().st_size:
        raise ValueError(f"its header has {header:,} bytes; expected at most {HEADER_LIMIT:,}")
    try:
        tensors = safe_open(file, framework="numpy")
    except SafetensorError as error:
        if text := text_in(file):
            raise ValueError(f"it is text, not a model: {text!r}; if it was downloaded, download it again") from None
        if "not fully covered" in str(error):
            raise ValueError(
                "according to its header, its last tensor does not end at the end of the file; the download or the "
                "copy was interrupted"
            ) from None
        raise ValueError(
            f"it is not a valid safetensors file ({error}), and does not start like a PyTorch or llm.c file"
        ) from None
    stored = {}
    for name in tensors.keys():  # noqa: SIM118 (not a dict)
        part = tensors.get_slice(name)
        kind = part.get_dtype()
        stored[name] = Stored(tuple(part.get_shape()), NUMPY_DTYPES.get(kind, kind), partial(tensors.get_tensor, name))
    return stored


def read_index(index: Path) -> dict[str, str]:
    """Map the name of each tensor to the file that contains it. Raises ValueError for a file outside the folder."""
    listed = read_json(index)
    places = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError("its weight_map does not map each tensor to a file")
    for name in dict.fromkeys(places.values()):
        if name != Path(name).name or name.endswith(INDEX_SUFFIX) or len(name) > 255:
            raise ValueError(f"the shard {name[:80]!r} is not the name of a file in this folder")
        if not (index.parent / name).is_file():
            raise ValueError(f"the shard {name!r} is missing")
    return places


def write(path: str | Path, config: GPT2Config, arrays: dict[str, np.ndarray]) -> None:
    """Write config.json, model.safetensors, and generation_config.json if the model has one, to the folder `path`,
    which is created if it does not exist."""
    folder = Path(path)
    files.make_folder(folder)
    named = {f"transformer.{name}": values for name, values in arrays.items()}
    save_arrays(folder / WEIGHTS_FILE, named, {"format": "pt"})  # transformers requires "pt"
    write_json(folder / CONFIG_FILE, {**config.to_dict(), "torch_dtype": arrays["wte.weight"].dtype.name})
    if config.generation_config is not None:
        write_json(folder / GENERATION_FILE, config.generation_config)
