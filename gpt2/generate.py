"""Text generation: the key-value cache, sampling, and streaming."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, TypedDict, Unpack

import numpy as np

from gpt2.cpu_decode import CpuDecoder
from gpt2.decode import Decoder, explained
from gpt2.language_model import LanguageModel
from gpt2.tokenizer import Tokenizer
from tinygrad2 import Key, Tensor, no_grad, random
from tinygrad2.array import Array
from tinygrad2.not_finite import damage


class KVCache:
    """Keys and values of the tokens processed so far, so that each token is processed only once.

    layers   one array (2, B, H, capacity, D) per layer: keys, then values.
    length   the number of positions in use.
    decoder  processes the next token of each text in one call on a CPU, or in one kernel launch on a GPU if the model's
             `fused_decode` is set; None if this is not supported.
    """

    def __init__(self, model: LanguageModel, batch: int, capacity: int):
        shapes = model.cache_shapes(batch, capacity)
        self.layers: list[Array] = [model.backend.zeros(shape, model.precision.activations) for shape in shapes]
        self.length, self.capacity = 0, capacity
        self.decoder: Decoder | CpuDecoder | None = Decoder.fitting(model, self) or CpuDecoder.fitting(model, self)

    def greedy(self, tokens: np.ndarray, most: int, choices: int) -> Iterator[np.ndarray]:
        """Continue `tokens` (B,) greedily, with the first `choices` ids. Yields up to `most` tokens of each text, or
        fewer if the cache becomes full. Requires a decoder on a GPU (see Decoder.greedy)."""
        assert isinstance(self.decoder, Decoder)
        first, count = self.length, min(most, self.capacity - self.length)
        with explained(self.decoder):
            for found in self.decoder.greedy(tokens, first, count, choices):
                self.length += 1
                yield found


def next_logits(model: LanguageModel, tokens: np.ndarray, cache: KVCache | None = None) -> Tensor:
    """The logits of the token that follows tokens (B, T): (B, V).

    cache  keys and values of the preceding tokens; those of `tokens` are appended.
    """
    if cache is not None and cache.decoder and tokens.shape[1:] == (1,):
        logits = cache.decoder(tokens[:, 0], cache.length)
        cache.length += 1
        return Tensor(logits)
    return model.head(model.features(tokens, cache=cache)[:, -1])


NOT_FINITE = "generate: the model's logits are not finite numbers"


Ends = int | Collection[int] | None  # the id or ids that end a text


class Sampling(TypedDict, total=False):
    """The keyword arguments of `generate` that control sampling."""

    samples: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    cache: bool


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError if a sampling parameter is out of range."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top-k is {top_k}; expected 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top-p is {top_p}; expected 0 < top-p <= 1")


BUCKETS = 1 << 12  # 256 buckets for each of the 16 powers of 2 up to the largest distance from the maximum


def choose(
    logits: np.ndarray,
    draws: np.ndarray,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:
    """Sample the next token of each row: logits (B, V), draws (B,) uniform in [0, 1) -> (B,) int64.

    temperature  divides the logits; 0 is greedy: the most probable token.
    top_k        sample only from the k most probable tokens (and any that tie with the k-th).
    top_p        among these, sample only from the smallest set of most probable tokens whose probabilities sum to p or
                 more (nucleus sampling, arXiv:1904.09751, section 3.1).
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return np.argmax(logits, axis=-1)
    return np.array([_choose(*row, temperature, top_k, top_p) for row in zip(logits, draws, strict=True)])


def _choose(logits: np.ndarray, draw: float, temperature: float, top_k: int | None, top_p: float | None) -> np.integer:
    """The first token, in descending order of probability, whose cumulative probability exceeds `draw`."""
    if few := top_k is not None and top_k < len(logits):
        kept = np.flatnonzero(logits >= _kth_largest(logits, top_k))
        logits = logits[kept]
    # The maximum is subtracted first, so that division by a tiny temperature does not overflow. exp is computed in
    # float32, the dtype of the logits, because this is faster than float64.
    with np.errstate(over="ignore"):
        scaled = ((logits - logits.max()) / np.float64(temperature)).astype(logits.dtype)
    weights, buckets, values = np.exp(scaled), _buckets(scaled), logits if few else scaled
    total = weights.sum(dtype=np.float64)
    sums = np.cumsum(np.bincount(buckets, weights)) / total

    def find(share: float, side: Literal["left", "right"]) -> tuple[np.integer, float]:
        """The token at which the cumulative probability reaches (left) or exceeds (right) `share`, and that cumulative
        probability."""
        last = np.searchsorted(sums, sums[-1])  # the last bucket whose probability is not 0
        bucket = int(min(np.searchsorted(sums, share, side), last))
        tokens = np.flatnonzero(buckets == bucket)
        tokens = tokens[np.argsort(-values[tokens], kind="stable")]  # equal values are in the order of their indices
        inside = (sums[bucket - 1] if bucket else 0) + np.cumsum(weights[tokens].astype(np.float64) / total)
        rank = min(int(np.searchsorted(inside, share, side)), int((weights[tokens] > 0).sum()) - 1)
        return tokens[rank], inside[rank]

    if top_p is not None:
        end = find(top_p, "left")[1]
        draw = min(draw * end, np.nextafter(end, 0))
    token, _ = find(draw, "right")
    return kept[token] if few else token


