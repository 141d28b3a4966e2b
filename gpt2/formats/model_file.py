"""Reads model files in any supported format, and maps them to the names and layout of gpt2.model.GPT2.

The supported formats are Hugging Face folders (config.json with model.safetensors or pytorch_model.bin, possibly
sharded), PyTorch files (nanoGPT and build-nanogpt checkpoints, plain state dicts), and llm.c files. Every shape is
checked before a model is created.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gpt2.config import GPT2_VOCAB_SIZE, PADDED_VOCAB_SIZE, PRESETS, GPT2Config, is_matrix
from gpt2.console import print_error
from gpt2.file_kinds import STATE_OF_TRAINERS, kind_of, kind_of_folder, printable
from gpt2.formats import hub, huggingface, llmc, torch_file
from gpt2.formats.huggingface import CONFIG_FILE, WEIGHTS_FILE
from gpt2.formats.stored import Stored, naming_file
from gpt2.formats.torch_file import LM_HEAD
from gpt2.formats.torch_optimizer import TrainingState
from gpt2.language_model import LanguageModel
from tinygrad2 import checkpoint
from tinygrad2.not_finite import LARGE, bad_parameters

MASK_SUFFIXES = (".attn.bias", ".attn.masked_bias")  # causal masks in old files; they are not parameters
PARTS = ("wte", "wpe", "h", "ln_f")  # the first component of a parameter's name, after any prefix
EMBEDDINGS = ("wte.weight", "wpe.weight")  # the prefix is the text before the first of these that exists
# Wrappers insert components anywhere in a parameter's name. These begin with "_" (_orig_mod of torch.compile,
# _fsdp_wrapped_module, _checkpoint_wrapped_module, _forward_module of DeepSpeed), except DistributedDataParallel's:
PARALLEL = "module"
FOREIGN = {  # the kind of file that has such tensors, by the start of a component of the tensor's name
    "lora_": "an unmerged adapter (peft, LoRA); merge it: model.merge_and_unload().save_pretrained(FOLDER)",
    "qweight": "quantized weights (GPTQ, AWQ), which are not supported; use the original weights",
    "weight_scale": "quantized weights, which are not supported; use the original weights",
}
LM_HEAD_BIAS = "lm_head.bias"  # not a parameter of GPT-2
NAME_LIMIT = 1000  # maximum length of a tensor's name
SHOWN = 5  # maximum number of names in a message
TRAINER, BEST = "trainer.json", "best"  # the trainer's state in a checkpoint; the link to the best one in an out-dir


@dataclass
class ModelFile:
    """A model in a file or folder. The shapes of its parameters have been read, but not their values.

    file      the file with the parameters, or the index of its shards.
    config    the model's sizes and dropout rates.
    arrays    every parameter, with its name and shape in gpt2.model.GPT2.
    left_out  the names of tensors of other heads, which are not part of the language model.
    """

    file: Path
    config: GPT2Config
    arrays: dict[str, Stored]
    left_out: list[str] = field(default_factory=list)

    def say_left_out(self) -> None:
        """Print a line that names the tensors in `left_out`, if there are any."""
        if self.left_out:
            more = f" and {len(self.left_out) - SHOWN:,} more" if len(self.left_out) > SHOWN else ""
            names = ", ".join(map(printable, self.left_out[:SHOWN]))
            print_error(f"{self.file}: ignored, since they are not part of the language model: {names}{more}")

    def read(self, name: str) -> np.ndarray:
        """The values of a parameter, in the file's dtype. Raises ValueError, which names the file."""
        with naming_file(self.file):
            return self.arrays[name].read()


RUN_LOG = "log.jsonl"  # in the out-dir of a run


