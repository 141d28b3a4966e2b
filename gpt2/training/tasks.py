"""Zero-shot tasks: HellaSwag and LAMBADA. Both score the endings of a context by the model's loss.

HellaSwag  Zellers et al., arXiv:1905.07830: decide which of four endings continues a text. In the completion style of
           Karpathy's build-nanogpt and llm.c, each ending is appended to the context, and the answer is the ending with
           the lowest loss, summed over its tokens (acc) or averaged (acc_norm). GPT-2 124M has acc 0.2859 and acc_norm
           0.2955.
LAMBADA    Paperno et al., arXiv:1606.06031, in the version that OpenAI published with GPT-2: predict the last word of a
           passage. acc is the fraction of words that greedy decoding predicts; perplexity is exp(mean nats per word).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gpt2.language_model import LanguageModel
from gpt2.tokenizer import Tokenizer
from tinygrad2 import machine, no_grad
from tinygrad2.checkpoint import JsonObject
from tinygrad2.files import atomic_write
from tinygrad2.not_finite import damage

LINE_BYTES = 1 << 20  # maximum length of a line in a task's file; in the published files it is less than 4,000
TIMEOUT = 30  # seconds to wait for a response from a server


class Item(NamedTuple):
    """One question: a context, possible endings (each with a leading space), and the index of the correct one."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Task:
    """A published set of questions.

    url, sha256  the URL and the checksum of its file.
    item         creates an Item from the JSON object in a line; raises an error other than OSError if it is invalid.
    expected     the format of a line, for the error message.
    metrics      computes the metrics from the sums that `score` returns.
    """

    name: str
    url: str
    sha256: str
    item: Callable[[JsonObject], Item]
    expected: str
    metrics: Callable[[dict[str, float]], dict[str, float]]


Questions = list[tuple[Task, list[Item]]]  # the tasks that are scored, with their items


def _hellaswag_item(line: JsonObject) -> Item:
    context, endings, label = line["ctx"], line["endings"], int(line["label"])  # the label is a string in some copies
    if not isinstance(context, str) or not isinstance(endings, list) or not 0 <= label < len(endings):
        raise ValueError
    return Item(context, tuple(" " + ending for ending in endings), label)


def _lambada_item(line: JsonObject) -> Item:
    context, word = line["text"].rstrip().rsplit(" ", 1)
    return Item(context, (" " + word,), 0)


TASKS = {
    task.name: task
    for task in (
        Task(
            "hellaswag",
            "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
            "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
            _hellaswag_item,
            '{"ctx": text, "endings": [text, ...], "label": the index of the correct ending}',
            lambda s: {"acc_norm": s["right_by_mean"] / s["items"], "acc": s["right_by_sum"] / s["items"]},
        ),
        Task(
            "lambada",
            "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
            "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
            _lambada_item,
            '{"text": a passage of several words}',
            lambda s: {"acc": s["greedy"] / s["items"], "perplexity": perplexity(s["nats"] / s["items"])},
        ),
    )
}


def perplexity(nats: float) -> float:
    """e^nats, limited to the largest float."""
    return math.exp(min(nats, 709.0))


def cache_folder() -> Path:
    """The folder for downloads: tinygrad2/ in XDG_CACHE_HOME, which defaults to ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or machine.home() / ".cache") / "tinygrad2"


def load_items(task: Task, file: str | Path | None = None, limit: int | None = None) -> list[Item]:
    """Load the task's items from `file`, or by default from the published file, which is downloaded on first use.

    limit  the maximum number of items; they are evenly spaced in the file, which may be sorted.

    Raises OSError if the file cannot be read or downloaded, and ValueError, which names the line, if one is invalid.
    """
    path = Path(file) if file else _download(task)
    items, number = [], 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LINE_BYTES + 1), b""), 1):
                if len(line) > LINE_BYTES:
                    raise ValueError(f"more than {LINE_BYTES} bytes")
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    items.append(task.item(json.loads(line.decode())))  # given bytes, json would guess the encoding
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise ValueError(f"{path}: line {number} is not a question of {task.name}; expected {task.expected}") from None
    if not items:
        raise ValueError(f"{path}: no questions in this file; expected lines of {task.expected}")
    count = min(limit or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _download(task: Task) -> Path:
    """The published file in the cache, downloaded and verified if it is missing."""
    path = cache_folder() / task.url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    sha = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(path, suffix=str(os.getpid())) as partial,  # another process may be downloading the same file
            urllib.request.urlopen(task.url, timeout=TIMEOUT) as response,
            partial.open("wb") as out,
        ):
            size = int(response.headers.get("Content-Length", 0))
            with tqdm(desc=path.name, total=size or None, unit="B", unit_scale=True, disable=None) as progress:
                while chunk := response.read(1 << 16):
                    sha.update(chunk)
                    progress.update(out.write(chunk))
            if sha.hexdigest() != task.sha256:
                raise OSError("the downloaded data is not the published file: its checksum differs")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise OSError(
            f"{task.name}: {task.url} could not be downloaded ({reason}); connect to the network once, save the "
            f"file as {path}, or set XDG_CACHE_HOME to another folder with downloads"
        ) from None
    return path


class _Row(NamedTuple):
    """The token ids of a context and an ending. The ending has `length` ids. `cut` is whether the beginning was removed
    so that the rest fits in the model's context."""

    ids: np.ndarray
    length: int
    cut: bool


