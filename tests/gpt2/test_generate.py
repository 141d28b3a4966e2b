"""gpt2/generate.py: the key-value cache, token selection, and streaming text."""

import dataclasses
import itertools

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, Tokenizer
from gpt2.generate import KVCache, begin_id, choose, complete, end_ids, generate, next_logits, stream_text
from tinygrad2 import no_grad


def make_model(vocab_size=61, n_positions=16, scale=8.0, **sizes):
    config = GPT2Config(
        **{"n_embd": 32, "n_layer": 2, "n_head": 4, **sizes}, vocab_size=vocab_size, n_positions=n_positions
    )
    model = GPT2(config, seed=1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data * scale  # far from uniform, so that a wrong position is detected
    return model


@pytest.mark.parametrize("pieces", [(16,), (1,) * 16, (5, 1, 7, 3), (15, 1)])
def test_features_with_the_cache_equal_those_without(pieces):
    model = make_model()
    tokens = np.random.default_rng(0).integers(0, 61, (3, 16))
    cache = KVCache(model, batch=3, capacity=16)
    with no_grad():
        plain = model.features(tokens).numpy()
        first = 0
        for n in pieces:
            part = model.features(tokens[:, first : first + n], cache=cache).numpy()
            np.testing.assert_allclose(part, plain[:, first : first + n], rtol=0, atol=2e-5)
            first += n
    assert cache.length == 16


def test_the_cache_rejects_tokens_beyond_its_capacity_and_the_context():
    model = make_model()
    tokens = np.zeros((1, 9), dtype=np.int64)
    with no_grad():
        with pytest.raises(ValueError, match="9 positions needed; the cache has space for 8"):
            model.features(tokens, cache=KVCache(model, 1, 8))
        cache = KVCache(model, 1, 32)
        model.features(tokens, cache=cache)
        with pytest.raises(ValueError, match="18 tokens given; the model's context is 16"):
            model.features(tokens, cache=cache)


def test_recording_gradients_with_a_cache_is_rejected():
    model = make_model()
    with pytest.raises(RuntimeError, match="no_grad"):
        model.features(np.zeros((1, 3), dtype=np.int64), cache=KVCache(model, 1, 8))


@pytest.mark.parametrize("prompt", [[3], [1, 2, 3], list(range(16)), list(range(40))])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "seed": 5}])
def test_the_cache_does_not_change_the_text_even_beyond_the_context(prompt, sampling):
    model = make_model()
    cached = model.generate(prompt, 40, samples=2, **sampling)
    assert cached == model.generate(prompt, 40, samples=2, cache=False, **sampling)
    assert [len(row) for row in cached] == [40, 40]


def test_the_second_half_of_the_context_is_reprocessed_when_it_is_full():
    model = make_model(n_positions=8)
    seen, expected = [1, 2, 3], []
    for _ in range(20):
        with no_grad():
            expected.append(int(next_logits(model, np.array([seen])).numpy().argmax()))
        seen.append(expected[-1])
        seen = seen if len(seen) <= 8 else seen[-4:]
    assert model.generate([1, 2, 3], 20, temperature=0) == [expected]


def test_generation_with_a_context_of_one_token():
    model = make_model(n_positions=1)
    assert len(model.generate([1, 2], 3, temperature=0)[0]) == 3


def test_samples_depend_on_the_seed_but_not_on_the_number_of_samples():
    model = make_model(scale=2.0)
    one, three = (model.generate([1], 30, samples=n, seed=7) for n in (1, 3))
    assert one[0] == three[0]
    assert len({tuple(row) for row in three}) == 3
    assert model.generate([1], 30, seed=8) != one


def test_generate_stops_at_the_stop_token_without_returning_it():
    model = make_model()
    free = model.generate([1, 2, 3], 40, temperature=0)[0]
    stop = free[10]
    assert model.generate([1, 2, 3], 40, stop=stop, temperature=0) == [free[: free.index(stop)]]


