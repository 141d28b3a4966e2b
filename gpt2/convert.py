"""Convert model files: `python -m gpt2.convert SRC DST --to hf|pt|llmc`. PyTorch is not needed."""

from __future__ import annotations

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
from gpt2.formats.model_file import find_model, open_model
from gpt2.formats.stored import Stored
from gpt2.tokenizer import Tokenizer
from tinygrad2.checkpoint import write_json
from tinygrad2.files import atomic_write

FORMATS = {
    "hf": "a Hugging Face folder with config.json, model.safetensors, generation_config.json and the tokenizer's files",
    "pt": "a PyTorch file as nanoGPT writes it, a dictionary with model and model_args",
    "llmc": "a .bin file of llm.c, in float32 or bfloat16",
}
WRITTEN_DTYPES = ("float32", "float16", "bfloat16")


def convert(source: str | Path, target: str | Path, form: str, dtype: str = "float32", activation: str = "") -> None:
    """Write the model in `source`, in any format that can be read, to `target`, which must not exist yet.

    form        one of FORMATS.
    dtype       of the values written; float32 keeps every bit of float32, float16 and bfloat16 values.
    activation  the form of GELU, if the file names the wrong one: nanoGPT's files do not say which version trained
                them.

    If it fails or is interrupted, nothing is left at `target`. Raises ValueError or OSError.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise FileExistsError(f"{target}: already exists; choose another name, or remove it first")
    model = open_model(source)
    config = replace(model.config, activation_function=activation) if activation else model.config
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
            torch_file.write(partial, config, arrays)
        elif form == "llmc":
            llmc.write(partial, config, arrays)
        else:
            _write_folder(partial, config, arrays, source)


def _write_folder(folder: Path, config: GPT2Config, arrays: dict[str, Stored], source: Path) -> None:
    folder.mkdir()
    ids = {}
    try:
        tokenizer = Tokenizer.for_model(source, config.vocab_size)
        tokenizer.save_hugging_face(folder, config.n_positions)
        if (
            Tokenizer.load(folder).fingerprint != tokenizer.fingerprint
        ):  # it splits text by another pattern than GPT-2's
            tokenizer.save(folder)
        ids = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
        write_json(folder / "generation_config.json", ids)
    except (ValueError, OSError) as error:
        console.print_error(f"the tokenizer's files were not written: {console.one_line(error)}")
    huggingface.write(folder, config, {name: stored.read() for name, stored in arrays.items()}, ids)


def command_line() -> Parser:
    parser = Parser(
        "python -m gpt2.convert",
        "Convert a model from one format to another.",
        "SRC DST --to FORMAT",
        epilog="Formats: " + "; ".join(f"{name}: {text}" for name, text in FORMATS.items()) + ".",
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "source",
        metavar="SRC",
        help="a Hugging Face folder, a .pt or .bin file of PyTorch (nanoGPT, build-nanogpt, a plain state dict), a "
        ".bin file of llm.c, the out-dir of a run, or gpt2, gpt2-medium, gpt2-large or gpt2-xl, which are downloaded",
    )
    group.add_argument(
        "--activation",
        choices=ACTIVATIONS[:2],
        help="the form of GELU, if the file names the wrong one [default: as in SRC]",
    )
    group = parser.add_argument_group("output")
    group.add_argument("target", metavar="DST", help="the file or folder to write; it must not exist yet")
    group.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    group.add_argument("--dtype", choices=WRITTEN_DTYPES, default="float32", help="dtype of the values written")
    return parser


@console.command("gpt2.convert")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Its exit status: 0, or 1 if SRC cannot be read or DST cannot be written."""
    options = command_line().parse_args(arguments)
    with console.on_interrupt(f"{options.target} was not written"):
        source = find_model(Path(options.source), console.print_error)
        convert(source, options.target, options.to, options.dtype, options.activation or "")
    console.say(f"{options.target}: written from {source}")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