def _rows(item: Item, tokenizer: Tokenizer, context_length: int) -> list[_Row]:
    """One row per ending. The last token is only a target, so a row may have one token more than the context."""
    before = tokenizer.encode(item.context)
    if len(before) == 0:
        before = np.array([tokenizer.begin], dtype=before.dtype)
    rows = []
    for ending in item.endings:
        after = tokenizer.encode(ending)
        full = np.concatenate((before, after))
        ids = full[-(context_length + 1) :]
        rows.append(_Row(ids, min(len(after), len(ids) - 1), len(ids) < len(full)))
    return rows


def score(
    task: Task, model: LanguageModel, tokenizer: Tokenizer, items: Sequence[Item], batch_size: int
) -> dict[str, float]:
    """Sums over the items, from which the task computes its metrics. Sums over disjoint sets of items can be added.

    items          the number of items.
    right_by_sum   the number of items whose correct ending has the lowest total loss.
    right_by_mean  the number of items whose correct ending has the lowest loss per token.
    nats           the total loss of the correct endings.
    greedy         the number of correct endings that greedy decoding would generate.
    cut            the number of items whose beginning was removed to fit the model's context.

    batch_size  the number of endings per batch, longest first. They are padded on the right, which does not affect the
                results of a causal model at earlier positions.
    Raises ValueError if a loss is not finite.
    """
    rows = [_rows(item, tokenizer, model.config.n_positions) for item in items]
    flat = [row for group in rows for row in group]
    order = sorted(range(len(flat)), key=lambda i: -len(flat[i].ids))
    nats, greedy = np.empty(len(flat)), np.empty(len(flat))
    for first in tqdm(range(0, len(flat), batch_size), task.name, unit=" batches", leave=False, disable=None):
        chosen = order[first : first + batch_size]
        nats[chosen], greedy[chosen] = _score_rows(model, [flat[i] for i in chosen])
    if not np.isfinite(nats).all():
        raise ValueError(f"{task.name}: the model's losses are not finite; {damage(model)}")
    sums = dict.fromkeys(("items", "right_by_sum", "right_by_mean", "nats", "greedy", "cut"), 0.0)
    first = 0
    for item, group in zip(items, rows, strict=True):
        losses, lengths = nats[first : first + len(group)], [row.length for row in group]
        sums["items"] += 1
        sums["right_by_sum"] += int(np.argmin(losses)) == item.label
        sums["right_by_mean"] += int(np.argmin(losses / lengths)) == item.label
        sums["nats"] += float(losses[item.label])
        sums["greedy"] += bool(greedy[first + item.label] == lengths[item.label])
        sums["cut"] += any(row.cut for row in group)
        first += len(group)
    return sums


def _score_rows(model: LanguageModel, rows: Sequence[_Row]) -> tuple[np.ndarray, np.ndarray]:
    """The loss in nats of each row's ending, and the number of its tokens that greedy decoding would choose, both (B,).

    The output layer is by far the widest layer, so it is computed only at the positions of the endings.
    """
    lengths = np.array([row.length for row in rows])
    tokens = np.zeros((len(rows), max(len(row.ids) for row in rows) - 1), dtype=np.int64)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row.ids) - 1] = row.ids[:-1]
    line_of = np.repeat(np.arange(len(rows)), lengths)
    position = np.concatenate([np.arange(len(row.ids) - 1 - row.length, len(row.ids) - 1) for row in rows])
    target = np.concatenate([row.ids[-row.length :] for row in rows]).astype(np.int64)
    upload = model.backend.upload
    with no_grad():
        x = model.features(tokens)[upload(line_of), upload(position)]  # (N, C), for the N tokens in all endings
        logits = model.head(x)  # (N, V)
        shifted = logits - logits.max(axis=-1, keepdims=True)  # a large common offset would reduce the precision
        target_logits = shifted[upload(np.arange(len(target))), upload(target)]
        losses = (shifted.exp().sum(axis=-1).log() - target_logits).numpy().astype(np.float64)
        greedy = target_logits.numpy() == 0
    starts = np.cumsum(lengths) - lengths
    return np.add.reduceat(losses, starts), np.add.reduceat(greedy.astype(np.float64), starts)
