"""Model files of every supported format, under the names and in the layout of gpt2.model.GPT2.

It reads Hugging Face folders (config.json with model.safetensors or pytorch_model.bin, possibly sharded), PyTorch files
(nanoGPT and build-nanogpt checkpoints, plain state dicts), and llm.c files. Every shape is checked before a model is
built.
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

MASK_SUFFIXES = (".attn.bias", ".attn.masked_bias")  # causal masks in old files; they are not parameters
PARTS = ("wte", "wpe", "h", "ln_f")  # the first part of a parameter's name, after any prefix
EMBEDDINGS = ("wte.weight", "wpe.weight")  # the prefix is the text before the first of these that exists
# Names of wrappers, which may occur anywhere in a parameter's name, begin with "_" (_orig_mod of torch.compile,
# _fsdp_wrapped_module, _checkpoint_wrapped_module, _forward_module of DeepSpeed), except DistributedDataParallel's:
PARALLEL = "module"
FOREIGN = {  # by the start of a component of a tensor's name: what kind of file has such tensors
    "lora_": "an adapter besides its weights (peft, LoRA); merge it: model.merge_and_unload().save_pretrained(FOLDER)",
    "qweight": "quantized weights (GPTQ, AWQ), which are not supported; use the original weights",
    "weight_scale": "quantized weights, which are not supported; use the original weights",
}
LM_HEAD_BIAS = "lm_head.bias"  # GPT-2 has none
NAME_LIMIT = 1000  # maximum length of a tensor's name
SHOWN = 5  # maximum number of names in a message
TRAINER, BEST = "trainer.json", "best"  # in an out-dir: the state in each checkpoint, and a link to the best one


@dataclass
class ModelFile:
    """A model in a file or folder. Its shapes have been read, but not its values.

    file      the file with the parameters, or the index of its shards.
    config    the model's sizes and dropout rates.
    arrays    every parameter of gpt2.model.GPT2, under its name and in its shape there.
    left_out  the names of tensors of other heads, which are not part of the language model.
    """

    file: Path
    config: GPT2Config
    arrays: dict[str, Stored]
    left_out: list[str] = field(default_factory=list)

    def say_left_out(self) -> None:
        """Print a line that names the tensors that are left out, if there are any."""
        if self.left_out:
            more = f" and {len(self.left_out) - SHOWN:,} more" if len(self.left_out) > SHOWN else ""
            names = ", ".join(map(printable, self.left_out[:SHOWN]))
            print_error(f"{self.file}: left out, since they are not part of the language model: {names}{more}")

    def read(self, name: str) -> np.ndarray:
        """The values of a parameter, in the file's dtype. Raises ValueError naming the file."""
        with naming_file(self.file):
            return self.arrays[name].read()


RUN_LOG = "log.jsonl"  # in the out-dir of a run


def find_model(path: Path, say: Callable[[str], None]) -> Path:
    """The model file or folder that `path` refers to:

    a model                      `path` itself
    the out-dir of a run         its newest intact checkpoint, or else its newest .pt file
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
    """The best checkpoint of a run according to its newest one; None if there is none, or if it is damaged."""
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
    """The default model of a command: the one in checkpoint/, else the newest one in out/, else None."""
    for folder in (Path("checkpoint"), Path("out")):
        if (folder / CONFIG_FILE).is_file() or checkpoint.find(folder) or any(folder.glob("*.pt")):
            return find_model(folder, say)
    return None


def open_model(path: str | Path) -> ModelFile:
    """The model in the file or folder `path`.

    Accepts names with any prefix and with names of wrappers inside; either name of the token embedding that is tied to
    the output layer, or both if their values are equal; the causal masks of old files; additional heads, which are left
    out; matrices as (in, out) or (out, in); models without biases, which are then zeros; and float64, float32, float16
    and bfloat16 values. Raises FileNotFoundError or ValueError naming the file, before it allocates memory for arrays.
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
    """The training state in the nanoGPT checkpoint `model`. Raises ValueError naming the file if it has none."""
    with naming_file(model.file):
        with model.file.open("rb") as opened:
            if opened.read(4) not in (torch_file.ZIP_START, torch_file.LEGACY_START):
                raise ValueError("it has no training state; expected a checkpoint of nanoGPT or train.py")
        names, _ = _plain_names(torch_file.read(model.file)[1])
        return torch_file.read_training(model.file, model.config, names)


