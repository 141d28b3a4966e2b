"""The Hugging Face layout: a folder with config.json, and model.safetensors or pytorch_model.bin, or shards."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2.config import GPT2Config
from gpt2.formats.stored import Stored, naming_file
from tinygrad2.checkpoint import JsonObject, save_arrays, write_json

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_SUFFIX = ".index.json"  # of a file that lists shards
WEIGHTS_FILES = (  # the first that exists is read
    WEIGHTS_FILE,
    WEIGHTS_FILE + INDEX_SUFFIX,
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX_SUFFIX,
)
NUMPY_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name: NumPy's


def read_config(folder: Path) -> GPT2Config:
    """The config in config.json of the folder. Raises FileNotFoundError or ValueError, naming the file."""
    file = folder / CONFIG_FILE
    try:
        with naming_file(file):
            values = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it is not a JSON object")
            return GPT2Config.from_dict(values)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FileNotFoundError(f"{file}: no such file; a model folder has {CONFIG_FILE} and {WEIGHTS_FILE}") from None


def read_safetensors(file: Path) -> dict[str, Stored]:
    """The arrays of a .safetensors file. Raises ValueError if it is not one."""
    try:
        tensors = safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"it is not a valid safetensors file ({error}), and does not start like a file of PyTorch or llm.c"
        ) from None
    stored = {}
    for name in tensors.keys():  # noqa: SIM118 (not a dict)
        part = tensors.get_slice(name)
        kind = part.get_dtype()
        stored[name] = Stored(tuple(part.get_shape()), NUMPY_DTYPES.get(kind, kind), partial(tensors.get_tensor, name))
    return stored


def read_index(index: Path) -> dict[str, str]:
    """The file that holds each tensor, by the tensor's name. Raises ValueError for a file outside the folder."""
    listed = json.loads(index.read_text(encoding="utf-8"))
    places = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError("its weight_map does not map each tensor to a file")
    for name in dict.fromkeys(places.values()):
        if name != Path(name).name or name.endswith(INDEX_SUFFIX) or len(name) > 255:
            raise ValueError(f"the shard {name[:80]!r} is not the name of a file in this folder")
        if not (index.parent / name).is_file():
            raise ValueError(f"the shard {name!r} is missing")
    return places


def write(path: str | Path, config: GPT2Config, arrays: dict[str, np.ndarray], changes: JsonObject) -> None:
    """Write config.json, with `changes` to it, and model.safetensors to the folder `path`, created if missing."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"transformer.{name}": values for name, values in arrays.items()}
    save_arrays(folder / WEIGHTS_FILE, named, {"format": "pt"})  # transformers requires "pt"
    write_json(folder / CONFIG_FILE, {**config.to_dict(), "torch_dtype": arrays["wte.weight"].dtype.name, **changes})
