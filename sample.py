"""Continue a prompt with a trained model.

The prompt is an argument, a file, stdin, or typed line by line (-i). Without --checkpoint, the model is the one in
checkpoint/, or else the newest checkpoint in out/, or else an untrained model. If the text becomes longer than the
model's context, the first half of the context is dropped and the rest is processed again. A sample ends at the model's
end-of-text token, even if that is its first token. If a sample has no visible text, a line on stderr reports it.
"""

from __future__ import annotations

from gpt2 import console  # first, so that Ctrl-C during the other imports exits silently

# isort: split
import argparse
import math
import sys
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

from gpt2 import GPT2, GPT2Config, Tokenizer, decode, device_options, familiar_options
from gpt2.console import Parser, TextPrinter, print_error
from gpt2.formats.model_file import default_model, find_model
from gpt2.generate import begin_id, check_sampling, stream_text
from gpt2.model import generation_precision
from tinygrad2 import checkpoint, machine
from tinygrad2.backend import get_backend, silence_compile_notice

MODELS = (
    "a model folder, a file (.safetensors, .pt, PyTorch's or llm.c's .bin), the out-dir of a run, or gpt2, "
    "gpt2-medium, gpt2-large or gpt2-xl (downloaded if needed) [default: checkpoint/, then out/]"
)


def command_line() -> Parser:
    parser = Parser(console.script("sample"), __doc__, familiar=familiar_options.SAMPLE, stray=instead_of)
    group = parser.add_argument_group("text")
    group.add_argument(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="text to continue, or - for stdin [default: none; the model begins a new text]",
    )
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="UTF-8 file with the text to continue, or - for stdin; a final newline is removed [default: none]",
    )
    group.add_argument(
        "-i",
        "--interactive",
        action="store_true",
        help="continue each line that you type, until Ctrl-D; Ctrl-C stops the current text",
    )
    group.add_argument("-m", "--max-tokens", type=int, default=200, metavar="N", help="maximum number of new tokens")
    group.add_argument("-n", "--samples", type=int, default=1, metavar="N", help="number of continuations")
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="stop before this text; may be repeated [default: none]",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "-t", "--temperature", type=float, default=0.8, metavar="X", help="divides the logits; 0 is greedy decoding"
    )
    group.add_argument(
        "-k", "--top-k", type=int, metavar="K", help="sample only from the K most probable tokens [default: all]"
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample only from the most probable tokens whose probabilities sum to P [default: all]",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed: the same seed gives the same text"
    )
    group = parser.add_argument_group("model and device")
    group.add_argument("--checkpoint", metavar="MODEL", help=MODELS)
    device_options.add(group)
    device_options.add_dtype(group)
    decode.add_option(group)
    return parser


def instead_of(argument: str) -> str:
    """Advice for a positional argument, which may be a text file, a model, or a prompt."""
    path = Path(argument)
    flag = "--prompt-file" if path.suffix in (".txt", ".md") else "--checkpoint"
    return f"; use {flag if path.exists() else '-p'} {console.quoted(argument)}"


@console.command(console.script_name("sample"))
def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line()
    options = parser.parse_args(arguments)
    options.stop = options.stop or []
    for name, value, least in (
        ("--max-tokens", options.max_tokens, 0),
        ("--samples", options.samples, 1),
    ):
        if value < least:
            parser.error(f"{name} is {value}; expected {least} or more")
    if not 0 <= options.seed < 2**64:
        parser.error(f"--seed is {options.seed}; expected 0 to 2**64 - 1")
    if options.prompt is not None and options.prompt_file is not None:
        parser.error("--prompt and --prompt-file are both given; expected one of them")
    if options.interactive and "-" in (options.prompt, options.prompt_file):
        parser.error("--interactive and a prompt from stdin (-) cannot be combined; use --prompt-file FILE")
    if options.checkpoint == "":
        parser.error("--checkpoint is empty; expected a model")
    if "" in options.stop:
        parser.error("--stop is empty; expected a text")
    try:
        check_sampling(options.temperature, options.top_k, options.top_p)
    except ValueError as error:
        parser.error(f"--{error}")
    device_options.set_threads(parser, options)
    options.prompt = read_prompt(options)
    return sample(options)


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt: the option's value, or the text of a file or stdin. Raises ValueError if it is not UTF-8."""
    file = "-" if options.prompt == "-" else options.prompt_file
    if file is None:
        return (options.prompt or "").removeprefix("\ufeff")
    if file == "-" and sys.stdin is None:
        raise ValueError("prompt -: stdin is closed; pipe the text in, or use --prompt-file FILE")
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompt {file}: byte {error.start} is not UTF-8 (0x{data[error.start]:02x}); convert the text to UTF-8, "
            f"for example with iconv"
        ) from None


