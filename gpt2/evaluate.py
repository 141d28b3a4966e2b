"""Evaluate a model: its loss on a data set, and its results on HellaSwag and LAMBADA."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt2 import console, device_options
from gpt2.config import WEIGHT_DTYPES
from gpt2.console import Parser
from gpt2.formats.model_file import find_model
from gpt2.model import GPT2, generation_precision
from gpt2.tokenizer import Tokenizer
from gpt2.training.dataset import SPLITS, TokenDataset, find_dataset
from gpt2.training.evaluation import describe_task, evaluate_data, evaluate_task
from gpt2.training.tasks import TASKS, load_items
from tinygrad2.checkpoint import JsonObject, write_json


def command_line() -> Parser:
    parser = Parser("python -m gpt2.evaluate", __doc__, "CHECKPOINT")
    group = parser.add_argument_group("model and device")
    group.add_argument("checkpoint", metavar="CHECKPOINT", help="a model folder or file, or the out-dir of a run")
    device_options.add(group)
    group.add_argument(
        "--dtype",
        default="float32",
        choices=WEIGHT_DTYPES,
        help="dtype of the weights; bfloat16 evaluates the model in float32 and in bfloat16, and prints the difference",
    )
    group = parser.add_argument_group("what to evaluate")
    group.add_argument("--data", metavar="NAME", help="a data set: a name in data/, or a folder [default: none]")
    for task in TASKS.values():
        group.add_argument(
            f"--{task.name}",
            nargs="?",
            const="",
            metavar="FILE",
            help=f"the task {task.name}, from FILE or downloaded [default: off]",
        )
    group = parser.add_argument_group("how much")
    group.add_argument("--split", default="val", choices=SPLITS, help="the split of the data set")
    group.add_argument("--batches", type=int, metavar="N", help="evaluate only the first N batches [default: all]")
    group.add_argument(
        "--block-size", type=int, metavar="TOKENS", help="tokens per sequence [default: the model's context]"
    )
    group.add_argument(
        "--items", type=int, metavar="N", help="evaluate only N evenly spaced items of each task [default: all]"
    )
    group.add_argument("--batch-size", type=int, default=16, metavar="SEQUENCES", help="sequences per batch")
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE [default: none]")
    return parser


@console.command("gpt2.evaluate")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0; 1 if something cannot be evaluated; 2 for an invalid option."""
    parser = command_line()
    options = parser.parse_args(arguments)
    for name in ("batches", "block_size", "items", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
    if not options.checkpoint:
        parser.error("CHECKPOINT is empty; expected a model")
    parser.check_output("--json", options.json)
    if options.data is None and all(getattr(options, name) is None for name in TASKS):
        parser.error(f"nothing to evaluate; pass {', '.join(['--data NAME', *(f'--{name}' for name in TASKS)])}")
    device_options.set_threads(parser, options)
    try:
        return _evaluate(options)
    except MemoryError:
        raise MemoryError(f"out of memory; use a --batch-size below {options.batch_size}") from None


def _evaluate(options: argparse.Namespace) -> int:
    # Open all files first, so that a missing file is reported before any computation.
    questions = {
        name: load_items(task, getattr(options, name), options.items)
        for name, task in TASKS.items()
        if getattr(options, name) is not None
    }
    data = None if options.data is None else TokenDataset.open(find_dataset(options.data), options.split)
    folder = find_model(Path(options.checkpoint), console.print_error)
    model = GPT2.from_pretrained(folder, device=options.device)
    tokenizer = Tokenizer.for_model(folder, model.config.vocab_size)
    context = model.config.n_positions
    block_size = options.block_size or context
    if block_size > context:
        raise ValueError(f"--block-size {block_size} is longer than the model's context of {context} tokens")
    precision = generation_precision(options.dtype, model.backend)
    if reason := model.backend.unsupported_reason(precision):
        raise ValueError(f"--dtype {reason}")

    def measure() -> JsonObject:
        results: JsonObject = {}
        if data is not None:
            figures = evaluate_data(model, tokenizer, data, options.batch_size, block_size, options.batches)
            console.say(
                f"{data.path} {data.split}: {figures['tokens']:,} tokens in sequences of {block_size}, "
                f"loss {figures['loss']:.4f} nats per token, perplexity {figures['perplexity']:.2f}, "
                f"{figures['bits_per_byte']:.4f} bits per byte"
            )
            results["data"] = {"path": str(data.path), "split": data.split, **figures}
        for name, items in questions.items():
            results[name] = evaluate_task(TASKS[name], model, tokenizer, items, options.batch_size)
            console.say(describe_task(TASKS[name], results[name]))
        return results

    work = [f"{len(items):,} items of {name}" for name, items in questions.items()]
    if data is not None:
        windows = min(data.windows(block_size), (options.batches or sys.maxsize) * options.batch_size)
        work.insert(0, f"{windows * block_size:,} tokens")
    console.say(
        f"{folder}: {model.n_parameters():,} parameters, {model.precision.name} on {model.backend.device}; "
        f"evaluating {', '.join(work)} ..."
    )
    results = {"model": str(folder), "parameters": model.n_parameters(), **measure()}
    if options.dtype == "bfloat16":
        console.say("with weights in bfloat16:")
        model = GPT2.from_pretrained(folder, device=options.device, dtype=precision)
        results["bfloat16"] = measure()
        if data is not None:
            before, after = results["data"]["loss"], results["bfloat16"]["data"]["loss"]
            results["bfloat16"]["loss_difference"] = after - before
            console.say(
                f"bfloat16 weights change the loss by {after - before:+.6f} nats per token ({before:.6f} before)"
            )
    if options.json:
        write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
