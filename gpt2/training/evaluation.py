"""Evaluates a model: its loss on token data sets, and its results on tasks. The ranks of a job share the work."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from gpt2.language_model import LanguageModel
from gpt2.tokenizer import Tokenizer
from gpt2.training.dataset import TokenDataset
from gpt2.training.tasks import Item, Task, perplexity, score
from tinygrad2 import no_grad
from tinygrad2.distributed import Comm, SoloComm, share
from tinygrad2.not_finite import damage

ALONE = SoloComm()


def summed_loss(
    model: LanguageModel,
    data: TokenDataset,
    windows: range,
    batch_size: int,
    block_size: int,
    show_after: float | None = None,
) -> float:
    """The loss in nats, summed (not averaged, so that sums can be added) over all targets of these windows.

    show_after  the number of seconds after which progress is shown on a terminal, or None for never.
    """
    total = 0.0
    firsts = range(0, len(windows), batch_size)
    with no_grad():
        hidden = None if show_after is not None else True  # for tqdm, None means shown on a terminal
        for first in tqdm(firsts, data.split, unit=" batches", leave=False, delay=show_after or 0, disable=hidden):
            indices = windows[first : first + batch_size]
            total += model.loss(*data.batch(indices, block_size)).item() * len(indices) * block_size
    return total


def mean_loss(
    model: LanguageModel,
    data: TokenDataset,
    batch_size: int,
    block_size: int,
    batches: int,
    comm: Comm = ALONE,
    show_after: float | None = None,
) -> float:
    """The mean loss in nats per token over the first `batches` batches of windows, or all windows if there are fewer.

    Every window has the same weight, even in an incomplete last batch. The windows are divided among the ranks.
    """
    windows = range(min(data.windows(block_size), batches * batch_size))
    own = windows[slice(*share(len(windows), comm.rank, comm.size))]
    shown = show_after if comm.rank == 0 else None
    total = comm.all_gather(np.array(summed_loss(model, data, own, batch_size, block_size, shown))).sum()
    return float(total) / (len(windows) * block_size)


def evaluate_data(
    model: LanguageModel,
    tokenizer: Tokenizer,
    data: TokenDataset,
    batch_size: int,
    block_size: int,
    batches: int | None = None,
) -> dict[str, float]:
    """The results on the first `batches` batches of windows of a data set, by default on all windows.

    loss           in nats per token.
    perplexity     exp(loss).
    bits_per_byte  the number of bits that the model needs to encode the targets, per byte of their text; comparable
                   between tokenizers. The end-of-text token between documents adds bits but no bytes.
    tokens, bytes  the size of the targets.

    Raises ValueError if the data set was prepared with a different tokenizer.
    """
    data_tokenizer = data.tokenizer()
    if not tokenizer.includes(data_tokenizer):
        raise ValueError(
            f"{data.path}: prepared with the tokenizer {data_tokenizer.name}; expected the model's, {tokenizer.name}: "
            "prepare the data with the model's tokenizer"
        )
    count = data.windows(block_size)
    windows = range(count if batches is None else min(count, batches * batch_size))
    length_of = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    length_of[[i for i in (data_tokenizer.end_of_text, tokenizer.end_of_text) if i is not None]] = 0
    tokens, chunk = len(windows) * block_size, 1 << 20
    pieces = (data.read(1 + first, min(chunk, tokens - first)) for first in range(0, tokens, chunk))
    text_bytes = sum(int(length_of[piece].sum()) for piece in pieces)
    nats = summed_loss(model, data, windows, batch_size, block_size, show_after=0)
    if not math.isfinite(nats):
        batch = data.batch(windows[:batch_size], block_size)
        raise ValueError(f"{data.path}: the model's loss is {nats}; {damage(model, lambda: model.loss(*batch))}")
    return {
        "loss": nats / tokens,
        "perplexity": perplexity(nats / tokens),
        "bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
        "tokens": tokens,
        "bytes": text_bytes,
        "block_size": block_size,
    }


def evaluate_task(
    task: Task, model: LanguageModel, tokenizer: Tokenizer, items: Sequence[Item], batch_size: int, comm: Comm = ALONE
) -> dict[str, float]:
    """The task's metrics on these items, the number of items, and the number that exceed the model's context.

    The items are divided among the ranks.
    """
    own = score(task, model, tokenizer, items[comm.rank :: comm.size], batch_size)
    totals = comm.all_gather(np.array(list(own.values()))).sum(axis=0)
    sums = dict(zip(own, totals.tolist(), strict=True))
    return {**task.metrics(sums), "items": int(sums["items"]), "cut": int(sums["cut"])}


def describe_task(task: Task, results: dict[str, float]) -> str:
    """The metrics in one line. Accuracies are followed by their standard error."""
    n, parts = results["items"], []
    for name in results.keys() - {"items", "cut"}:
        value = results[name]
        error = f" ± {math.sqrt(value * (1 - value) / n):.4f}" if name.startswith("acc") else ""
        parts.append(f"{name} {value:.4f}{error}")
    cut = f"; {results['cut']:,} exceed the model's context and were truncated on the left" if results["cut"] else ""
    return f"{task.name}: {', '.join(sorted(parts))} ({n:,} items{cut})"