def sample(options: argparse.Namespace) -> int:
    """Print the samples for the prompt in the options. With --interactive, also print samples for each typed line."""
    model, tokenizer = load_model(options)
    decode.set_decode(model, options.decode)
    if options.prompt or not options.interactive:
        print_samples(model, tokenizer, options)
    if options.interactive:
        print_error("type a prompt and press Enter; an empty line begins a new text, Ctrl-D exits")
    while options.interactive:
        try:
            options.prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        options.seed = (options.seed + 1) % 2**64  # so that the same prompt gives another text
        try:
            print_samples(model, tokenizer, options)
        except KeyboardInterrupt:
            continue
    return 0


def print_samples(model: GPT2, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    prompt = tokenizer.encode_prompt(options.prompt).tolist() or [begin_id(model, tokenizer)]
    if len(prompt) > (context := model.config.n_positions):
        print_error(f"the prompt has {len(prompt):,} tokens; the model reads only the last {context:,}")
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
    # The first two tokens call all kernels, so the notice about compiling them is printed before the text.
    pieces = chain(list(islice(pieces, options.samples + 1)), pieces)
    silence_compile_notice()  # a long text may need to compile more kernels
    continuations = [""] * options.samples

    def print_heading(i: int) -> None:
        if options.samples > 1:
            print(f"--- sample {i + 1} of {options.samples} ---")

    print_heading(0)
    with TextPrinter() as printer:  # the first sample is printed while it is generated; the others follow
        printer.write(options.prompt)
        for i, piece in pieces:
            continuations[i] += piece
            if i == 0:
                printer.write(piece)
    report_empty(0, continuations, options)
    for i, text in enumerate(continuations[1:], start=1):
        print_heading(i)
        with TextPrinter() as printer:
            printer.write(options.prompt + text)
        report_empty(i, continuations, options)


def load_model(options: argparse.Namespace) -> tuple[GPT2, Tokenizer]:
    """Load the model that the options select, and its tokenizer."""
    folder = find_model(Path(options.checkpoint), print_error) if options.checkpoint else default_model(print_error)
    weights = "" if options.dtype == "float32" else f", weights in {options.dtype}"
    if folder is None:
        print_error(
            f"no trained model in checkpoint/ or out/ ({console.script('train')} trains one): sampling from an "
            f"untrained model{weights}"
        )
        precision = generation_precision(options.dtype, get_backend(options.device))
        return GPT2(GPT2Config.preset("nano"), device=options.device, dtype=precision), Tokenizer.load("bytes")
    own = not options.checkpoint and folder == Path("checkpoint") and checkpoint.find(Path("out"))
    print_error(f"model: {folder}{weights}{' (your own: --checkpoint out)' if own else ''}")
    model = GPT2.from_pretrained(folder, device=options.device, dtype=options.dtype)
    return model, Tokenizer.for_model(folder, model.config.vocab_size)


def report_empty(i: int, continuations: Sequence[str], options: argparse.Namespace) -> None:
    """Print a line if sample i has no visible text after the prompt."""
    if options.max_tokens and not continuations[i].strip():
        sys.stdout.flush()
        name = f"sample {i + 1}" if options.samples > 1 else "the sample"
        print_error(f"{name} is empty: the model generated no visible text; try another --seed")


def check_memory(model: GPT2, samples: int, prompt: int, new: int) -> None:
    """Raise MemoryError before anything is allocated if these samples need more memory than is free."""
    itemsize = model.precision.activation_bytes
    need = model.config.memory_to_generate(samples, prompt, new, itemsize)
    free, total = model.backend.memory() or machine.memory() or (math.inf, math.inf)
    if sum(need.values()) <= free:
        return
    parts = " + ".join(f"{value / 1e9:,.2f} {name}" for name, value in need.items())
    fitting = int(samples * 0.9 * free / sum(need.values()))  # leaves a tenth for temporary arrays
    raise MemoryError(
        f"out of memory: {samples:,} samples of {min(prompt + new, model.config.n_positions):,} tokens need {parts} = "
        f"{sum(need.values()) / 1e9:,.2f} GB; {free / 1e9:,.2f} of {total / 1e9:,.2f} GB are free; "
        + (f"-n {fitting} fits" if fitting else "not even one fits: use a smaller --max-tokens or a shorter prompt")
    )


if __name__ == "__main__":
    sys.exit(console.run(main))
