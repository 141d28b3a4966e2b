"""The inspector's data: probabilities, attention weights, the pattern of each head, words, and the logit lens.

`inspect` returns the data as JSON for the script pages/inspect.js, and `inspector_page` builds a page from it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpt2.console import visible
from gpt2.generate import NOT_FINITE, KVCache
from gpt2.model import GPT2
from gpt2.page import page, resource
from gpt2.tokenizer import Tokenizer
from gpt2.trace import Trace
from tinygrad2 import Tensor, no_grad
from tinygrad2.checkpoint import JsonObject

CHOICES, NEIGHBOURS, WORDS = 10, 8, 6  # the number of each that is shown
EXACT = 128  # tokens; a longer text gets only the strongest LINKS of each query, and an overview of GRID x GRID
LINKS, GRID = 8, 64
ROWS = 128  # number of positions whose logits are computed at a time
BEAM, LONGEST = 12, 16  # width of the beam search for words, and maximum number of tokens in a word
STANDS_OUT, ENOUGH = 0.2, 3  # the minimum score and number of queries for a pattern to describe a head

# Attention patterns: the name, and what the head attends to. If scores are equal, the first pattern is used.
PATTERNS = {
    "previous": ("previous token", "the token just before"),
    "first": ("first token", "the first token of the text; heads often attend to it when they have nothing to add"),
    "word": ("start of the word", "the token where the current word began: the space before it, or its first token"),
    "same": ("same token earlier", "earlier occurrences of the same token"),
    "induction": (
        "induction",
        "the token that followed the same token earlier; such heads let a model copy a repeated sequence",
    ),
    "itself": ("itself", "the token itself"),
}
TITLE_LENGTH = 60  # maximum number of characters of the text in the page's title
SPREADS = "spreads"


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities
# ---------------------------------------------------------------------------------------------------------------------


def probabilities(logits: np.ndarray) -> np.ndarray:
    """softmax(logits) over the last axis, in float64."""
    p = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return p


def in_chunks(length: int) -> Iterator[slice]:
    """Slices of at most ROWS positions that cover range(length), since an array (T, V) is large."""
    return (slice(first, min(first + ROWS, length)) for first in range(0, length, ROWS))


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` largest values in each row, in descending order of the values."""
    count = min(count, values.shape[-1])
    found = np.argpartition(-values, count - 1, axis=-1)[..., :count]
    order = np.argsort(-np.take_along_axis(values, found, -1), axis=-1, kind="stable")
    return np.take_along_axis(found, order, -1)


def predictions(trace: Trace) -> JsonObject:
    """For each token: its surprisal (`surprise`), which is -log2 of its probability, and its rank. For each position:
    the most probable next tokens with their probabilities. The first token is not predicted, so its entries are
    None."""
    surprise: list[float | None] = [None]
    rank: list[int | None] = [None]
    ids, p = [], []
    for rows in in_chunks(len(trace.tokens)):
        probability = probabilities(trace.logits[rows])
        best = largest(probability, CHOICES)
        ids.append(best)
        p.append(np.take_along_axis(probability, best, -1))
        following = trace.tokens[rows.start + 1 : rows.stop + 1]
        actual = probability[np.arange(len(following)), following]
        with np.errstate(divide="ignore"):
            bits = np.minimum(-np.log2(actual), 1074)  # a probability below the smallest float64 is 0
        surprise += [float(f"{value:.6g}") for value in bits]
        rank += (1 + (probability[: len(following)] > actual[:, None]).sum(axis=-1)).tolist()
    return {
        "surprise": surprise,
        "rank": rank,
        "choices": {"ids": packed(np.concatenate(ids), "int32"), "p": packed(np.concatenate(p), "float32")},
    }


