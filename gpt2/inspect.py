"""Look inside a model: write a page that shows what the model computes for a text.

The page shows how surprising each token is and what the model expected instead, what each attention head attends to,
what each layer would predict, and how the residual stream grows. It is a single file that works offline. Without
--prompt, the model first generates a text. If the text is longer than the model's context, only its end is used.
"""

from __future__ import annotations

from gpt2 import console  # first, so that Ctrl-C during the other imports exits silently

# isort: split
import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt2 import device_options
from gpt2.console import Parser
from gpt2.formats.model_file import default_model, find_model
from gpt2.generate import begin_id, check_sampling, end_ids, generate
from gpt2.inspection import PATTERNS, SPREADS, Vocabulary, inspect, inspector_page, unpacked, word_label
from gpt2.model import GPT2
from gpt2.page import write
from gpt2.tokenizer import Tokenizer
from tinygrad2.checkpoint import JsonObject

PAGE = "inspect.html"
GENERATED = 100  # the default number of tokens to generate without a prompt


def command_line() -> Parser:
    parser = Parser("python -m gpt2.inspect", __doc__)
    group = parser.add_argument_group("text")
    group.add_argument("-p", "--prompt", metavar="TEXT", help="the text to show [default: the model generates one]")
    group.add_argument(
        "-m",
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"number of tokens that the model appends to the text [default: 0, or {GENERATED} without a text]",
    )
    group.add_argument(
        "-t", "--temperature", type=float, default=0.8, metavar="X", help="divides the logits; 0 is greedy"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="random seed")
    group = parser.add_argument_group("model and device")
    group.add_argument(
        "--checkpoint", metavar="MODEL", help="a model, as in sample.py --help [default: checkpoint/, then out/]"
    )
    device_options.add(group)
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, default=Path(PAGE), metavar="FILE", help="the HTML file to write")
    return parser


@console.command("gpt2.inspect")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0; 1 if there is no valid model or the page cannot be written; 2 for an
    invalid option."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.max_tokens is not None and options.max_tokens < 0:
        parser.error(f"--max-tokens is {options.max_tokens}; expected 0 or more")
    if not 0 <= options.seed < 2**64:
        parser.error(f"--seed is {options.seed}; expected 0 to 2**64 - 1")
    if options.checkpoint == "":
        parser.error("--checkpoint is empty; expected a model")
    if not options.prompt and options.max_tokens == 0:
        parser.error("--prompt is empty and --max-tokens is 0; there is no text to show")
    parser.check_output("--out", options.out)
    try:
        check_sampling(options.temperature, None, None)
    except ValueError as error:
        parser.error(f"--{error}")
    device_options.set_threads(parser, options)
    return _inspect(options)


def _inspect(options: argparse.Namespace) -> int:
    say = console.print_error
    folder = find_model(Path(options.checkpoint), say) if options.checkpoint else default_model(say)
    if folder is None:
        raise ValueError("no trained model in checkpoint/ or out/; train one (python train.py), or pass --checkpoint")
    model = GPT2.from_pretrained(folder, device=options.device)
    tokenizer = Tokenizer.for_model(folder, model.config.vocab_size)
    console.say(f"model: {folder}, {model.config.summary()}, {model.n_parameters():,} parameters")
    tokens, prompt, notes = text_of(options, model, tokenizer)
    data = inspect(model, tokenizer, tokens, prompt, str(folder)) | {"notes": notes}
    write(inspector_page(data), options.out)
    for line in summary(data, Vocabulary(tokenizer, model.config.vocab_size)):
        console.say(line)
    console.say(f"page: {options.out} ({options.out.stat().st_size / 1e6:.1f} MB); open it in a browser")
    return 0


def text_of(options: argparse.Namespace, model: GPT2, tokenizer: Tokenizer) -> tuple[list[int], int, list[str]]:
    """The tokens to show, the number of tokens that are from the prompt, and notes for the page."""
    tokens = tokenizer.encode_prompt((options.prompt or "").removeprefix("\ufeff")).tolist()
    given, context = len(tokens), model.config.n_positions
    more = options.max_tokens if options.max_tokens is not None else 0 if given else GENERATED
    if more:
        if not given:
            console.print_error(f"no prompt given; the model generates {more:,} tokens")
        start, ends = tokens or [begin_id(model, tokenizer)], end_ids(model, tokenizer)
        for (token,) in generate(
            model,
            start,
            more,
            temperature=options.temperature,
            seed=options.seed,
            vocab_size=tokenizer.vocab_size,
            never=tokenizer.unused_ids,
        ):
            if int(token) in ends:
                break
            tokens.append(int(token))
    if not tokens:
        raise ValueError("the model generated an empty text; pass a --prompt or another --seed")
    notes = []
    if len(tokens) > context:
        count = f"{len(tokens):,} tokens"
        console.print_error(f"the text has {count}; the page shows the last {context:,}, the model's context")
        notes.append(f"The text has {count}; these are the last {context:,}, the model's context.")
    dropped = max(0, len(tokens) - context)
    return tokens[dropped:], max(0, given - dropped), notes


def summary(data: JsonObject, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield a summary for the terminal, line by line."""
    bits, tokens = data["bits_per_byte"], data["tokens"]
    count = len(tokens)
    yield f"{count:,} token{'s' * (count != 1)}" + ("" if bits is None else f", {bits:.3f} bits per byte")
    places = [(place["p"], int(at), place) for at, place in data["words"].items() if place["begins"] >= 0.5]
    if places:
        p, at, place = min(places, key=lambda found: found[:2])
        word = word_label(vocabulary, tokens[at : place["end"]])
        expected = [(text, value) for text, value in place["words"] if text != word]
        yield f"most surprising word: {word!r} with {percent(p)}; {listed(p, expected)}"
    elif count > 1:
        at = max(range(1, count), key=lambda i: data["surprise"][i])
        ids, p = (unpacked(data["choices"][name])[at - 1] for name in ("ids", "p"))
        token = vocabulary.label(tokens[at])
        expected = [(vocabulary.label(i), value) for i, value in zip(ids.tolist(), p, strict=True) if i != tokens[at]]
        actual = 2 ** -data["surprise"][at]
        yield f"most surprising token: {token!r} (token {at + 1}) with {percent(actual)}; {listed(actual, expected)}"
    kinds = Counter(head["kind"] for layer in data["attention"]["heads"] for head in layer)
    names = {key: texts[0] for key, texts in PATTERNS.items()} | {SPREADS: "no single pattern"}
    yield "heads by what they look at: " + ", ".join(f"{names[kind]} {n}" for kind, n in kinds.most_common())


def listed(actual: float, expected: list[tuple[str, float]]) -> str:
    """Describe what the model expected instead of a word or token that it gave the probability `actual`."""
    alternatives = ", ".join(f"{text!r} {percent(p)}" for text, p in expected[:3])
    is_first = bool(expected) and actual >= expected[0][1]
    return f"it was the first choice, before {alternatives}" if is_first else f"expected {alternatives}"


def percent(p: float) -> str:
    return f"{p:.1%}" if p >= 0.0005 else "less than 0.1%"


if __name__ == "__main__":
    sys.exit(console.run(main))
