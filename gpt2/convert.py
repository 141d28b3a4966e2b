"""Convert model files: `python -m gpt2.convert SRC DST --to hf|pt|llmc|run`. PyTorch is not needed."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt2 import console
from gpt2.config import ACTIVATIONS, GPT2Config
from gpt2.console import Parser
from gpt2.formats import huggingface, llmc, torch_file
from gpt2.formats.model_file import ModelFile, find_model, open_model, read_training
from gpt2.formats.stored import Stored
from gpt2.formats.torch_optimizer import TrainingState
from gpt2.huggingface_tokenizer import GENERATION_FILE, copied_files
from gpt2.tokenizer import VOCABULARY_FILE, Tokenizer
from gpt2.training import exchange
from tinygrad2.checkpoint import write_json
from tinygrad2.files import atomic_write

FORMATS = {
    "hf": "a Hugging Face folder with config.json, model.safetensors, generation_config.json and the tokenizer's files",
    "pt": "a PyTorch file in nanoGPT's format, a dictionary with model and model_args, and for a run also the "
    "optimizer state, so that --init_from=resume resumes the run",
    "llmc": "an llm.c .bin file, in float32 or bfloat16",
}
RUN_FORMAT = {"run": "an out-dir from which train.py resumes, if SRC is nanoGPT's ckpt.pt or a checkpoint of a run"}
ALL_FORMATS = {**FORMATS, **RUN_FORMAT}
WRITTEN_DTYPES = ("float32", "float16", "bfloat16")
NANOGPT_GELU = (
    "nanoGPT computes exact GELU, but this model uses the tanh approximation; the activations differ by up to 5e-4. "
    "Use nn.GELU(approximate='tanh') in nanoGPT's model.py"
)


def convert(
    source: str | Path, target: str | Path, form: str, dtype: str = "float32", activation: str = ""
) -> GPT2Config:
    """Write the model in `source`, in any supported format, to `target`, which must not exist.

    form        one of FORMATS or RUN_FORMAT.
    dtype       the dtype to write; float32 is exact for float32, float16 and bfloat16 values.
    activation  the form of GELU, if the one in the file is wrong: nanoGPT's files do not record which version of
                nanoGPT wrote them.

    Returns the config that was written. If the model has no begin and end ids, the ids of its tokenizer are written.
    After an error or an interrupt, nothing remains at `target`. Raises ValueError or OSError.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise FileExistsError(f"{target}: already exists; choose another name, or remove it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: the folder {target.parent}/ does not exist")
    if form == "run" and dtype != "float32":
        raise ValueError(f"{target}: a run has parameters in float32; remove --dtype {dtype}")
    model = open_model(source)
    model.say_left_out()
    tokenizer, config = _with_tokenizer(model, source, form)
    config = replace(config, activation_function=activation) if activation else config
    state = _training_state(model, source, form)
    progress = tqdm(total=len(model.arrays), unit=" tensors", disable=None, leave=False)

    def counted(name: str) -> np.ndarray:
        progress.update()
        return model.read(name)

    arrays = {
        name: Stored(stored.shape, stored.dtype, lambda name=name: counted(name)).cast(dtype)  # type: ignore[misc]
        for name, stored in model.arrays.items()
    }
    with progress, atomic_write(target) as partial:
        if form == "pt":
            torch_file.write(partial, config, arrays, state)
        elif form == "llmc":
            llmc.write(partial, config, arrays)
        elif form == "run":
            assert state is not None
            exchange.write_run(partial, config, arrays, tokenizer, state)
        else:
            _write_folder(partial, config, arrays, tokenizer, source)
    return config