def find_model(path: Path, say: Callable[[str], None]) -> Path:
    """The model file or folder that `path` refers to:

    a model                      `path` itself
    the out-dir of a run         its newest intact checkpoint, or, if there is none, its newest .pt file
    OUT/best                     the best checkpoint of the run in OUT
    a name in gpt2.formats.hub   the folder of OpenAI's downloaded model

    say  prints a line about a damaged checkpoint that is skipped.
    Raises FileNotFoundError if there is none.
    """
    if path.name == BEST and (best := _best_checkpoint(path.parent)):
        return best
    if path.is_file() or (path / CONFIG_FILE).exists():
        return path
    if str(path) in hub.REVISIONS:
        return hub.download(str(path))
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such file or folder; expected a model, the out-dir of a run, or one of "
            f"{', '.join(hub.REVISIONS)}{hub.advice(path)}"
        )
    folder, damaged = checkpoint.newest(path)
    for line in damaged:
        say(f"skipping a damaged checkpoint: {line}")
    if folder is None:
        files = (file for file in path.glob("*.pt") if not file.name.startswith(STATE_OF_TRAINERS))
        folder = max(files, key=lambda file: (file.stat().st_mtime, file.name), default=None)
    if folder is None:
        folder = next((path / name for name in huggingface.WEIGHTS_FILES if (path / name).is_file()), None)
    if folder is None and not damaged and (path / RUN_LOG).is_file():
        raise FileNotFoundError(
            f"{path}: this run has not saved a checkpoint yet; train.py saves one at its first evaluation, or when "
            f"Ctrl-C stops it"
        )
    if folder is None:
        kind = kind_of_folder(path)
        raise FileNotFoundError(
            f"{path}: no {'intact ' if damaged else ''}model or checkpoint in this folder"
            + (f"; it is {kind}" if kind else "")
        )
    return folder


def _best_checkpoint(out: Path) -> Path | None:
    """The best checkpoint of a run, as recorded in the newest one; None if it is missing or damaged."""
    newest, _ = checkpoint.newest(out)
    if newest is None or not (newest / TRAINER).is_file():
        return None
    try:
        best = out / checkpoint.name(checkpoint.read_json(newest / TRAINER)["progress"]["best"]["step"])
        checkpoint.verify(best)
    except (ValueError, KeyError, TypeError):
        return None
    return best


def default_model(say: Callable[[str], None]) -> Path | None:
    """The default model of a command: the model in checkpoint/, or else the newest model in out/, or else None."""
    for folder in (Path("checkpoint"), Path("out")):
        if (folder / CONFIG_FILE).is_file() or checkpoint.find(folder) or any(folder.glob("*.pt")):
            return find_model(folder, say)
    return None


def open_model(path: str | Path) -> ModelFile:
    """The model in the file or folder `path`.

    The function accepts:
    - names with any prefix, and with the names of wrappers inside;
    - either name of the tied token embedding, or both if their values are equal;
    - the causal masks of old files, and additional heads, which are ignored;
    - matrices as (in, out) or (out, in);
    - models without biases, which are set to zero;
    - float64, float32, float16 and bfloat16 values.

    Raises FileNotFoundError or ValueError, which names the file, before it allocates memory for arrays.
    """
    path = Path(path)
    config = None if path.is_file() else huggingface.read_config(path)
    file = (
        path
        if config is None
        else next((path / name for name in huggingface.WEIGHTS_FILES if (path / name).is_file()), path / WEIGHTS_FILE)
    )
    if not file.is_file():
        kind = kind_of_folder(path) if path.is_dir() else ""
        raise FileNotFoundError(
            f"{file}: no such file; a model folder has {CONFIG_FILE} and {WEIGHTS_FILE}"
            + (f", this is {kind}" if kind else "")
        )
    with naming_file(file):
        embedded, stored = _read(file)
        stored, left_out = _plain_names(stored)
    config = config or embedded
    if config is None and (file.parent / CONFIG_FILE).is_file():
        config = huggingface.read_config(file.parent)
    with naming_file(file):
        config = config or _published(stored)
        return ModelFile(file, config, _parameters(config, stored, _size(file)), left_out)


def read_training(model: ModelFile) -> TrainingState:
    """The training state in a nanoGPT checkpoint. Raises ValueError, which names the file, if it has none."""
    with naming_file(model.file):
        with model.file.open("rb") as opened:
            if opened.read(4) not in (torch_file.ZIP_START, torch_file.LEGACY_START):
                raise ValueError("it has no training state; expected a checkpoint of nanoGPT or train.py")
        names, _ = _plain_names(torch_file.read(model.file)[1])
        return torch_file.read_training(model.file, model.config, names)


def load_config(path: str | Path) -> GPT2Config:
    """The config of the model in the file or folder `path`; the shapes of the parameters are checked against it. Raises
    the errors of open_model."""
    return open_model(path).config


