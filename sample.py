"""Continue a prompt with a trained model.

Uses the model in checkpoint/, else the newest one of a training run in out/, else an untrained one.
Text may be longer than the model's context: then the older half of what the model sees is dropped, and the rest read
again.
"""

from __future__ import annotations

from gpt2 import console  # first: Ctrl-C during the other imports ends silently

# isort: split
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt2 import GPT2, GPT2Config, Tokenizer
from gpt2.config import WEIGHT_DTYPES
from gpt2.console import Parser, print_error
from gpt2.formats.model_file import find_model
from gpt2.generate import begin_id, check_sampling, stream_text
from tinygrad2 import checkpoint, machine, threads
from tinygrad2.backend import DEVICES

MODELS = (
    "a model folder, a file (.safetensors, .pt, .bin of PyTorch or llm.c), the out-dir of a training run, or gpt2, "
    "gpt2-medium, gpt2-large or gpt2-xl, which are downloaded"
)


@console.command("sample.py")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="sample.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("-p", "--prompt", default="", help="text to continue; without one the model begins a new text")
    add("-m", "--max-tokens", "--max_tokens", type=int, default=200, help="tokens to add at most [%(default)s]")
    add("-n", "--samples", type=int, default=1, help="how many continuations [%(default)s]")
    add(
        "-t",
        "--temperature",
        type=float,
        default=0.8,
        help="0 always takes the most likely token [%(default)s]",
    )
    add("-k", "--top-k", "--top_k", type=int, help="choose among the k most likely tokens only")
    add("--top-p", "--top_p", type=float, help="choose among the most likely tokens that hold probability p together")
    add("--seed", type=int, default=0, help="the same seed gives the same text [%(default)s]")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be given several times)")
    add("--checkpoint", metavar="MODEL", help=MODELS)
    add("--device", default="auto", choices=DEVICES, help="where to compute [%(default)s]")
    add("--threads", type=int, default=threads.count(), help="threads on the CPU [%(default)s]")
    add(
        "--dtype",
        default="float32",
        choices=WEIGHT_DTYPES,
        help="weights in bfloat16 are half as many bytes to read for a token [%(default)s]",
    )
    options = parser.parse_args(arguments)
    for name, value, least in (
        ("--max-tokens", options.max_tokens, 0),
        ("--samples", options.samples, 1),
        ("--threads", options.threads, 1),
    ):
        if value < least:
            parser.error(f"{name} is {value}; expected {least} or more")
    if not 0 <= options.seed < 2**64:
        parser.error(f"--seed is {options.seed}; expected 0 to 2**64 - 1")
    if options.checkpoint == "":
        parser.error("--checkpoint is empty; expected a model")
    if "" in options.stop:
        parser.error("--stop is empty; expected some text")
    try:
        check_sampling(options.temperature, options.top_k, options.top_p)
    except ValueError as error:
        parser.error(f"--{error}")
    try:
        return sample(options)
    except KeyboardInterrupt:
        print()  # ends the line of the text
        raise


def sample(options: argparse.Namespace) -> int:
    threads.set_count(options.threads)
    folder = find_model(Path(options.checkpoint), print_error) if options.checkpoint else default_model()
    own = not options.checkpoint and folder == Path("checkpoint") and checkpoint.find(Path("out"))
    hint = " (your own: --checkpoint out)" if own else ""
    weights = "" if options.dtype == "float32" else f", weights in {options.dtype}"
    if folder is None:
        print_error(
            f"no trained model in checkpoint/ or out/ (python train.py makes one): sampling an untrained one{weights}"
        )
        tokenizer = Tokenizer.load("bytes")
        model = GPT2(GPT2Config.preset("nano"), device=options.device)
        model = model.narrow() if weights and model.backend.narrow_weights else model
    else:
        print_error(f"model: {folder}{weights}{hint}")
        model = GPT2.from_pretrained(folder, device=options.device, dtype=options.dtype)
        tokenizer = Tokenizer.for_model(folder, model.config.vocab_size)
    options.prompt = options.prompt.removeprefix("\ufeff")  # a byte-order mark, of a prompt from a file
    prompt = tokenizer.encode_prompt(options.prompt).tolist() or [begin_id(model, tokenizer)]
    if len(prompt) > (context := model.config.n_positions):
        print_error(f"the prompt has {len(prompt):,} tokens; the model sees the last {context:,}")
    check_memory(model, options.samples, len(prompt), options.max_tokens)
    pieces = stream_text(
        model,
        tokenizer,
        prompt,
        options.max_tokens,
        stop=options.stop,
        samples=options.samples,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    # The first sample is printed as it is generated; the others, of the same batch, after it.
    texts = [options.prompt] * options.samples
    heading = "--- sample {} of " + str(options.samples) + " ---"
    if options.samples > 1:
        print(heading.format(1))
    print(options.prompt, end="", flush=True)
    for i, piece in pieces:
        texts[i] += piece
        if i == 0:
            print(piece, end="", flush=True)
    print()
    for i, text in enumerate(texts[1:], start=2):
        print(f"{heading.format(i)}\n{text}")
    return 0


def check_memory(model: GPT2, samples: int, prompt: int, more: int) -> None:
    """Raise MemoryError if so many samples need more memory than is free, before any is allocated."""
    itemsize = np.dtype(model.activations).itemsize
    need = model.config.memory_to_generate(samples, prompt, more, itemsize)
    there = model.backend.memory() or machine.memory()
    if there is None or sum(need.values()) <= there[0]:
        return
    parts = " + ".join(f"{value / 1e9:,.2f} {name}" for name, value in need.items())
    fitting = int(samples * 0.9 * there[0] / sum(need.values()))  # a tenth for temporary arrays
    raise MemoryError(
        f"out of memory: {samples:,} samples of {min(prompt + more, model.config.n_positions):,} tokens need {parts} = "
        f"{sum(need.values()) / 1e9:,.2f} GB; {there[0] / 1e9:,.2f} of {there[1] / 1e9:,.2f} GB are free; "
        + (f"-n {fitting} fits" if fitting else "not even one fits: use a smaller --max-tokens or a shorter prompt")
    )


def default_model() -> Path | None:
    """The model in checkpoint/, else the newest one in out/, else None."""
    for folder in (Path("checkpoint"), Path("out")):
        if (folder / "config.json").is_file() or checkpoint.find(folder) or any(folder.glob("*.pt")):
            return find_model(folder, print_error)
    return None


if __name__ == "__main__":
    sys.exit(console.run(main))
