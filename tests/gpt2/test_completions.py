"""gpt2/completions.py: parsing requests, the pieces of a completion, and the worker thread."""

import json
import queue
import threading

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, Tokenizer
from gpt2.completions import (
    END,
    MAX_CHOICES,
    Answer,
    Choice,
    Request,
    RequestError,
    TokenInfo,
    Worker,
    parse_json,
    parse_request,
    pieces,
)
from gpt2.generate import TextPieces, stream_text
from tinygrad2 import no_grad

BYTES = Tokenizer.load("bytes")
NAME, CONTEXT = "tiny", 32


@pytest.fixture(scope="module")
def model():
    model = GPT2(GPT2Config(vocab_size=257, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2), seed=2)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data * 10  # far from uniform
    return model


MODEL = GPT2(GPT2Config(vocab_size=257, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2))


def parse(**values):
    return parse_request(values, MODEL, BYTES, NAME)


def answer_of(model, **values):
    request = parse(**values)
    answer = Answer(request, BYTES, NAME)
    for piece in pieces(model, BYTES, request):
        if piece is not None:
            answer.add(piece)
    return answer.whole()


# Requests ------------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_openai_api():
    request = parse(prompt="ab")
    assert (request.prompts, request.max_tokens, request.n, request.temperature) == ([[97, 98]], 16, 1, 1.0)
    assert (request.top_k, request.top_p, request.stop, request.logprobs) == (None, None, [], None)
    assert parse(prompt="ab").seed != request.seed
    assert parse(prompt="", seed=3).prompts == [[BYTES.end_of_text]]
    assert parse().prompts == [[BYTES.end_of_text]]
    no_effect = {"best_of": 1, "logit_bias": None, "presence_penalty": 0, "frequency_penalty": 0.0, "suffix": None}
    assert parse(prompt="ab", user="me", top_p=None, seed=request.seed, **no_effect) == request


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a", [[97]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98]], [[97], [98]]),
        ([], [[256]]),
        ([""], [[256]]),
    ],
)
def test_prompts_are_texts_or_ids(prompt, ids):
    assert parse(prompt=prompt).prompts == ids


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "other", "model is 'other'; this server has 'tiny'"),
        ("model", 3, "model is 3; expected a string"),
        ("prompt", 3, "prompt: expected a string"),
        ("prompt", {"a": 1}, "prompt: expected a string"),
        ("prompt", ["a", 3], "prompt: expected a string"),
        ("prompt", [True], "prompt: expected a string"),
        ("prompt", [97, 257], "prompt has the id 257; expected ids from 0 to 256"),
        ("prompt", [10**50], "prompt has the id too large"),
        ("prompt", ["a"] * 17, "prompt is a list of 17 prompts; expected at most 16"),
        ("max_tokens", -1, "max_tokens is -1; expected an integer from 0 to 8,192"),
        ("max_tokens", 1.5, "max_tokens is 1.5"),
        ("max_tokens", True, "max_tokens is true"),
        ("max_tokens", 10**50, "max_tokens is too large"),
        ("n", 0, "n is 0; expected an integer from 1 to 16"),
        ("temperature", "hot", 'temperature is "hot"; expected a number'),
        ("temperature", -1, "temperature is -1.0; expected 0 (greedy) or more"),
        ("temperature", float("nan"), "temperature is NaN; expected a number"),
        ("top_p", 0, "top-p is 0.0; expected 0 < top-p <= 1"),
        ("top_k", 0, "top_k is 0; expected an integer from 1"),
        ("seed", -1, "seed is -1; expected an integer from 0"),
        ("seed", 2**64, "seed is 18446744073709551616"),
        ("stop", [""], "stop: expected a non-empty string or a list of non-empty strings"),
        ("stop", ["a"] * 5, "stop: expected at most 4 strings"),
        ("stop", "a" * 1001, "stop: expected at most 4 strings of at most 1000 characters"),
        ("logprobs", 21, "logprobs is 21; expected an integer from 0 to 20"),
        ("echo", 1, "echo is 1; expected true or false"),
        ("stream_options", True, "stream_options: expected an object"),
        ("best_of", 2, "best_of is 2, which is not supported"),
        ("suffix", "x", 'suffix is "x", which is not supported'),
        ("temprature", 1, "'temprature' is not a supported field"),
    ],
)
def test_the_error_for_an_invalid_field_names_the_field(field, value, message):
    with pytest.raises(RequestError) as caught:
        parse(**{field: value})
    assert str(caught.value).startswith(message)
    described = json.loads(json.dumps(caught.value.describe()))["error"]
    assert described["param"] == field
    assert described["type"] == "invalid_request_error"
    assert caught.value.status == (404 if value == "other" else 400)