def load_config(path: str | Path) -> GPT2Config:
    """The config of the model in the file or folder `path`, after checking its parameters against it. Raises as
    open_model does."""
    return open_model(path).config


def load_into(model: LanguageModel, path: str | Path) -> None:
    """Load the parameters of the model from the file or folder `path`. Raises as open_model does."""
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


def _read(file: Path) -> tuple[GPT2Config | None, dict[str, Stored]]:
    """The config in a file of any format, or None if it has none, and its arrays, with the file's names and layouts."""
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
    """The size in bytes of a file, or of all shards that an index lists."""
    files = [file]
    if file.name.endswith(huggingface.INDEX_SUFFIX):
        files = [file.with_name(name) for name in set(huggingface.read_index(file).values())]
    return sum(each.stat().st_size for each in files)


def _read_shard(file: Path) -> dict[str, Stored]:
    with naming_file(file):
        return _read(file)[1]


def _plain_names(stored: dict[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """The parameters and the output layer without prefixes and wrappers in their names, and without masks; and the
    names of the tensors that do not belong to the language model.

    Raises ValueError if two tensors then have the same name, or if there are two models.
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
    """The prefix of the name of the token embedding, or of the position embedding if that is absent."""
    for embedding in EMBEDDINGS:
        found = [name for name in names if name == embedding or name.endswith(f".{embedding}")]
        if len(found) > 1:
            raise ValueError(f"it has {len(found)} models, with {' and '.join(sorted(found)[:SHOWN])}; expected one")
        if found:
            return found[0].removesuffix(embedding)
    return ""


def _published(stored: dict[str, Stored]) -> GPT2Config:
    """The config for arrays that come without one, if they have a published size and the published layout. Shapes alone
    determine neither the number of heads nor the form of GELU."""
    layers = sum(name.endswith("ln_1.weight") for name in stored)
    queries = stored.get("h.0.attn.c_attn.weight")
    for preset in PRESETS.values():
        shape = (preset.n_embd, 3 * preset.n_embd)
        if preset.vocab_size == GPT2_VOCAB_SIZE and preset.n_layer == layers and queries and queries.shape == shape:
            return preset
    raise ValueError(
        f"it has no config, and shapes do not determine the number of heads and the form of GELU; put its "
        f"{CONFIG_FILE} next to it"
    )


def _parameters(config: GPT2Config, stored: dict[str, Stored], size: int) -> dict[str, Stored]:
    """The config's parameters among those stored, in this model's layout. Raises ValueError naming the tensor that is
    missing, unexpected, or of another shape or dtype, or if the tensors have more bytes than the `size` of their files,
    which means that several share their memory."""
    stored = dict(stored)
    for name in ("wte.weight", LM_HEAD):
        if name in stored and stored[name].shape[:1] == (PADDED_VOCAB_SIZE,) and config.vocab_size == GPT2_VOCAB_SIZE:
            stored[name] = stored[name].rows(GPT2_VOCAB_SIZE)
    head, bias = stored.pop(LM_HEAD, None), stored.pop(LM_HEAD_BIAS, None)
    if bias is not None and bias.read().any():
        raise ValueError(f"{LM_HEAD_BIAS} is not zero; this model's output layer has no bias")
    if head is not None and "wte.weight" not in stored:  # a file with only this one of the two tied names
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
            f"its tensors need {needed:,} bytes, but it has {size:,}: several share their memory; expected separate "
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
    """Whether the bits are equal, so that NaN equals NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and a.read().tobytes() == b.read().tobytes()