def lens(model: GPT2, trace: Trace) -> JsonObject:
    """The logit lens: the final LayerNorm and the output layer are applied to the residual stream before each layer and
    after the last. Returns the most probable next token and its probability, both (L + 1, T)."""
    streams = [layer.stream for layer in trace.layers] + [trace.stream]
    ids = np.empty((len(streams), len(trace.tokens)), dtype=np.int32)
    p = np.empty(ids.shape, dtype=np.float32)
    for i, stream in enumerate(streams):
        for rows in in_chunks(len(trace.tokens)):
            if i == len(trace.layers):
                logits = trace.logits[rows]
            else:
                x = Tensor(model.backend.asarray(stream[rows], dtype=model.precision.activations))
                with no_grad():
                    logits = model.head(model.ln_f(x)).numpy().astype(np.float32)
            highest = logits.max(axis=-1, keepdims=True)
            ids[i, rows] = logits.argmax(axis=-1)
            p[i, rows] = 1 / np.exp(logits - highest).sum(axis=-1, dtype=np.float64)
    return {"ids": packed(ids, "int32"), "p": packed(p, "float32")}


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def patterns(tokens: np.ndarray, begins_word: np.ndarray) -> dict[str, np.ndarray]:
    """For each of PATTERNS, a boolean mask (query, key) of the keys that each query attends to in this pattern.

    begins_word  (T,), whether each token begins with a character that is not part of a word, such as a space.
    """
    T = len(tokens)
    query, key = np.arange(T)[:, None], np.arange(T)[None]
    start = np.maximum.accumulate(np.where(begins_word, np.arange(T), 0))
    same = tokens[:, None] == tokens[None]
    after_same = np.zeros((T, T), dtype=bool)
    after_same[:, 1:] = same[:, :-1]
    earlier = key < query
    found = {
        "previous": key == query - 1,
        "first": (key == 0) & earlier,
        "word": (key == start[:, None]) & earlier,
        "same": same & earlier,
        "induction": after_same & earlier,
        "itself": (key == query) & (query > 0),
    }
    return {name: found[name] for name in PATTERNS}