def _with_tokenizer(model: ModelFile, source: Path, form: str) -> tuple[Tokenizer | None, GPT2Config]:
    """The model's tokenizer, or None if unknown, and its config, in which missing begin and end ids are the
    tokenizer's."""
    try:
        tokenizer = Tokenizer.for_model(source, model.config.vocab_size)
    except (ValueError, OSError) as error:
        if form in ("hf", "run"):
            console.print_error(f"the tokenizer's files were not written: {console.one_line(error)}")
        return None, model.config
    begin = tokenizer.begin if tokenizer.end_ids else None
    return tokenizer, model.config.with_ids(begin, tokenizer.end_ids)


def _training_state(model: ModelFile, source: Path, form: str) -> TrainingState | None:
    """The training state in the source. If there is none, returns None, or raises ValueError for `--to run`."""
    if form not in ("pt", "run"):
        return None
    if exchange.is_run(source):
        try:
            return exchange.read_run(source, model.config)
        except ValueError as error:
            if form == "run":
                raise
            console.print_error(f"the state of the run was not converted: {console.one_line(error)}")
            return None
    if form == "run":
        return read_training(model)
    return None


def _write_folder(
    folder: Path, config: GPT2Config, arrays: dict[str, Stored], tokenizer: Tokenizer | None, source: Path
) -> None:
    folder.mkdir()
    if tokenizer is not None:
        try:
            _write_tokenizer(folder, config, tokenizer, source)
        except (ValueError, OSError) as error:
            console.print_error(f"the tokenizer's files were not written: {console.one_line(error)}")
    huggingface.write(folder, config, {name: stored.read() for name, stored in arrays.items()})
    if config.generation_config is None and (config.begin_id is not None or config.end_ids):
        write_json(folder / GENERATION_FILE, config.ids())


def _write_tokenizer(folder: Path, config: GPT2Config, tokenizer: Tokenizer, source: Path) -> None:
    """Copy the files of a Hugging Face tokenizer unchanged; write any other tokenizer in that layout."""
    copied = [] if (source / VOCABULARY_FILE).is_file() else copied_files(source)
    if copied:
        for file, name in copied:
            shutil.copyfile(file, folder / name)
        return
    tokenizer.save_hugging_face(folder, config.n_positions)
    if Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:  # the layout cannot represent this tokenizer
        tokenizer.save(folder)


def command_line() -> Parser:
    parser = Parser(
        "python -m gpt2.convert",
        "Convert a model from one format to another.",
        "SRC DST --to FORMAT",
        epilog="Formats: " + "; ".join(f"{name}: {text}" for name, text in ALL_FORMATS.items()) + ".",
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "source",
        metavar="SRC",
        help="a Hugging Face folder, a PyTorch .pt or .bin file (nanoGPT, build-nanogpt, a plain state dict), an "
        "llm.c .bin file, the out-dir of a run, or gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded if needed)",
    )
    group.add_argument(
        "--activation",
        choices=ACTIVATIONS[:2],
        help="the form of GELU, if the one in SRC is wrong [default: as in SRC]",
    )
    group = parser.add_argument_group("output")
    group.add_argument("target", metavar="DST", help="the file or folder to write; it must not exist")
    group.add_argument("--to", required=True, choices=ALL_FORMATS, help="the format to write")
    group.add_argument("--dtype", choices=WRITTEN_DTYPES, default="float32", help="dtype of the written values")
    return parser


@console.command("gpt2.convert")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, or 1 if SRC cannot be read or DST cannot be written."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if not options.source or not options.target:
        parser.error("SRC or DST is empty; expected a model and the file or folder to write")
    with console.on_interrupt(f"{options.target} was not written"):
        source = find_model(Path(options.source), console.print_error)
        config = convert(source, options.target, options.to, options.dtype, options.activation or "")
    if options.to == "pt" and config.activation_function != "gelu":
        console.print_error(f"{options.target}: {NANOGPT_GELU}")
    console.say(f"{options.target}: written from {source}")
    command = (
        f"{console.script('train')} --out-dir" if options.to == "run" else f"{console.script('sample')} --checkpoint"
    )
    console.say(f"next: {command} {shlex.quote(options.target)}")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