def _kth_largest(values: np.ndarray, k: int) -> np.floating:
    """The k-th largest number. For a small k, numbers below a bound are removed first, since np.partition of all
    numbers is slow."""
    groups = values[: len(values) // (2 * k) * 2 * k].reshape(-1, 2 * k)
    if len(groups) > 1:
        values = values[values >= np.partition(groups.max(axis=0), -k)[-k]]
    return np.partition(values, -k)[-k]


def _buckets(scaled: np.ndarray) -> np.ndarray:
    """The bucket of each token. The buckets are in descending order of `scaled`, whose maximum is 0, and few tokens
    share a bucket. Only the tokens in one or two buckets are sorted, since sorting the entire vocabulary takes
    milliseconds.

    A bucket is identified by the upper bits of a float32: the exponent and 8 bits of the fraction."""
    distance = np.abs(scaled, dtype=np.float32)
    upper = np.minimum(distance, np.float32(104), out=distance).view(np.uint32)  # exp(-104) is 0
    upper >>= np.uint32(15)
    first = np.uint32(max(0, int(upper.max()) - BUCKETS + 1))
    np.maximum(upper, first, out=upper)
    upper -= first
    return upper.astype(np.intp)


def _not_finite(model: LanguageModel, tokens: np.ndarray) -> ValueError:
    """The error for logits that are not finite; it names the damaged tensor."""
    return ValueError(f"{NOT_FINITE}; {damage(model, lambda: next_logits(model, tokens, None))}")


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    never: Sequence[int] = (),
    cache: bool = True,
    first_step: int = 0,
    on_logits: Callable[[np.ndarray], object] | None = None,
) -> Iterator[np.ndarray]:
    """Continue a prompt of token ids. Yields the next token of every sample, (samples,) int64, `max_tokens` times.

    If the text becomes longer than the model's context, its first half is dropped and the rest is processed again.
    The token of sample s at step t is drawn with the random number (seed, t, s), so the same seed gives the same text
    for any number of samples.

    vocab_size  sample only from the first vocab_size ids, since a padded model has more ids than its tokenizer.
    never       ids below vocab_size that are never sampled, because they are not in the tokenizer's vocabulary.
    cache       False processes the entire text again for every token, which is slow; used for comparison in tests.
    first_step  the number t of the first step. To continue a text that was interrupted after t tokens as if it had
                not been interrupted, pass t and the same seed.
    on_logits   called with the logits (samples, vocab_size) of each step before its tokens are yielded.

    Raises ValueError if the prompt is empty or the model's logits are not finite, and OSError if the GPU fails in the
    kernel of gpt2/decode.cu.
    """
    check_sampling(temperature, top_k, top_p)
    if len(prompt) == 0:
        raise ValueError("generate: the prompt has no tokens; start with the end-of-text token instead")
    if samples < 1 or max_tokens < 0:
        raise ValueError(f"generate: {samples} samples of {max_tokens} tokens; expected at least 1 and 0")
    context = model.config.n_positions
    seen = np.tile(np.asarray(prompt, dtype=np.int64)[-context:], (samples, 1))
    state = _new_cache(model, seen, max_tokens) if cache else None
    step = 0
    while step < max_tokens:
        unread = seen if state is None else seen[:, state.length :]
        with no_grad(), explained(None if state is None else state.decoder):
            logits = next_logits(model, unread, state).numpy()[:, :vocab_size]
        logits = logits.astype(np.float32) if logits.dtype.itemsize < 4 else logits
        if not np.isfinite(logits).all():
            raise _not_finite(model, seen)
        if on_logits is not None:
            on_logits(logits)
        if len(never):
            logits = logits.copy()
            logits[:, never] = -np.inf
        key = Key(seed, first_step + step, site=random.SAMPLING_SITE)
        draws = np.zeros(samples) if temperature == 0 else random.uniform(key, samples)
        token = choose(logits, draws, temperature, top_k, top_p)
        yield token
        step, seen = step + 1, np.concatenate((seen, token[:, None]), axis=1)
        direct = on_logits is None and not len(never)
        if temperature == 0 and state is not None and isinstance(state.decoder, Decoder) and direct:
            choices = vocab_size or model.config.vocab_size
            for following in state.greedy(token, max_tokens - step, choices):
                if following.min() < 0:
                    raise _not_finite(model, seen)
                yield following
                step, seen = step + 1, np.concatenate((seen, following[:, None]), axis=1)
        if seen.shape[1] > context:
            seen = seen[:, -max(1, context // 2) :]
            if state is not None:
                del state  # free its memory before the next cache is allocated
                state = _new_cache(model, seen, max_tokens - step)


def _new_cache(model: LanguageModel, seen: np.ndarray, more: int) -> KVCache:
    samples, length = seen.shape
    return KVCache(model, samples, min(model.config.n_positions, length + more))


def complete(
    model: LanguageModel, tokens: Sequence[int], max_tokens: int, stop: Ends = None, **sampling: Unpack[Sampling]
) -> list[list[int]]:
    """Continue `tokens`, a sequence of ids. Returns the new ids of each sample, up to but not including the first id
    that is `stop` or in `stop` (such as end-of-text).

    sampling  arguments of `generate`, which yields tokens as they are sampled.
    """
    rows: list[list[int]] = [[] for _ in range(sampling.get("samples", 1))]
    ended = [False] * len(rows)
    ends = () if stop is None else (stop,) if isinstance(stop, int) else stop
    for chosen in generate(model, tokens, max_tokens, **sampling):
        for i, token in enumerate(chosen.tolist()):
            ended[i] = ended[i] or token in ends
            if not ended[i]:
                rows[i].append(token)
        if all(ended):
            break
    return rows


class TextPieces:
    """Decodes the tokens of one sample incrementally, into pieces of text that are final.

    The text ends at one of the ids `ends`, or before a `stop` string. If several stop strings occur, the one that is
    complete first counts, regardless of how the text is divided into tokens. Bytes of an incomplete character, and text
    that may be the start of a stop string, are held back until more tokens arrive.

    ended    whether the text has ended; further tokens must not be added.
    decoded  the number of characters in all tokens added, including those held back.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int], stop: Sequence[str] = ()):
        self.ended, self.decoded = False, 0
        self._tokenizer, self._ends, self._stop = tokenizer, ends, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, token: int) -> str:
        """Add a token. Returns the text that is now final."""
        self.ended = token in self._ends
        data = b"" if self.ended else self._tokenizer.decode_bytes([token])
        new = self._decoder.decode(data, final=self.ended)
        text = self._held + new
        self.decoded += len(new)
        found = _stop_at(text, self._stop)
        if found is not None or self.ended:
            self.ended, self._held = True, ""
            return text[:found]
        ready, self._held = _split_at_stop(text, self._stop)
        return ready

    def after(self, data: bytes) -> None:
        """Continue a text that ends with `data`, whose last bytes may be the start of a character."""
        self._decoder.decode(data)

    @property
    def holding(self) -> bool:
        """Whether text or bytes are held back."""
        return bool(self._held or self._decoder.getstate()[0])

    def finish(self) -> str:
        """The text that is still held back after the last token."""
        return "" if self.ended else self._held + self._decoder.decode(b"", final=True)


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    stop: Sequence[str] = (),
    **sampling: Unpack[Sampling],
) -> Iterator[tuple[int, str]]:
    """Continue a prompt, and yield (sample, piece of text) as soon as a piece is final (see TextPieces).

    A sample ends at one of `end_ids`, before a `stop` string, or after `max_tokens`.
    """
    ends, size, never = end_ids(model, tokenizer), tokenizer.vocab_size, tokenizer.unused_ids
    texts = [TextPieces(tokenizer, ends, stop) for _ in range(sampling.get("samples", 1))]
    for tokens in generate(model, prompt, max_tokens, vocab_size=size, never=never, **sampling):
        for i, text in enumerate(texts):
            if not text.ended and (piece := text.add(int(tokens[i]))):
                yield i, piece
        if all(text.ended for text in texts):
            return
    for i, text in enumerate(texts):
        if piece := text.finish():
            yield i, piece


def begin_id(model: LanguageModel, tokenizer: Tokenizer) -> int:
    """The id that begins a text without a prompt, from the model's config or else from the tokenizer."""
    known = getattr(model.config, "begin_id", None)
    return tokenizer.begin if known is None else known


def end_ids(model: LanguageModel, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text, from the model's config or else from the tokenizer."""
    return getattr(model.config, "end_ids", ()) or tokenizer.end_ids


def sample_text(model: LanguageModel, tokenizer: Tokenizer, seed: int) -> str:
    """Generate a short text without a prompt, for the evaluations of a training run."""
    pieces = stream_text(model, tokenizer, [begin_id(model, tokenizer)], 160, temperature=0.8, top_k=50, seed=seed)
    return "".join(piece for _, piece in pieces).strip()


def _stop_at(text: str, stop: Sequence[str]) -> int | None:
    """The start of the stop string that ends first in the text; None if there is none."""
    found = ((at + len(s), at) for s in stop if (at := text.find(s)) >= 0)
    return min(found, default=(0, None))[1]


def _split_at_stop(text: str, stop: Sequence[str]) -> tuple[str, str]:
    """Split a text into its final part and an end that may be the start of a stop string."""
    for length in range(min(len(text), max(map(len, stop), default=0)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return text[:-length], text[-length:]
    return text, ""