def test_generate_rejects_invalid_arguments():
    model = make_model()
    for arguments, message in [
        (([], 3), "no tokens"),
        (([1], -1), "at least 1 and 0"),
        (([61], 3), "tokens contain 61"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(*arguments)
    with pytest.raises(ValueError, match="at least 1 and 0"):
        next(generate(model, [1], 3, samples=0))


# Token selection


def frequencies(logits, n=20_000, **sampling):
    draws = (np.arange(n) + 0.5) / n  # evenly spaced, so that frequencies equal the probabilities up to 1 / n
    tokens = choose(np.tile(np.asarray(logits, dtype=np.float32), (n, 1)), draws, **sampling)
    return np.bincount(tokens, minlength=len(logits)) / n


LOGITS = np.log([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-30}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, np.array([1, 16, 4, 9]) / 30),
        ({"temperature": 1e9}, [0.25] * 4),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_choose_draws_with_the_expected_probabilities(sampling, expected):
    np.testing.assert_allclose(frequencies(LOGITS, **sampling), expected, atol=2e-4)


def test_choose_never_draws_a_token_with_probability_zero():
    logits = np.array([[-np.inf, 0.0, -np.inf, 0.0]])
    for draw in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        assert choose(logits, np.array([draw]))[0] in (1, 3)


def by_definition(logits, draw, top_k=None, top_p=None):
    """Choose a token by sorting the entire vocabulary, which would be too slow for generation."""
    order = np.argsort(-logits, kind="stable")
    if top_k is not None:
        order = order[logits[order] >= logits[order[top_k - 1]]]
    p = np.exp(logits[order].astype(np.float64) - logits.max())
    p /= p.sum()
    if top_p is not None:
        p = p[np.cumsum(p) - p < top_p]
        p /= p.sum()
    return order[np.searchsorted(np.cumsum(p), draw, side="right")]


@pytest.mark.parametrize("spread", [0.01, 1, 10])  # 0.01 is almost uniform: half of the vocabulary is needed
@pytest.mark.parametrize("sampling", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 2000, "top_p": 0.5}], ids=str)
def test_choose_equals_its_definition(spread, sampling):
    R = np.random.default_rng(0)
    logits = (spread * R.standard_normal((20, 5000))).astype(np.float32)
    logits[::2] = np.round(logits[::2], 1)  # many ties; the smaller id comes first
    draws = R.random(20)
    expected = [by_definition(*row, **sampling) for row in zip(logits, draws, strict=True)]
    assert choose(logits, draws, **sampling).tolist() == expected


def by_sorting(logits, draw, temperature, top_k=None, top_p=None):
    """An implementation of choose for one row that sorts the entire vocabulary and uses the same exponentials."""
    scaled = ((logits - logits.max()) / np.float64(temperature)).astype(logits.dtype)
    if top_k is not None and top_k < len(logits):
        order = np.argsort(-logits, kind="stable")
        order = order[logits[order] >= logits[order[top_k - 1]]]
    else:
        order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order]).astype(np.float64)
    sums = np.cumsum(weights / weights.sum())
    if top_p is not None:
        sums = sums[: np.searchsorted(sums, top_p) + 1]
        draw *= sums[-1]
    rank = min(np.searchsorted(sums, draw, side="right"), (weights[: len(sums)] > 0).sum() - 1)
    return order[rank]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [1, 2, 7, 1009, 50257])
def test_choose_equals_sorting_the_vocabulary(seed, size):
    """Random logits of different spreads, with ties and -inf, and random options. (Most sizes are prime: otherwise a
    sum of equal probabilities could equal top_p, and rounding would determine the result.)"""
    R = np.random.default_rng([seed, size])
    logits = (R.choice([0, 1e-6, 1e-3, 0.3, 1, 3, 10, 100]) * R.standard_normal(size)).astype(R.choice(["f", "d"]))
    if seed % 3 == 0:
        logits = np.round(logits, R.integers(0, 2))
    if seed % 4 == 0:
        logits[R.random(size) < R.choice([0.1, 0.9])] = -np.inf
        logits[R.integers(size)] = 1
    logits += R.choice([0, 1e4, -1e20])
    for temperature in (1e-9, 0.1, 0.8, 1, 1e6):
        for top_k in (None, 1, 50, int(R.integers(1, size + 2))):
            for top_p in (None, 1e-9, 0.5, 0.95, 1.0, 1 - R.random()):
                draws = [0.0, *R.random(2)]
                with np.errstate(over="ignore"):
                    expected = [by_sorting(logits, draw, temperature, top_k, top_p) for draw in draws]
                found = choose(np.tile(logits, (3, 1)), np.array(draws), temperature, top_k, top_p)
                assert found.tolist() == expected, (temperature, top_k, top_p)
                if size == 50257 and top_k not in (None, 50):
                    break  # (sorting is slow)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_choose_rejects_parameters_out_of_range(bad):
    with pytest.raises(ValueError, match="expected"):
        choose(np.zeros((1, 3)), np.zeros(1), **bad)


# Streaming


