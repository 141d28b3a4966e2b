"""Model files: every layout in use is read, and the Hugging Face layout written.

Read are folders of Hugging Face (config.json with model.safetensors or pytorch_model.bin, whole or in shards), files of
PyTorch (checkpoints of nanoGPT and build-nanogpt, plain state dicts), and files of llm.c. `open_model` gives all of
them the names and the layout of gpt2.model.GPT2, and has checked every shape before a model is built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors asks for by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2.config import PRESETS, GPT2Config, is_matrix
from gpt2.formats import llmc, torch_file
from gpt2.formats.torch_file import Record, Stored
from tinygrad2.checkpoint import save_arrays, write_json

if TYPE_CHECKING:
    from gpt2.model import GPT2

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = ".index.json"  # the end of the name of a list of shards
FILES = (WEIGHTS, WEIGHTS + INDEX, "pytorch_model.bin", "pytorch_model.bin" + INDEX)  # the first that is there is read
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names for NumPy's
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that old files carry; they are no parameters
PREFIXES = (
    "_orig_mod.",
    "module.",
    "transformer.",
)  # of torch.compile, of DistributedDataParallel, of the model's body
HEAD = "lm_head.weight"
PADDED, VOCABULARY = 50304, 50257  # GPT-2's vocabulary as nanoGPT and build-nanogpt pad it; no text has the last ids
STATE_DICTS = ("model", "state_dict", "model_state_dict")  # where a checkpoint keeps its parameters


@dataclass
class ModelFile:
    """A model as a file or folder holds it: nothing but sizes has been read yet.

    file    the file with the parameters, or the list of its shards.
    config  sizes and rates.
    arrays  every parameter of gpt2.model.GPT2, by its name there and in the shape there.
    """

    file: Path
    config: GPT2Config
    arrays: dict[str, Stored]

    def read(self, name: str) -> np.ndarray:
        """A parameter's values, in the file's type. Raises ValueError naming the file."""
        with _naming(self.file):
            return self.arrays[name].read()


def open_model(path: str | Path) -> ModelFile:
    """The model in the file or folder `path`.

    Accepts any of PREFIXES before the names, an output layer if it equals the token embedding, the causal masks of old
    files, matrices as (in, out) or (out, in), models without biases (whose biases are then zeros), and float64,
    float32, float16 and bfloat16 values. Raises FileNotFoundError or ValueError naming the file, before it allocates.
    """
    path = Path(path)
    config = None if path.is_file() else load_config_file(path)
    file = path if config is None else next((path / name for name in FILES if (path / name).is_file()), path / WEIGHTS)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; a model folder has {CONFIG} and {WEIGHTS}")
    with _naming(file):
        own, stored = _read(file)
        stored = _plain_names(stored)
    config = config or own
    if config is None and (file.parent / CONFIG).is_file():
        config = load_config_file(file.parent)
    with _naming(file):
        config = config or _published(stored)
        return ModelFile(file, config, _arranged(config, stored))


def load_config(path: str | Path) -> GPT2Config:
    """The configuration of the model in the file or folder `path`, which fits the parameters there. Raises as
    open_model does."""
    return open_model(path).config


def load_into(model: GPT2, path: str | Path) -> None:
    """Fill the model's parameters from the file or folder `path`. Raises as open_model does."""
    source = open_model(path)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        stored = source.arrays.get(name)
        if stored is None or stored.shape != parameter.shape:
            raise ValueError(
                f"{source.file}: tensor {name} {f'has shape {stored.shape}' if stored else 'is missing'}; "
                f"expected {parameter.shape}"
            )
    if len(source.arrays) != len(parameters):
        raise ValueError(f"{source.file}: it has {source.config.n_layer} layers; expected {model.config.n_layer}")
    for name, parameter in parameters.items():
        parameter.data = model.backend.asarray(source.read(name), dtype=model.dtype)


def save(model: GPT2, path: str | Path) -> None:
    """Write the model into the folder `path`, which is made if need be."""
    write_hugging_face(path, model.config, {name: p.numpy() for name, p in model.named_parameters()}, {})


