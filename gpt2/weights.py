"""Model files: the Hugging Face layout, a folder with config.json and model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2.config import GPT2Config
from tinygrad2.checkpoint import save_arrays

if TYPE_CHECKING:
    from gpt2.model import GPT2

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types that are read
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that old files carry; they are no parameters


def load_config(path: str | Path) -> GPT2Config:
    """The configuration in the folder `path`. Raises FileNotFoundError or ValueError, naming the file."""
    file = Path(path) / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        return GPT2Config.from_dict(values)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FileNotFoundError(f"{file}: there is no such file; a model folder has {CONFIG} and {WEIGHTS}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None


def load_into(model: GPT2, path: str | Path) -> None:
    """Fill the model's parameters from the folder `path`.

    Accepts names with and without the `transformer.` prefix, a `lm_head.weight` if it equals the token embedding, the
    causal masks of old files, and float64, float32, float16 and bfloat16 values.
    """
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; a model folder has {CONFIG} and {WEIGHTS}")
    try:
        with safe_open(file, framework="numpy") as tensors:
            names: dict[str, str] = {}
            for stored in tensors.keys():  # noqa: SIM118 (it is no dict)
                name = stored.removeprefix("transformer.")
                if name in names:
                    raise ValueError(f"tensor {name} is there twice, with and without the prefix `transformer.`")
                names[name] = stored
            expected = dict(model.named_parameters())
            head = names.pop("lm_head.weight", None)
            for name in expected:
                if name not in names:
                    raise ValueError(f"tensor {name} is missing")
            for name, stored in names.items():
                if name not in expected:
                    if name.endswith(BUFFERS):
                        continue
                    raise ValueError(f"tensor {stored} is not one of this model's")
                kind = tensors.get_slice(stored).get_dtype()
                if kind not in FLOATS:
                    raise ValueError(f"tensor {stored} is of dtype {kind}; expected one of {', '.join(FLOATS)}")
                values = tensors.get_tensor(stored)
                if values.shape != expected[name].shape:
                    raise ValueError(f"tensor {stored} has shape {values.shape}; expected {expected[name].shape}")
                expected[name].data = model.backend.asarray(values, dtype=model.dtype)
            if head is not None and not np.array_equal(
                tensors.get_tensor(head), tensors.get_tensor(names["wte.weight"])
            ):
                raise ValueError(
                    "lm_head.weight differs from wte.weight; this model ties the output layer to the token embedding"
                )
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{file}: {error}") from None


def save(model: GPT2, path: str | Path) -> None:
    """Write the model into the folder `path`, which is made if need be."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"transformer.{name}": parameter.numpy() for name, parameter in model.named_parameters()}
    save_arrays(folder / WEIGHTS, arrays, {"format": "pt"})  # "pt" is what transformers insists on
    text = json.dumps({**model.config.to_dict(), "torch_dtype": model.dtype}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