class Scripted:
    """A model whose logits make each sample generate a given text, byte by byte."""

    def __init__(self, *texts):
        from tinygrad2 import Tensor

        self.texts, self.at, self.tensor = [t if isinstance(t, list) else list(t.encode()) for t in texts], 0, Tensor
        self.config = GPT2Config(vocab_size=257, n_positions=10_000, n_embd=1, n_layer=0 + 1, n_head=1)

    def features(self, tokens, cache=None):
        return self.tensor(np.zeros((*tokens.shape, 1)))

    def head(self, features):
        logits = np.full((len(self.texts), 257), -1e9)
        for row, text in zip(logits, self.texts, strict=True):
            row[text[self.at] if self.at < len(text) else 256] = 0
        self.at += 1
        return self.tensor(logits)


def streamed(*texts, stop=(), max_tokens=100):
    pieces = list(
        stream_text(
            Scripted(*texts), Tokenizer.load("bytes"), [0], max_tokens, stop=stop, samples=len(texts), cache=False
        )
    )
    assert all(piece for _, piece in pieces)
    return ["".join(piece for i, piece in pieces if i == row) for row in range(len(texts))], pieces


def test_text_is_streamed_by_characters_and_ends_at_end_of_text():
    texts, pieces = streamed("né€😀!")
    assert texts == ["né€😀!"]
    assert pieces == [(0, c) for c in "né€😀!"]


def test_an_incomplete_character_at_the_end_is_replaced():
    assert streamed("a€", max_tokens=2)[0] == ["a\ufffd"]
    assert streamed([97, 0xE2, 256])[0] == ["a\ufffd"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo", ["\n\n"], "one\ntwo"),
        ("one\n", ["\n\n"], "one\n"),
        ("aab", ["ab"], "a"),
        ("abcabd", ["abd", "zz"], "abc"),
        ("x END y", ["y", " END"], "x"),
        ("né€", ["€"], "né"),
        ("xabcdy", ["abcd", "bc"], "xa"),  # the one that is complete first
        ("xabcy", ["bc", "abc"], "x"),  # both are complete at once: the longer one
    ],
)
def test_text_ends_before_a_stop_string(text, stop, expected):
    assert streamed(text, stop=stop)[0] == [expected]


def character_by_character(text, stop):
    read = ""
    for c in text:
        read += c
        found = [s for s in stop if read.endswith(s)]
        if found:
            return read[: -max(map(len, found))]
    return read


@pytest.mark.parametrize("seed", range(40))
def test_token_boundaries_do_not_affect_where_a_text_ends(seed):
    """Streaming tokens of several letters, compared with a search character by character."""
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("abc"), 12))
    stop = ["".join(rng.choice(list("abc"), rng.integers(1, 5))) for _ in range(rng.integers(1, 4))]
    cuts = sorted({0, len(text), *rng.integers(1, len(text), 3).tolist()})
    words = [text[a:b] for a, b in itertools.pairwise(cuts)]

    class Words:
        vocab_size, end_of_text, end_ids, unused_ids = 257, 256, (256,), ()

        def decode_bytes(self, ids):
            return words[ids[0]].encode()

    model = Scripted([*range(len(words)), 256])
    pieces = stream_text(model, Words(), [0], 20, stop=stop, cache=False)
    assert "".join(piece for _, piece in pieces) == character_by_character(text, stop)


def test_text_that_may_start_a_stop_string_is_delayed():
    _, pieces = streamed("a\nb\n\nc", stop=["\n\n"])
    assert pieces == [(0, "a"), (0, "\nb")]


def test_each_sample_ends_at_its_own_token():
    assert streamed("first", "2", "third.x", stop=[".x"])[0] == ["first", "2", "third"]


def test_any_of_several_end_ids_ends_a_text():
    model = make_model()
    free = complete(model, [1, 2, 3], 12, samples=2, seed=4)
    ends = (free[0][5], free[1][3])
    for row, ended in zip(free, complete(model, [1, 2, 3], 12, ends, samples=2, seed=4), strict=True):
        assert ended == row[: next(i for i, token in enumerate(row) if token in ends)]


@pytest.mark.parametrize("temperature", [0, 1.0, 1e6])
def test_unused_ids_are_never_sampled(temperature):
    model = make_model()
    never = [i for i in range(50) if i % 7]
    tokens = list(generate(model, [1, 2], 40, samples=3, temperature=temperature, never=never, vocab_size=50))
    assert set(np.concatenate(tokens).tolist()) <= set(range(0, 50, 7))


class Ends:
    """A tokenizer with begin and end ids."""

    begin, end_ids = 5, (6, 7)


def test_ids_of_the_model_take_precedence_over_those_of_the_tokenizer():
    model = make_model()
    assert (begin_id(model, Ends), end_ids(model, Ends)) == (5, (6, 7))
    model.config = dataclasses.replace(model.config, bos_token_id=0, eos_token_id=(1, 2))
    assert (begin_id(model, Ends), end_ids(model, Ends)) == (0, (1, 2))