def write_hugging_face(
    path: str | Path, config: GPT2Config, arrays: dict[str, np.ndarray], changes: dict[str, Any]
) -> None:
    """Write config.json, with `changes` to it, and model.safetensors into the folder `path`, made if need be."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"transformer.{name}": values for name, values in arrays.items()}
    save_arrays(folder / WEIGHTS, named, {"format": "pt"})  # "pt" is what transformers insists on
    write_json(folder / CONFIG, {**config.to_dict(), "torch_dtype": arrays["wte.weight"].dtype.name, **changes})


def load_config_file(folder: Path) -> GPT2Config:
    """What config.json in the folder says. Raises FileNotFoundError or ValueError, naming the file."""
    file = folder / CONFIG
    try:
        with _naming(file):
            values = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it holds no JSON object")
            return GPT2Config.from_dict(values)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FileNotFoundError(f"{file}: there is no such file; a model folder has {CONFIG} and {WEIGHTS}") from None


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with it, in one line: text from the file may be part of that."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
            text = f"it holds no JSON ({error})"
        text = "".join(c if c.isprintable() else " " for c in text)
        raise ValueError(f"{file}: {text if len(text) < 500 else text[:500] + ' ...'}") from None


def _read(file: Path) -> tuple[GPT2Config | None, dict[str, Stored]]:
    """The arrays of a file of any kind, as they are in it, and its config where it holds one."""
    if file.name.endswith(INDEX):
        return None, _read_shards(file)
    with file.open("rb") as opened:
        start = opened.read(4)
    if start == llmc.MAGIC.to_bytes(4, "little"):
        return llmc.read(file)
    if start in (torch_file.ZIP, torch_file.LEGACY):
        return _from_checkpoint(torch_file.load(file))
    return None, _read_safetensors(file)


def _read_safetensors(file: Path) -> dict[str, Stored]:
    try:
        tensors = safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"it cannot be read as safetensors ({error}), and does not begin as a file of PyTorch or llm.c does"
        ) from None
    stored = {}
    for name in tensors.keys():  # noqa: SIM118 (it is no dict)
        part = tensors.get_slice(name)
        kind = part.get_dtype()
        stored[name] = Stored(tuple(part.get_shape()), DTYPES.get(kind, kind), partial(tensors.get_tensor, name))
    return stored


def _read_shards(index: Path) -> dict[str, Stored]:
    listed = json.loads(index.read_text(encoding="utf-8"))
    places = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError("its weight_map does not say in which file each tensor is")
    shards = {}
    for name in dict.fromkeys(places.values()):
        file = index.parent / name
        if name != file.name or name.endswith(INDEX) or len(name) > 255:
            raise ValueError(f"the shard {name[:80]!r} is no file of this folder")
        if not file.is_file():
            raise ValueError(f"the shard {name!r} is missing")
        with _naming(file):
            shards[name] = _read(file)[1]
    for name, place in places.items():
        if name not in shards[place]:
            raise ValueError(f"tensor {name} is not in {place}")
    return {name: shards[place][name] for name, place in places.items()}


def _from_checkpoint(tree: Any) -> tuple[GPT2Config | None, dict[str, Stored]]:
    """The parameters in what was given to torch.save, and the config beside them. It tells who wrote it:

    a config.json (model_type)     gpt2.convert
    model_args                     nanoGPT, which computes GELU's exact form
    config, a pickled GPTConfig    build-nanogpt, GELU's tanh form and no dropout; nanoGPT's class has a dropout
    """
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}; expected a dictionary with a model's parameters")
    stored = next((tree[key] for key in STATE_DICTS if isinstance(tree.get(key), dict)), tree)
    if not stored or not all(isinstance(name, str) and isinstance(value, Stored) for name, value in stored.items()):
        raise ValueError("it holds no state dict; expected the tensors themselves, or a dictionary `model` of them")
    config = _scalars(tree.get("config"))
    if "model_type" in config:
        return GPT2Config.from_dict(config), stored
    values = _scalars(tree.get("model_args")) or config
    if "n_head" not in values:
        return None, stored
    rate = values.get("dropout", 0.0)
    return GPT2Config(
        vocab_size=VOCABULARY if values["vocab_size"] == PADDED else values["vocab_size"],
        n_positions=values["block_size"],
        n_embd=values["n_embd"],
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        activation_function="gelu" if "dropout" in values else "gelu_new",
        embd_pdrop=rate,
        attn_pdrop=rate,
        resid_pdrop=rate,
    ), stored


def _scalars(config: Any) -> dict[str, Any]:
    """A config's numbers and texts; of anything else the type's name, which no check of a config lets pass."""
    values = config.values if isinstance(config, Record) else config if isinstance(config, dict) else {}
    kinds = (str, int, float, type(None))
    return {str(key): value if isinstance(value, kinds) else type(value).__name__ for key, value in values.items()}


def _plain_names(stored: dict[str, Stored]) -> dict[str, Stored]:
    """Without prefixes and masks."""
    plain: dict[str, Stored] = {}
    for name, values in stored.items():
        short = name
        while (prefix := next((prefix for prefix in PREFIXES if short.startswith(prefix)), None)) is not None:
            short = short.removeprefix(prefix)
        if short in plain:
            raise ValueError(f"tensor {short} is there twice, with and without the prefix of {name}")
        if not short.endswith(BUFFERS):
            plain[short] = values
    return plain


def _published(stored: dict[str, Stored]) -> GPT2Config:
    """The config of arrays without one, if they are those of a published size in the published layout: from shapes
    alone nobody can tell the number of heads nor the form of GELU."""
    layers = sum(name.endswith("ln_1.weight") for name in stored)
    queries = stored.get("h.0.attn.c_attn.weight")
    for preset in PRESETS.values():
        shape = (preset.n_embd, 3 * preset.n_embd)
        if preset.vocab_size == VOCABULARY and preset.n_layer == layers and queries and queries.shape == shape:
            return preset
    raise ValueError(
        f"it does not say how many heads the model has nor which GELU it computes; put its {CONFIG} beside it"
    )


def _arranged(config: GPT2Config, stored: dict[str, Stored]) -> dict[str, Stored]:
    """The config's parameters among those stored, in this model's layout. Raises ValueError naming the tensor that is
    missing, surplus, or of another shape or type."""
    stored = dict(stored)
    for name in ("wte.weight", HEAD):
        if name in stored and stored[name].shape[:1] == (PADDED,) and config.vocab_size == VOCABULARY:
            stored[name] = stored[name].rows(VOCABULARY)
    head = stored.pop(HEAD, None)
    turned = "h.0.attn.c_attn.weight" in stored and (
        stored["h.0.attn.c_attn.weight"].shape == (3 * config.n_embd, config.n_embd)
    )
    without_biases = not any(name.endswith(".bias") for name in stored)
    arrays: dict[str, Stored] = {}
    for name, shape in config.shapes():
        if name not in stored and not (without_biases and name.endswith(".bias")):
            raise ValueError(f"tensor {name} is missing")
        values = stored.pop(name, None) or _zeros(shape)
        expected = shape[::-1] if turned and is_matrix(name) else shape
        if values.dtype not in DTYPES.values():
            raise ValueError(f"tensor {name} is of type {values.dtype}; expected one of {', '.join(DTYPES.values())}")
        if values.shape != expected:
            raise ValueError(f"tensor {name} has shape {values.shape}; expected {expected}")
        arrays[name] = values.transposed() if turned and is_matrix(name) else values
    if stored:
        raise ValueError(f"tensor {next(iter(stored))} is not one of this model's")
    if head is not None and not _equal(head, arrays["wte.weight"]):
        raise ValueError(f"{HEAD} differs from wte.weight; this model ties the output layer to the token embedding")
    return arrays


def _zeros(shape: tuple[int, ...]) -> Stored:
    return Stored(shape, "float32", lambda: np.zeros(shape, "float32"))


def _equal(a: Stored, b: Stored) -> bool:
    """Bit by bit: what is no number equals itself here."""
    return a.shape == b.shape and a.dtype == b.dtype and a.read().tobytes() == b.read().tobytes()