def load_into(model: LanguageModel, path: str | Path, damaged: bool = False) -> None:
    """Load the parameters of `model` from the file or folder `path`.

    Raises the errors of open_model and, unless `damaged` is true, ValueError for values that are not finite or are too
    large to compute with (larger than not_finite.LARGE).
    """
    source = open_model(path)
    source.say_left_out()
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        stored = source.arrays.get(name)
        if stored is None or stored.shape != parameter.shape:
            raise ValueError(
                f"{source.file}: tensor {name} {f'has shape {stored.shape}' if stored else 'is missing'}; "
                f"expected {parameter.shape}"
            )
    if len(source.arrays) != len(parameters):
        raise ValueError(f"{source.file}: it has {len(source.arrays)} tensors; expected {len(parameters)}")
    for name, parameter in parameters.items():
        parameter.data = model.backend.asarray(source.read(name), dtype=parameter.dtype)
    if not damaged and (place := next(bad_parameters(model), None)):
        raise ValueError(f"{source.file}: the weights are damaged: {place}; expected finite values up to {LARGE:.1e}")


def _read(file: Path) -> tuple[GPT2Config | None, dict[str, Stored]]:
    """The config in a file of any format, or None if the file has none, and the arrays, with their names and layouts in
    the file."""
    if file.name.endswith(huggingface.INDEX_SUFFIX):
        places = huggingface.read_index(file)
        shards = {name: _read_shard(file.with_name(name)) for name in dict.fromkeys(places.values())}
        for name, place in places.items():
            if name not in shards[place]:
                raise ValueError(f"tensor {name} is not in {place}")
        return None, {name: shards[place][name] for name, place in places.items()}
    with file.open("rb") as opened:
        start = opened.read(4)
    if start == llmc.MODEL_MAGIC.to_bytes(4, "little"):
        return llmc.read(file)
    if start != torch_file.LEGACY_START and (kind := kind_of(file)):
        raise ValueError(f"it is {kind}")
    if start in (torch_file.ZIP_START, torch_file.LEGACY_START):
        return torch_file.read(file)
    return None, huggingface.read_safetensors(file)


def _size(file: Path) -> int:
    """The size of a file in bytes, or the total size of the shards if it is an index."""
    files = [file]
    if file.name.endswith(huggingface.INDEX_SUFFIX):
        files = [file.with_name(name) for name in set(huggingface.read_index(file).values())]
    return sum(each.stat().st_size for each in files)


def _read_shard(file: Path) -> dict[str, Stored]:
    with naming_file(file):
        return _read(file)[1]


