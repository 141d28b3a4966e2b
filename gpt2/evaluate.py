"""How good is a model? `python -m gpt2.evaluate CHECKPOINT` measures its loss on data sets, HellaSwag and LAMBADA."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt2 import console
from gpt2.config import WEIGHT_DTYPES
from gpt2.console import Parser
from gpt2.formats.model_file import find_model
from gpt2.model import GPT2, to_generate
from gpt2.tokenizer import Tokenizer
from gpt2.training.dataset import SPLITS, TokenDataset, find_dataset
from gpt2.training.evaluation import describe_task, evaluate_data, evaluate_task
from gpt2.training.tasks import TASKS, load_items
from tinygrad2 import threads
from tinygrad2.backend import DEVICES
from tinygrad2.checkpoint import JsonObject, write_json


@console.command("gpt2.evaluate")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. The exit status: 0, 1 where something cannot be evaluated, 2 for a mistake in the options."""
    parser = Parser(prog="python -m gpt2.evaluate", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a model folder, or the out-dir of a training run")
    add("--data", metavar="NAME", help="data set: a name under data/, or a folder")
    add("--split", default="val", choices=SPLITS, help="which part of it [%(default)s]")
    add("--batches", type=int, metavar="N", help="the first N batches of it only [all]")
    add("--block-size", type=int, metavar="T", help="tokens per sequence [the model's context]")
    for task in TASKS.values():
        add(f"--{task.name}", nargs="?", const="", metavar="FILE", help=f"{task.name}, from FILE or else downloaded")
    add("--items", type=int, metavar="N", help="so many items of each task only, spread over the file [all]")
    add("--batch-size", type=int, default=16, help="sequences at a time [%(default)s]")
    add("--device", default="auto", choices=DEVICES, help="where to compute [%(default)s]")
    add("--threads", type=int, default=threads.count(), help="threads on the CPU [%(default)s]")
    add(
        "--dtype",
        default="float32",
        choices=WEIGHT_DTYPES,
        help="bfloat16 measures twice, the second time with such weights, and shows the difference",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    for name in ("batches", "block_size", "items", "batch_size", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"{options.json}: there is no folder {options.json.parent}/")
    if options.data is None and all(getattr(options, name) is None for name in TASKS):
        parser.error(f"nothing to evaluate: give {', '.join(['--data NAME', *(f'--{name}' for name in TASKS)])}")
    try:
        return _evaluate(options)
    except MemoryError:
        raise MemoryError(f"out of memory; use a smaller --batch-size than {options.batch_size}") from None


def _evaluate(options: argparse.Namespace) -> int:
    threads.set_count(options.threads)
    # Files that may be missing are opened before anything is computed.
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
    precision = to_generate(options.dtype, model.backend)
    if reason := model.backend.unsupported_reason(precision):
        raise ValueError(f"--dtype {reason}")

    def measure() -> JsonObject:
        results: JsonObject = {}
        if data is not None:
            figures = evaluate_data(model, tokenizer, data, options.batch_size, block_size, options.batches)
            print(
                f"{data.path} {data.split}: {figures['tokens']:,} tokens in sequences of {block_size}, "
                f"loss {figures['loss']:.4f} nats a token, perplexity {figures['perplexity']:.2f}, "
                f"{figures['bits_per_byte']:.4f} bits a byte",
                flush=True,
            )
            results["data"] = {"path": str(data.path), "split": data.split, **figures}
        for name, items in questions.items():
            results[name] = evaluate_task(TASKS[name], model, tokenizer, items, options.batch_size)
            print(describe_task(TASKS[name], results[name]), flush=True)
        return results

    print(
        f"{folder}: {model.n_parameters():,} parameters, {model.precision.name} on {model.backend.device}", flush=True
    )
    results = {"model": str(folder), "parameters": model.n_parameters(), **measure()}
    if options.dtype == "bfloat16":
        print("the same with weights in bfloat16:", flush=True)
        model = GPT2.from_pretrained(folder, device=options.device, dtype=precision)
        results["bfloat16"] = measure()
        if data is not None:
            before, after = results["data"]["loss"], results["bfloat16"]["data"]["loss"]
            results["bfloat16"]["loss_difference"] = after - before
            print(f"weights in bfloat16 change the loss by {after - before:+.6f} nats a token ({before:.6f} before)")
    if options.json:
        write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