def describe_heads(weights: np.ndarray, masks: dict[str, np.ndarray], tokens: np.ndarray) -> list[JsonObject]:
    """Describe each head of a layer, from its weights (H, T, T), the mask of each pattern (T, T), and the ids (T,).

    NAME    for each pattern, [share, even, queries]: the share of attention on its keys, the share under uniform
            attention (both are means over the queries that have such keys), and the number of these queries.
    kind    the pattern with the highest score (share - even) / (1 - even), or SPREADS if no score is high enough.
    spread  the effective number of tokens attended to: 2^(entropy in bits), averaged over the queries.
    most    [id, share, even]: the id in the text whose share exceeds its uniform share by the largest amount.
    """
    T = weights.shape[-1]
    seen = np.arange(1, T + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(weights > 0, weights * np.log2(weights), 0).sum(axis=-1)
    ids, which = np.unique(tokens, return_inverse=True)
    evenly = np.bincount(which, (np.tri(T) / seen[:, None]).mean(axis=0))
    heads: list[JsonObject] = []
    for own, spread in zip(weights, np.exp2(entropy).mean(axis=-1), strict=True):
        shares = np.bincount(which, own.mean(axis=0))
        best = int((shares - evenly).argmax())
        most = [int(ids[best]), round(float(shares[best]), 5), round(float(evenly[best]), 5)]
        heads.append({"kind": SPREADS, "score": 0.0, "spread": round(float(spread), 3), "most": most})
    for name, mask in masks.items():
        queries = np.flatnonzero(mask.any(axis=-1))
        if not len(queries):
            continue
        even = float((mask[queries].sum(axis=-1) / seen[queries]).mean())
        for head, own in zip(heads, weights, strict=True):
            share = float((own[queries] * mask[queries]).sum(axis=-1).mean())
            head[name] = [round(share, 5), round(even, 5), len(queries)]
            score = (share - even) / (1 - even) if even < 1 else 0.0
            if len(queries) >= ENOUGH and score >= STANDS_OUT and score > head["score"]:
                head["kind"], head["score"] = name, round(score, 5)
    return heads


def attention(trace: Trace, masks: dict[str, np.ndarray]) -> JsonObject:
    """The weights of every head, followed in each layer by their mean over the heads, and the description of each
    head."""
    T = len(trace.tokens)
    heads, parts = [], []
    for layer in trace.layers:
        weights = layer.weights()
        heads.append(describe_heads(weights, masks, trace.tokens))
        weights = np.concatenate((weights, weights.mean(axis=0, keepdims=True)))
        parts.append((weights[:, np.tri(T, dtype=bool)],) if T <= EXACT else strongest_links(weights))
    arrays = [np.stack(part) for part in zip(*parts, strict=True)]
    if T <= EXACT:
        return {"heads": heads, "exact": True, "weights": packed(arrays[0], "float32")}
    keys, links, overview = arrays
    return {
        "heads": heads,
        "exact": False,
        "keys": packed(keys, "uint16"),
        "weights": packed(links, "uint8"),
        "overview": packed(overview, "uint8"),
        "grid": GRID,
    }


def strongest_links(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From weights (H, T, T): the keys and values of the LINKS largest weights of each query, (H, T, LINKS), and an
    overview (H, GRID, GRID), the share of attention from each group of queries to each group of keys. Weights are in
    units of 1/255."""
    T = weights.shape[-1]
    keys = largest(weights, LINKS)
    links = np.take_along_axis(weights, keys, -1)
    first = np.linspace(0, T, GRID, endpoint=False).astype(int)
    sizes = np.diff(first, append=T)
    overview = np.add.reduceat(np.add.reduceat(weights, first, axis=2), first, axis=1) / sizes[:, None]
    return keys, np.rint(255 * links), np.rint(255 * overview)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and words
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Vocabulary:
    """The tokens of a model as text, and how they form words.

    tokenizer  the model's tokenizer.
    size       the number of ids in the model, which may be larger than in the tokenizer.
    """

    tokenizer: Tokenizer
    size: int

    @cached_property
    def special(self) -> dict[int, str]:
        """The added tokens by id, such as end-of-text."""
        return {token.id: token.content for token in self.tokenizer.added}

    def token(self, i: int) -> bytes:
        return self.tokenizer.tokens.get(i, b"")

    def label(self, i: int) -> str:
        """A token as text to display: newlines and tabs are shown as symbols, and invisible and incomplete characters
        as escape sequences."""
        if i in self.special:
            return visible(self.special[i])
        if i not in self.tokenizer.tokens:
            return f"<unused {i}>"
        try:
            text = self.token(i).decode("utf-8")
        except UnicodeDecodeError:
            return "".join(chr(b) if 32 < b < 127 else f"\\x{b:02x}" for b in self.token(i))
        text = visible(text.replace("\n", "↵").replace("\t", "⇥"))
        return text.replace("\u200c", "\\u200c").replace("\u200d", "\\u200d")

    @cached_property
    def begins_word(self) -> np.ndarray:
        """(size,), whether each token begins outside a word (with a space or punctuation, or is an added token)."""
        return np.array([i in self.special or not _in_word(self.token(i)[:1]) for i in range(self.size)])

    @cached_property
    def ends_in_word(self) -> np.ndarray:
        """(size,), whether each token ends inside a word, which the next token may continue."""
        return np.array([i not in self.special and _in_word(self.token(i)[-1:]) for i in range(self.size)])

    def word_starts(self, tokens: np.ndarray) -> np.ndarray:
        """(T,), whether a word, or the text between two words, begins at each token."""
        after_word = np.concatenate(([False], self.ends_in_word[tokens[:-1]]))
        starts = self.begins_word[tokens] | ~after_word
        starts[:1] = True
        return starts

    def words(self, tokens: np.ndarray) -> list[slice]:
        """The words that consist of several tokens. A word at the start of the text is excluded, since it is not
        predicted."""
        starts = np.flatnonzero(self.word_starts(tokens))
        ends = np.append(starts[1:], len(tokens))
        return [
            slice(int(start), int(end))
            for start, end in zip(starts, ends, strict=True)
            if start > 0 and end - start > 1 and self.ends_in_word[tokens[start]]
        ]


def _in_word(byte: bytes) -> bool:
    return byte.isalnum() or byte == b"_" or byte >= b"\x80"


def expected_words(model: GPT2, vocabulary: Vocabulary, trace: Trace) -> JsonObject:
    """What the model expected in place of each word that has several tokens, by the position of the word's first token:

    end     the position after its last token.
    begins  the probability that some word begins at this position.
    p       the probability of the word: the product of the probabilities of its tokens and of its end.
    words   [word, probability] of the most probable words that a beam search finds.

    The result is empty if the text has more than EXACT tokens.
    """
    words = vocabulary.words(trace.tokens) if len(trace.tokens) <= EXACT else []
    if not words:
        return {}
    read = KVCache(model, 1, len(trace.tokens))
    with no_grad():
        model.features(trace.tokens[None], cache=read)
    found: JsonObject = {}
    probability = probabilities(trace.logits)
    for word in words:
        tokens = trace.tokens[word]
        p = probability[np.arange(word.start, word.stop) - 1, tokens].prod()
        p *= probability[word.stop - 1, vocabulary.begins_word].sum()
        best = beam_search(model, vocabulary, read, word.start, probability[word.start - 1])
        texts = [[word_label(vocabulary, ids), float(f"{value:.6g}")] for value, ids in best]
        begins = probability[word.start - 1, vocabulary.ends_in_word].sum()
        figures = {"begins": float(f"{begins:.6g}"), "p": float(f"{p:.6g}")}
        found[str(word.start)] = {"end": word.stop, **figures, "words": texts}
    return found


def word_label(vocabulary: Vocabulary, tokens: Sequence[int]) -> str:
    return visible(vocabulary.tokenizer.decode(tokens).strip())


def beam_search(
    model: GPT2, vocabulary: Vocabulary, read: KVCache, start: int, first: np.ndarray
) -> list[tuple[float, list[int]]]:
    """The most probable words at a position, as [(probability, tokens)] in descending order of probability.

    read   the key-value cache of the text.
    start  the position.
    first  the probabilities (V,) of the first token.
    """
    room = min(start + LONGEST, model.config.n_positions) - start
    cache = KVCache(model, 1, start + room)
    for layer, full in zip(cache.layers, read.layers, strict=True):
        layer[:, :, :, :start] = full[:, :, :, :start]
    cache.length = start
    possible = np.where(vocabulary.ends_in_word, first, 0)
    beam = [(float(possible[token]), [int(token)]) for token in largest(possible, BEAM) if possible[token] > 0]
    rows = np.zeros(len(beam), dtype=np.int64)
    finished: list[tuple[float, list[int]]] = []
    for _ in range(room):
        if not beam or (len(finished) >= WORDS and beam[0][0] <= finished[WORDS - 1][0]):
            break
        taken = model.backend.asarray(rows)
        cache.layers = [model.backend.np.take(layer, taken, axis=1) for layer in cache.layers]
        with no_grad():
            last = np.array([tokens[-1:] for _, tokens in beam])
            following = probabilities(model.head(model.features(last, cache=cache)[:, -1]).numpy())
        p = np.array([p for p, _ in beam])[:, None]
        ended = (p[:, 0] * following[:, vocabulary.begins_word].sum(axis=-1)).tolist()
        finished += [(value, tokens) for value, (_, tokens) in zip(ended, beam, strict=True)]
        finished.sort(key=lambda word: -word[0])
        continued = (p * np.where(vocabulary.begins_word | ~vocabulary.ends_in_word, 0, following)).ravel()
        best = [int(i) for i in largest(continued, BEAM) if continued[i] > 0]
        rows = np.array([i // vocabulary.size for i in best], dtype=np.int64)
        beam = [(float(continued[i]), [*beam[i // vocabulary.size][1], i % vocabulary.size]) for i in best]
    return finished[:WORDS]


def neighbours(model: GPT2, vocabulary: Vocabulary, tokens: np.ndarray) -> dict[str, list[list[float]]]:
    """For each id in the text, the [id, cosine] pairs of the tokens with the most similar embeddings."""
    table = model.wte.weight.numpy().astype(np.float32)[: vocabulary.tokenizer.vocab_size]
    table = table / np.maximum(np.linalg.norm(table, axis=-1, keepdims=True), 1e-30)
    ids = np.unique(tokens)
    found: dict[str, list[list[float]]] = {}
    for rows in in_chunks(len(ids)):
        cosine = table[ids[rows]] @ table.T
        cosine[np.arange(len(cosine)), ids[rows]] = -2  # exclude the token itself
        for i, best, own in zip(ids[rows], largest(cosine, min(NEIGHBOURS, len(table) - 1)), cosine, strict=True):
            found[str(i)] = [[int(j), round(float(own[j]), 4)] for j in best]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The data of a page
# ---------------------------------------------------------------------------------------------------------------------


def inspect(model: GPT2, tokenizer: Tokenizer, tokens: Sequence[int], prompt: int, name: str) -> JsonObject:
    """The data of the page for a text: the JSON object that the page's script, pages/inspect.js, reads.

    tokens  the ids, at most the length of the model's context.
    prompt  the number of ids in the prompt; the model generated the others.
    name    the name of the model.
    Raises ValueError, which names the first result that is not finite.
    """
    trace = model.trace(tokens)
    check_activations(trace)
    vocabulary = Vocabulary(tokenizer, model.config.vocab_size)
    predicted, seen = predictions(trace), lens(model, trace)
    near = neighbours(model, vocabulary, trace.tokens)
    shown = {int(i) for i in trace.tokens} | {int(j) for pairs in near.values() for j, _ in pairs}
    shown |= {*unpacked(predicted["choices"]["ids"]).ravel().tolist(), *unpacked(seen["ids"]).ravel().tolist()}
    sizes = [len(vocabulary.token(int(i))) for i in trace.tokens]
    bits = sum(value or 0.0 for value in predicted["surprise"])
    return {
        "model": {
            "name": visible(name),
            "parameters": model.n_parameters(),
            "layers": len(trace.layers),
            "heads": model.config.n_head,
            "width": model.config.n_embd,
            "context": model.config.n_positions,
            "vocabulary": model.config.vocab_size,
        },
        "text": visible(tokenizer.decode(trace.tokens)),
        "tokens": trace.tokens.tolist(),
        "prompt": prompt,
        "labels": {str(i): vocabulary.label(i) for i in sorted(shown)},
        "bits_per_byte": bits / sum(sizes[1:]) if sum(sizes[1:]) else None,
        **predicted,
        "words": expected_words(model, vocabulary, trace),
        "patterns": {key: list(texts) for key, texts in PATTERNS.items()},
        "attention": attention(trace, patterns(trace.tokens, vocabulary.begins_word[trace.tokens])),
        "lens": seen,
        "sizes": {
            "stream": packed(np.stack([rms(layer.stream) for layer in trace.layers] + [rms(trace.stream)]), "float32"),
            "attention": packed(np.stack([rms(layer.attention) for layer in trace.layers]), "float32"),
            "mlp": packed(np.stack([rms(layer.mlp) for layer in trace.layers]), "float32"),
        },
        "neighbours": near,
    }


def rms(x: np.ndarray | None) -> np.ndarray:
    """The root mean square of each row: (T, C) -> (T,)."""
    assert x is not None
    return np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=-1))


def packed(values: np.ndarray, dtype: str) -> JsonObject:
    """An array as JSON: its shape, its dtype, and its little-endian bytes in base64."""
    data = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"shape": list(values.shape), "dtype": dtype, "base64": base64.b64encode(data).decode("ascii")}


def unpacked(data: JsonObject) -> np.ndarray:
    """The inverse of `packed`."""
    dtype = np.dtype(data["dtype"]).newbyteorder("<")
    return np.frombuffer(base64.b64decode(data["base64"]), dtype).reshape(data["shape"])


def check_activations(trace: Trace) -> None:
    """Raise ValueError, which names the first result that is not finite, if there is one."""
    for i, layer in enumerate(trace.layers, 1):
        for name, values in (("attention", layer.attention), ("MLP", layer.mlp)):
            if values is not None and not np.isfinite(values).all():
                raise ValueError(
                    f"the {name} of layer {i} has values that are not finite; the model's weights are damaged"
                )
    if not np.isfinite(trace.logits).all():
        raise ValueError(NOT_FINITE.replace("generate", "inspect"))


def inspector_page(data: JsonObject) -> str:
    """The page for a text, from the data that `inspect` returns."""
    text = " ".join(data["text"].split())
    shortened = text if len(text) <= TITLE_LENGTH else text[:TITLE_LENGTH].rstrip() + "\u2026"
    script = resource("inspect.js") + resource("inspect_page.js")
    return page(f"Inside the model: {shortened}", resource("inspect.html"), resource("inspect.css"), script, data)