def _plain_names(stored: dict[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """Remove prefixes and wrappers from the names, and drop causal masks.

    Returns the parameters, including the output layer, and the names of the tensors that do not belong to the language
    model. Raises ValueError if two tensors get the same name, or if there are two models.
    """
    unwrapped: dict[str, Stored] = {}
    for name, values in stored.items():
        if len(name) > NAME_LIMIT:
            raise ValueError(f"the name of a tensor has {len(name):,} characters; expected at most {NAME_LIMIT:,}")
        parts = name.split(".")
        if foreign := next((text for start, text in FOREIGN.items() if any(p.startswith(start) for p in parts)), ""):
            raise ValueError(f"it has {foreign} (tensor {name})")
        short = ".".join(part for part in parts if part != PARALLEL and not part.startswith("_"))
        if short in unwrapped:
            raise ValueError(f"tensor {short} occurs twice, with and without the prefix of {name}")
        unwrapped[short] = values
    prefix = _prefix(unwrapped)
    plain: dict[str, Stored] = {}
    left_out = []
    for name, values in unwrapped.items():
        inside = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if inside.partition(".")[0] in PARTS:
            if not inside.endswith(MASK_SUFFIXES):
                plain[inside] = values
        elif LM_HEAD not in plain and (name == LM_HEAD or name.endswith(f".{LM_HEAD}")):
            plain[LM_HEAD] = values
        elif name == LM_HEAD_BIAS or name.endswith(f".{LM_HEAD_BIAS}"):
            plain[LM_HEAD_BIAS] = values
        else:
            left_out.append(name)
    return plain, left_out


def _prefix(names: Iterable[str]) -> str:
    """The prefix in the name of the token embedding, or, if that is missing, of the position embedding."""
    for embedding in EMBEDDINGS:
        found = [name for name in names if name == embedding or name.endswith(f".{embedding}")]
        if len(found) > 1:
            raise ValueError(f"it has {len(found)} models, with {' and '.join(sorted(found)[:SHOWN])}; expected one")
        if found:
            return found[0].removesuffix(embedding)
    return ""


def _published(stored: dict[str, Stored]) -> GPT2Config:
    """The config of a published model with these shapes, for a file without a config. In general, shapes do not
    determine the number of heads or the form of GELU. Raises ValueError if the shapes are not those of a published
    model."""
    layers = sum(name.endswith("ln_1.weight") for name in stored)
    queries = stored.get("h.0.attn.c_attn.weight")
    for preset in PRESETS.values():
        shape = (preset.n_embd, 3 * preset.n_embd)
        if preset.vocab_size == GPT2_VOCAB_SIZE and preset.n_layer == layers and queries and queries.shape == shape:
            return preset
    raise ValueError(
        f"it has no config, and shapes do not determine the number of heads or the form of GELU; put its "
        f"{CONFIG_FILE} next to it"
    )


def _parameters(config: GPT2Config, stored: dict[str, Stored], size: int) -> dict[str, Stored]:
    """The parameters of a model with this config, in the layout of gpt2.model.GPT2.

    Raises ValueError, which names the tensor, if one is missing, is unexpected, or has the wrong shape or dtype, and
    ValueError if the tensors need more bytes than the `size` of their files, that is, if several tensors share memory.
    """
    stored = dict(stored)
    for name in ("wte.weight", LM_HEAD):
        if name in stored and stored[name].shape[:1] == (PADDED_VOCAB_SIZE,) and config.vocab_size == GPT2_VOCAB_SIZE:
            stored[name] = stored[name].rows(GPT2_VOCAB_SIZE)
    head, bias = stored.pop(LM_HEAD, None), stored.pop(LM_HEAD_BIAS, None)
    if bias is not None and bias.read().any():
        raise ValueError(f"{LM_HEAD_BIAS} is not zero; this model's output layer has no bias")
    if head is not None and "wte.weight" not in stored:  # the file has only this one of the two tied names
        stored["wte.weight"], head = head, None
    needed = 0
    is_transposed = "h.0.attn.c_attn.weight" in stored and (
        stored["h.0.attn.c_attn.weight"].shape == (3 * config.n_embd, config.n_embd)
    )
    without_biases = not any(name.endswith(".bias") for name in stored)
    arrays: dict[str, Stored] = {}
    for name, shape in config.shapes():
        if name not in stored and not (without_biases and name.endswith(".bias")):
            raise ValueError(f"tensor {name} is missing")
        is_stored, values = name in stored, stored.pop(name, None) or _zeros(shape)
        expected = shape[::-1] if is_transposed and is_matrix(name) else shape
        if values.dtype not in huggingface.NUMPY_DTYPES.values():
            supported = ", ".join(huggingface.NUMPY_DTYPES.values())
            raise ValueError(f"tensor {name} has dtype {values.dtype}; expected one of {supported}")
        if values.shape != expected:
            raise ValueError(f"tensor {name} has shape {values.shape}; expected {expected}")
        needed += values.nbytes if is_stored else 0
        arrays[name] = values.transposed() if is_transposed and is_matrix(name) else values
    if needed > size:
        raise ValueError(
            f"its tensors need {needed:,} bytes, but it has {size:,}: several tensors share memory; expected separate "
            "memory for each"
        )
    if stored:
        raise ValueError(f"tensor {next(iter(stored))} is not a parameter of this model")
    if head is not None and not _equal(head, arrays["wte.weight"]):
        raise ValueError(f"{LM_HEAD} differs from wte.weight; this model ties the output layer to the token embedding")
    return arrays


def _zeros(shape: tuple[int, ...]) -> Stored:
    return Stored(shape, "float32", lambda: np.zeros(shape, "float32"))


def _equal(a: Stored, b: Stored) -> bool:
    """Whether two arrays are bitwise equal, so that NaN equals NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and a.read().tobytes() == b.read().tobytes()
