"""How good is a model? `python -m gpt2.evaluate CHECKPOINT` measures its loss on data sets, HellaSwag and LAMBADA."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt2 import console
from gpt2.console import Parser
from gpt2.model import GPT2, WEIGHTS
from gpt2.tokenizer import Tokenizer
from gpt2.training.dataset import SPLITS, TokenDataset, find_dataset
from gpt2.training.run import find_model
from gpt2.training.tasks import TASKS, Item, Task, load, perplexity, score
from tinygrad2 import no_grad, threads
from tinygrad2.backend import DEVICES
from tinygrad2.checkpoint import write_json
from tinygrad2.distributed import Comm, SoloComm, share

ALONE = SoloComm()


def summed_loss(
    model: GPT2, data: TokenDataset, windows: range, batch_size: int, block_size: int, progress: bool = False
) -> float:
    """The loss in nats, summed over every target of these windows: the sums of several ranges add up."""
    total = 0.0
    firsts = range(0, len(windows), batch_size)
    with no_grad():
        for first in tqdm(firsts, data.split, unit=" batches", leave=False, disable=None if progress else True):
            indices = windows[first : first + batch_size]
            total += model.loss(*data.batch(indices, block_size)).item() * len(indices) * block_size
    return total


def mean_loss(
    model: GPT2, data: TokenDataset, batch_size: int, block_size: int, batches: int, comm: Comm = ALONE
) -> float:
    """The mean loss in nats per token over the first `batches` batches of windows, always the same ones.

    Fewer where the data set ends before; every window counts alike, in a last batch that is not full too. The ranks of
    `comm` share the windows.
    """
    windows = range(min(data.windows(block_size), batches * batch_size))
    own = windows[slice(*share(len(windows), comm.rank, comm.size))]
    total = comm.all_gather(np.array(summed_loss(model, data, own, batch_size, block_size))).sum()
    return float(total) / (len(windows) * block_size)


def evaluate_data(
    model: GPT2, tokenizer: Tokenizer, data: TokenDataset, batch_size: int, block_size: int, batches: int | None = None
) -> dict[str, Any]:
    """Figures on the first `batches` batches of windows of a data set, by default on all of them.

    loss           nats per token;  perplexity  its exponential.
    bits_per_byte  the bits that coding the targets with the model takes, for each byte of their text: comparable
                   between tokenizers. The mark between documents costs bits and has no bytes.
    tokens, bytes  of the targets.

    Raises ValueError where the data set was not made with this tokenizer.
    """
    made_with = data.tokenizer()
    if made_with.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{data.path}: it was made with another tokenizer ({made_with.name}) than the model's "
            f"({tokenizer.name}); prepare the data with the model's"
        )
    count = data.windows(block_size)
    windows = range(count if batches is None else min(count, batches * batch_size))
    length_of = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    length_of[tokenizer.end_of_text] = 0
    tokens, chunk = len(windows) * block_size, 1 << 20
    pieces = (data.read(1 + first, min(chunk, tokens - first)) for first in range(0, tokens, chunk))
    text_bytes = sum(int(length_of[piece].sum()) for piece in pieces)
    nats = summed_loss(model, data, windows, batch_size, block_size, progress=True)
    if not math.isfinite(nats):
        raise ValueError(f"{data.path}: the model's loss is {nats}; its weights are damaged")
    return {
        "loss": nats / tokens,
        "perplexity": perplexity(nats / tokens),
        "bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
        "tokens": tokens,
        "bytes": text_bytes,
        "block_size": block_size,
    }


def evaluate_task(
    task: Task, model: GPT2, tokenizer: Tokenizer, items: Sequence[Item], batch_size: int, comm: Comm = ALONE
) -> dict[str, Any]:
    """The task's figures on these items, how many there are, and how many were too long for the model's context.

    The ranks of `comm` share the items.
    """
    own = score(task, model, tokenizer, items[comm.rank :: comm.size], batch_size)
    totals = comm.all_gather(np.array(list(own.values()))).sum(axis=0)
    sums = dict(zip(own, totals.tolist(), strict=True))
    return {**task.metrics(sums), "items": int(sums["items"]), "cut": int(sums["cut"])}


def describe_task(task: Task, figures: dict[str, Any]) -> str:
    """One line: the figures, accuracies with their standard error."""
    n, parts = figures["items"], []
    for name in figures.keys() - {"items", "cut"}:
        value = figures[name]
        error = f" ± {math.sqrt(value * (1 - value) / n):.4f}" if name.startswith("acc") else ""
        parts.append(f"{name} {value:.4f}{error}")
    cut = f"; {figures['cut']:,} are longer than the model's context, their ends were read" if figures["cut"] else ""
    return f"{task.name}: {', '.join(sorted(parts))} ({n:,} items{cut})"


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
        choices=WEIGHTS,
        help="bfloat16 measures twice, the second time with such weights, and says what they cost",
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
    # What can be missing is opened before anything is computed.
    questions = {
        name: load(task, getattr(options, name), options.items)
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
    if options.dtype == "bfloat16" and model.backend.device != "cpu" and (lacks := model.backend.lacks("bfloat16")):
        raise ValueError(f"--dtype {lacks}")

    def measure() -> dict[str, Any]:
        results: dict[str, Any] = {}
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

    print(f"{folder}: {model.n_parameters():,} parameters, {model.dtype} on {model.backend.device}", flush=True)
    results = {"model": str(folder), "parameters": model.n_parameters(), **measure()}
    if options.dtype == "bfloat16":
        print("the same with weights in bfloat16:", flush=True)
        model = GPT2.from_pretrained(folder, device=options.device, dtype="bfloat16")
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