def test_limits_on_combinations_of_fields():
    with pytest.raises(RequestError, match="n is 9 for 2 prompts: 18 choices") as caught:
        parse(prompt=["a", "b"], n=9)
    assert caught.value.field == "n"
    with pytest.raises(RequestError, match="prompt has 33 tokens; echo with logprobs needs at most 32"):
        parse(prompt="a" * 33, echo=True, logprobs=0)
    assert parse(prompt="a" * 33, echo=True).echo


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"seed": 1' + b"0" * 5000 + b"}", b"3"])
def test_a_body_that_is_not_a_json_object_is_rejected(body):
    with pytest.raises(RequestError, match="the body is"):
        parse_json(body)


# Pieces --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 5}])
def test_texts_equal_those_of_the_command_line(model, sampling):
    expected = ["", ""]
    for i, piece in stream_text(model, BYTES, [97, 98], 50, samples=2, stop=["zz"], **sampling):
        expected[i] += piece
    found = answer_of(model, prompt="ab", max_tokens=50, n=2, stop="zz", **sampling)
    assert [choice["text"] for choice in found["choices"]] == expected
    with_logprobs = answer_of(model, prompt="ab", max_tokens=50, n=2, stop="zz", logprobs=3, **sampling)
    assert [choice["text"] for choice in with_logprobs["choices"]] == expected


def test_choices_of_several_prompts_are_numbered_consecutively(model):
    both = answer_of(model, prompt=["a", "b"], n=2, seed=1)["choices"]
    assert [choice["index"] for choice in both] == [0, 1, 2, 3]
    for i, prompt in enumerate("ab"):
        alone = answer_of(model, prompt=prompt, n=2, seed=1)["choices"]
        assert [choice["text"] for choice in alone] == [choice["text"] for choice in both[2 * i : 2 * i + 2]]


def test_an_interrupted_text_can_be_continued(model):
    whole = list(pieces(model, BYTES, parse(prompt="ab", max_tokens=20, seed=3, logprobs=0)))
    ids = [token.id for piece in whole if piece for token in piece.tokens]
    assert len(ids) == 20
    rest = list(pieces(model, BYTES, parse(prompt=[97, 98, *ids[:8]], max_tokens=12, seed=3, first_step=8, logprobs=0)))
    assert [token.id for piece in rest if piece for token in piece.tokens] == ids[8:]


def test_log_probabilities_equal_the_softmax_of_the_logits(model):
    found = answer_of(model, prompt="abc", max_tokens=6, logprobs=4, echo=True, seed=1, temperature=0.5)
    (choice,) = found["choices"]
    logprobs = choice["logprobs"]
    pieces_ = list(
        pieces(model, BYTES, parse(prompt="abc", max_tokens=6, logprobs=4, echo=True, seed=1, temperature=0.5))
    )
    ids = [token.id for piece in pieces_ if piece for token in piece.tokens]
    with no_grad():
        logits = model.head(model.features(np.array([ids]))).numpy()[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    np.testing.assert_allclose(logprobs["token_logprobs"][1:], expected[np.arange(8), ids[1:]], atol=2e-5)
    for row, top in zip(expected, logprobs["top_logprobs"][1:], strict=False):
        assert len(top) == 4
        assert list(top.values()) == sorted(top.values(), reverse=True)
        np.testing.assert_allclose(list(top.values()), np.sort(row)[::-1][:4], atol=2e-5)
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 9
    assert logprobs["tokens"][:3] == ["a", "b", "c"]
    assert logprobs["text_offset"][:4] == [0, 1, 2, 3]
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


def test_a_prompt_is_scored_if_max_tokens_is_0(model):
    found = answer_of(model, prompt="abc", max_tokens=0, logprobs=1, echo=True)
    assert found["choices"][0]["text"] == "abc"
    assert len(found["choices"][0]["logprobs"]["token_logprobs"]) == 3
    assert found["choices"][0]["finish_reason"] == "length"
    assert answer_of(model, prompt="abc", max_tokens=0)["choices"][0]["text"] == ""
    assert answer_of(model, prompt="", max_tokens=0, echo=True)["choices"][0]["text"] == ""


def feed(ids, stop=(), last=None):
    """Add these tokens to a choice. Returns its pieces."""
    choice = Choice(0, TextPieces(BYTES, BYTES.end_ids, stop), BYTES.end_ids)
    return [choice.add(TokenInfo(i, 0), last=at == last) for at, i in enumerate(ids)]


def test_a_character_of_several_tokens_is_one_piece():
    first, second, third = feed("aé".encode())
    assert (first.text, second) == ("a", None)
    assert third.text == "é"
    assert [(token.id, token.start) for token in third.tokens] == [(0xC3, 1), (0xA9, 1)]
    (only,) = feed(b"\xc3", last=0)
    assert (only.text, only.finish, len(only.tokens)) == ("\ufffd", "length", 1)


def test_a_stop_string_and_its_tokens_are_removed():
    found = [piece for piece in feed(b"xabyabc", stop=["abc"]) if piece]
    assert "".join(piece.text for piece in found) == "xaby"
    assert bytes(token.id for piece in found for token in piece.tokens) == b"xaby"
    assert [piece.finish for piece in found][-1] == "stop"


def test_end_of_text_is_not_part_of_the_text():
    a, end = feed([97, BYTES.end_of_text])
    assert (a.text, end.text, end.tokens, end.finish, end.ending.id) == ("a", "", [], "stop", BYTES.end_of_text)


def test_tokens_that_are_not_valid_text_are_shown_as_bytes(model):
    request = Request([[0xC3]], max_tokens=0, echo=True, logprobs=1)
    answer = Answer(request, BYTES, NAME)
    for piece in pieces(model, BYTES, request):
        answer.add(piece)
    assert answer.whole()["choices"][0]["logprobs"]["tokens"] == ["bytes:\\xc3"]


# The worker ----------------------------------------------------------------------------------------------------------


class Results(queue.Queue):
    def all(self):
        found = []
        while (result := self.get(timeout=10)) is not END:
            found.append(result)
            if isinstance(result, Exception):
                break
        return found


@pytest.fixture
def worker():
    worker = Worker(running=2, waiting=3, seconds=5)
    yield worker
    worker.stop()


def test_jobs_take_turns(worker):
    order, entered, both = [], threading.Event(), threading.Event()

    def steps(name):
        def start():
            if name == "a":
                entered.set()
                both.wait(timeout=10)
            for i in range(3):
                order.append(name)
                yield i

        return start

    a, b = Results(), Results()
    worker.submit(steps("a"), a.put)
    assert entered.wait(timeout=10)
    worker.submit(steps("b"), b.put)
    both.set()
    assert (a.all(), b.all()) == ([0, 1, 2], [0, 1, 2])
    assert "".join(order) == "aababb"


def endless(entered, go):
    def start():
        entered.set()
        while True:
            assert go.wait(timeout=10)
            yield 1

    return start


def test_a_cancelled_job_runs_no_more_steps(worker):
    entered, go, closed = threading.Event(), threading.Event(), threading.Event()
    counted = []

    def start():
        try:
            while True:
                entered.set()
                go.wait(timeout=10)
                counted.append(1)
                yield 1
        finally:
            closed.set()

    results = Results()
    job = worker.submit(start, results.put)
    assert entered.wait(timeout=10)
    job.cancel()
    go.set()
    assert closed.wait(timeout=10)
    assert (len(counted), results.qsize()) == (1, 0)
    after = Results()
    worker.submit(lambda: iter([7]), after.put)
    assert after.all() == [7]
    assert worker.load() == (0, 0)


def test_too_many_jobs_are_rejected_and_cancelled_jobs_do_not_count(worker):
    entered, go = [threading.Event(), threading.Event()], threading.Event()
    first = [worker.submit(endless(event, go), lambda result: None) for event in entered[:1]]
    assert entered[0].wait(timeout=10)
    waiting = [worker.submit(lambda: iter(()), lambda result: None) for _ in range(3)]
    with pytest.raises(RequestError, match="3 requests are already waiting") as caught:
        worker.submit(lambda: iter(()), lambda result: None)
    assert caught.value.status == 429
    assert caught.value.describe()["error"]["type"] == "rate_limit_error"
    waiting[1].cancel()
    worker.submit(lambda: iter(()), lambda result: None)
    for job in first:
        job.cancel()
    go.set()


def test_an_error_ends_only_its_own_job(worker):
    bad, good = Results(), Results()
    worker.submit(lambda: (_ for _ in [1 // 0]), bad.put)
    worker.submit(lambda: iter([None, 5]), good.put)
    assert [type(result) for result in bad.all()] == [ZeroDivisionError]
    assert good.all() == [5]  # None is not delivered


def test_a_job_that_takes_too_long_is_ended():
    worker = Worker(seconds=0.0)
    results = Results()
    worker.submit(lambda: iter([1]), results.put)
    (error,) = results.all()
    assert isinstance(error, RequestError)
    assert error.status == 503
    worker.stop()
    worker._thread.join(timeout=10)
    assert not worker._thread.is_alive()


def test_the_maximum_number_of_choices_is_accepted():
    assert parse(prompt="a", n=MAX_CHOICES).n == MAX_CHOICES
